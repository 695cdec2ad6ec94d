/** The form that asks for videos. */

import { ApiError, post, postForm } from "./api.js";
import { showCode } from "./code_dialog.js";
import { button, el, field, problemText, tell, uniqueId } from "./dom.js";
import { whyNoPrefix } from "./models.js";
import { SettingsFields } from "./settings_fields.js";
import { put } from "./videos.js";

const OTHER = "\u0000other";
const MOST_AT_ONCE = 8;

export class OrderForm {
  /** @param {import("./models.js").Model[]} models */
  constructor(models) {
    this.settings = new SettingsFields(models, () => this.#fill());
    this.label = field("Label", el("select", { onchange: () => this.#onLabel() }));
    this.words = field("Name or synonym", el("input", { type: "text", autocomplete: "off", maxlength: 200 }),
      "Anything that the model knows under another name.");
    this.seed = field("Seed", el("input", { type: "text", inputmode: "numeric", pattern: "[0-9]{0,19}", autocomplete: "off",
      placeholder: "drawn" }), "The same seed and settings give the same video.");
    this.count = field("Videos", el("input", { type: "number", min: 1, max: MOST_AT_ONCE, step: 1, value: "1", required: true }),
      "Seeds follow one another.");
    this.picture = field("Start image", el("input", { type: "file", accept: "image/png,image/jpeg,image/webp,video/mp4,video/webm" }));
    this.wrong = el("p", { class: "wrong", role: "alert", id: uniqueId("form-wrong") });
    this.submit = el("button", { type: "submit", class: "primary", text: "Generate" });
    this.element = el("form", { class: "order panel", novalidate: true, "aria-label": "New video",
      onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); this.#send(); } },
    this.settings.choice, this.label, this.words,
    el("div", { class: "grid" }, this.seed, this.count),
    el("details", { class: "more" }, el("summary", {}, "Settings ", this.settings.summary), this.settings.element, this.picture),
    this.wrong,
    el("div", { class: "row" }, this.submit,
      button("Copy as code", () => showCode(this.#order(), this.picture.control.files[0]?.name ?? ""))));
    this.fields = { ...this.settings.byParam, prompt: this.label, seed: this.seed, input_reference: this.picture };
    this.#fill();
  }

  /** Fill it with what a video was made by. @param {import("./videos.js").Video} video */
  take(video) {
    this.settings.take(video);
    this.#fill();
    this.label.control.value = video.label;
    this.#onLabel();
    this.seed.control.value = video.seed;
    this.seed.control.focus();
  }

  #fill() {
    const { model } = this.settings;
    const before = this.label.control.value;
    this.label.control.replaceChildren(
      ...model.labels.map(({ name }) => el("option", { value: name, text: name })),
      el("option", { value: OTHER, text: "Other words…" }));
    if (model.labels.some(({ name }) => name === before)) this.label.control.value = before;
    const reason = whyNoPrefix(model);
    this.picture.control.disabled = Boolean(reason);
    if (reason) this.picture.control.value = "";
    this.picture.setHint(reason || `A picture or short video of the size that is chosen.`);
    this.#onLabel();
  }

  #onLabel() {
    const { value } = this.label.control;
    this.words.hidden = value !== OTHER;
    const label = this.settings.model.labels.find(({ name }) => name === value);
    const others = label?.synonyms.slice(0, 3).join(", ");
    this.label.setHint(label ? label.description + (others ? ` (also: ${others})` : "") : "");
    this.fields.prompt = value === OTHER ? this.words : this.label;
  }

  #order() {
    const { value } = this.label.control;
    const seed = this.seed.control.value.trim();
    const order = { prompt: value === OTHER ? this.words.control.value : value, ...this.settings.values() };
    return seed ? { ...order, seed } : order;
  }

  async #send() {
    this.wrong.textContent = "";
    for (const box of Object.values(this.fields)) box.setWrong("");
    this.words.setWrong("");
    if (!this.#isSound()) return;
    this.submit.disabled = true;
    const order = this.#order();
    const count = Number(this.count.control.value);
    let made = 0;
    try {
      for (; made < count; made += 1) {
        const first = "seed" in order ? BigInt(order.seed) : null;
        await this.#ask(first === null ? order : { ...order, seed: String(first + BigInt(made)) });
      }
      tell(count === 1 ? "The video is in the queue." : `${count} videos are in the queue.`);
    } catch (error) {
      this.#show(error, made);
    } finally {
      this.submit.disabled = false;
    }
  }

  /** @param {Record<string, any>} order */
  async #ask(order) {
    const picture = this.picture.control.files[0];
    if (!picture) return put(await post("/v1/videos", order));
    const form = new FormData();
    for (const [name, value] of Object.entries(order)) form.append(name, String(value));
    form.append("input_reference", picture);
    return put(await postForm("/v1/videos", form));
  }

  /** Whether all fields hold what they are for; else the first that does not is shown. */
  #isSound() {
    const boxes = [...Object.values(this.fields), this.count];
    for (const box of boxes) {
      if (box.control.disabled || box.control.checkValidity()) continue;
      const { min, max } = box.control;
      box.setWrong(max ? `Give a number from ${min} to ${max}.` : "Give a whole number from 0 on, or nothing.");
      box.control.closest("details")?.setAttribute("open", "");
      box.control.focus();
      return false;
    }
    return true;
  }

  /** Say what was refused where it was given. @param {any} error @param {number} made */
  #show(error, made) {
    const box = error instanceof ApiError && error.param ? this.fields[error.param] : undefined;
    const text = (made ? `${made} were accepted. Then: ` : "") + problemText(error);
    if (!box) {
      this.wrong.textContent = text;
      return;
    }
    box.setWrong(text);
    box.control.closest("details")?.setAttribute("open", "");
    box.control.focus();
  }
}
