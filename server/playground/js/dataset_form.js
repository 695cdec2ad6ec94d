/** The form that asks for a dataset. */

import { ApiError, post } from "./api.js";
import { el, field, problemText, tell, uniqueId } from "./dom.js";
import { estimate } from "./estimate.js";
import { SettingsFields } from "./settings_fields.js";

const FORMATS = {
  videofolder: "MP4, a folder a label", webdataset: "MP4 in shards (WebDataset)", ffv1: "FFV1, exact to the bit",
  png: "PNG, a file a frame", dicom: "DICOM, multi-frame",
};
const SPLITS = ["train", "validation", "test"];

export class DatasetForm {
  /** @param {import("./models.js").Model[]} models @param {(dataset: any) => void} onMade */
  constructor(models, onMade) {
    this.onMade = onMade;
    this.settings = new SettingsFields(models, () => this.#fill());
    this.name = field("Name", el("input", { type: "text", maxlength: 200, required: true, value: "My dataset", autocomplete: "off" }));
    this.counts = el("tbody", {});
    this.format = field("Format", el("select", {}, ...Object.entries(FORMATS).map(([value, text]) => el("option", { value, text }))));
    this.seed = field("Seed", el("input", { type: "text", inputmode: "numeric", pattern: "[0-9]{0,19}", placeholder: "drawn", autocomplete: "off" }));
    this.motion = field("Least motion", el("input", { type: "number", min: 0, max: 255, step: "any", placeholder: "none" }),
      "Clips that move less, in grey levels a frame, are made anew.");
    this.splits = SPLITS.map((name, place) => field(`${name} %`, el("input", { type: "number", min: 0, max: 100, step: "any",
      value: place === 0 ? "100" : "0" })));
    this.estimated = el("p", { class: "estimate", role: "status" });
    this.wrong = el("p", { class: "wrong", role: "alert", id: uniqueId("dataset-wrong") });
    this.submit = el("button", { type: "submit", class: "primary", text: "Make the dataset" });
    this.element = el("form", { class: "order panel", novalidate: true, "aria-label": "New dataset",
      oninput: () => this.#estimate(), onchange: () => this.#estimate(),
      onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); this.#send(); } },
    this.name, this.settings.choice,
    el("table", { class: "counts" }, el("caption", { text: "Clips of each label" }),
      el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "Label" }), el("th", { scope: "col", text: "Clips" }))), this.counts),
    el("details", { class: "more" }, el("summary", {}, "Settings ", this.settings.summary),
      el("div", { class: "grid" }, this.format, this.seed, this.motion), el("div", { class: "grid three" }, ...this.splits),
      this.settings.element),
    this.estimated, this.wrong, el("div", { class: "row" }, this.submit));
    this.fields = { ...this.settings.byParam, name: this.name, format: this.format, seed: this.seed };
    this.#fill();
  }

  #fill() {
    this.counts.replaceChildren(...this.settings.model.labels.map(({ name, description }, place) => {
      const box = el("input", { type: "number", min: 0, max: 100000, step: 1, value: place === 0 ? "4" : "0",
        "aria-label": `Clips of ${name}`, dataset: { label: name } });
      return el("tr", {}, el("th", { scope: "row", title: description, text: name }), el("td", {}, box));
    }));
    this.#estimate();
  }

  #labels() {
    const boxes = /** @type {HTMLInputElement[]} */ ([...this.counts.querySelectorAll("input")]);
    return Object.fromEntries(boxes.map((box) => [box.dataset.label, Number(box.value)]).filter(([, count]) => count !== 0));
  }

  async #estimate() {
    this.asked = (this.asked ?? 0) + 1;
    const mine = this.asked;
    const clips = Object.values(this.#labels()).reduce((sum, count) => sum + count, 0);
    const text = clips > 0 ? await estimate(clips, this.settings.values(), this.format.control.value) : "Give at least one label a number of clips.";
    if (mine === this.asked) this.estimated.textContent = text; // else one that was asked for later is there
  }

  /** Tell the estimate anew: videos are known now. */
  refresh() {
    this.#estimate();
  }

  #order() {
    const splits = SPLITS.map((name, place) => [name, Number(this.splits[place].control.value) / 100]).filter(([, ratio]) => ratio > 0);
    const seed = this.seed.control.value.trim();
    const motion = this.motion.control.value;
    return {
      name: this.name.control.value, labels: this.#labels(), format: this.format.control.value,
      ...this.settings.values(), splits: Object.fromEntries(splits),
      ...(seed ? { seed } : {}), ...(motion ? { filters: { min_motion: Number(motion) } } : {}),
    };
  }

  async #send() {
    this.wrong.textContent = "";
    for (const box of Object.values(this.fields)) box.setWrong("");
    this.submit.disabled = true;
    try {
      this.onMade(await post("/v1/datasets", this.#order()));
      tell("The dataset is being made.");
    } catch (error) {
      const box = error instanceof ApiError && error.param ? this.fields[error.param] : undefined;
      if (box) {
        box.setWrong(problemText(error));
        box.control.closest("details")?.setAttribute("open", "");
        box.control.focus();
      } else {
        this.wrong.textContent = problemText(error);
      }
    } finally {
      this.submit.disabled = false;
    }
  }
}
