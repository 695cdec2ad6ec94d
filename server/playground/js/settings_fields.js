/** Checkpoint and how it is sampled: the fields that videos and datasets have in common. */

import { el, field } from "./dom.js";
import { lengths } from "./models.js";

export class SettingsFields {
  /** @param {import("./models.js").Model[]} models @param {() => void} onModel Called when another is chosen. */
  constructor(models, onModel) {
    this.models = models;
    this.choice = field("Checkpoint", el("select", { onchange: () => { this.#fill(); onModel(); } },
      ...models.map((model) => el("option", { value: model.id, text: model.id }))));
    this.frames = field("Frames", el("select", {}));
    this.size = field("Size", el("select", {}));
    this.sampler = field("Sampler", el("select", { onchange: () => this.#bound() }));
    this.steps = field("Steps", el("input", { type: "number", inputmode: "numeric", step: 1, required: true }));
    this.guidance = field("Guidance", el("input", { type: "number", inputmode: "decimal", step: "any", required: true }));
    /** What is chosen, for where the fields are folded away. */
    this.summary = el("span", { class: "hint" });
    this.element = el("div", { class: "grid", onchange: () => this.#sum(), oninput: () => this.#sum() }, this.frames, this.size, this.sampler, this.steps, this.guidance);
    /** Parameter of the API -> field. @type {Record<string, any>} */
    this.byParam = { model: this.choice, num_frames: this.frames, seconds: this.frames, size: this.size,
      sampler: this.sampler, num_inference_steps: this.steps, guidance_scale: this.guidance };
    this.#fill();
  }

  get model() {
    return /** @type {import("./models.js").Model} */ (this.models.find((model) => model.id === this.choice.control.value));
  }

  /** As fields of a request. */
  values() {
    return {
      model: this.model.id, size: this.size.control.value, num_frames: Number(this.frames.control.value),
      num_inference_steps: Number(this.steps.control.value), guidance_scale: Number(this.guidance.control.value),
      sampler: this.sampler.control.value,
    };
  }

  /** Take them from a video. @param {import("./videos.js").Video} video */
  take(video) {
    if (!this.models.some((model) => model.id === video.model)) return;
    this.choice.control.value = video.model;
    this.#fill();
    this.sampler.control.value = video.sampler;
    this.#bound();
    this.size.control.value = video.size;
    this.frames.control.value = String(video.num_frames);
    this.steps.control.value = String(video.num_inference_steps);
    this.guidance.control.value = String(video.guidance_scale);
    this.#sum();
  }

  #sum() {
    const { size, num_frames, sampler, num_inference_steps, guidance_scale } = this.values();
    this.summary.textContent = `${num_frames} frames, ${size}, ${sampler}, ${num_inference_steps} steps, guidance ${guidance_scale}`;
  }

  #fill() {
    const { model } = this;
    const { limits } = model;
    this.choice.setHint(model.description);
    options(this.frames.control, lengths(model).map((frames) => [String(frames), `${frames} (${frames / limits.fps} s)`]));
    options(this.size.control, limits.sizes.map((/** @type {string} */ size) => [size, size.replace("x", " × ")]));
    options(this.sampler.control, limits.samplers.map((/** @type {string} */ name) => [name, name]));
    this.#bound();
  }

  /** Steps and guidance are other ones for the sampler shortcut. */
  #bound() {
    const { limits } = this.model;
    const isShort = this.sampler.control.value === "shortcut" && limits.shortcut;
    const steps = isShort
      ? { minimum: Math.min(...limits.shortcut.num_inference_steps), default: limits.shortcut.num_inference_steps[0],
          maximum: Math.max(...limits.shortcut.num_inference_steps) }
      : limits.num_inference_steps;
    const fixed = limits.shortcut?.guidance_scale;
    const guidance = isShort ? { minimum: fixed, default: fixed, maximum: fixed } : limits.guidance_scale;
    bound(this.steps, steps, isShort ? `${limits.shortcut.num_inference_steps.join(", ")}` : `${steps.minimum} to ${steps.maximum}`);
    bound(this.guidance, guidance, isShort ? "Built in" : `${guidance.minimum} (none) to ${guidance.maximum}`);
    this.#sum();
  }
}

/** @param {HTMLSelectElement} select @param {string[][]} choices */
function options(select, choices) {
  select.replaceChildren(...choices.map(([value, text]) => el("option", { value, text })));
}

/** @param {any} box @param {{minimum: number, default: number, maximum: number}} range @param {string} hint */
function bound(box, range, hint) {
  box.control.min = String(range.minimum);
  box.control.max = String(range.maximum);
  box.control.value = String(range.default);
  box.setHint(hint);
}
