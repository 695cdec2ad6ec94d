/** Shows a request as code, to be copied. */

import { button, el, uniqueId } from "./dom.js";
import { LANGUAGES, TITLES, snippet } from "./snippets.js";

/** @param {Record<string, any>} order Fields of POST /v1/videos. @param {string} [picture] */
export function showCode(order, picture = "") {
  const code = el("code", {});
  const box = el("pre", { tabindex: 0, "aria-label": "Code of this request" }, code);
  const said = el("p", { class: "hint", role: "status" });
  const name = uniqueId("language");
  const show = (/** @type {"curl"|"python"|"javascript"} */ language) => {
    code.textContent = snippet(language, order, picture);
    said.textContent = "";
  };
  const choices = LANGUAGES.map((language, place) =>
    el("label", { class: "check" },
      el("input", { type: "radio", name, value: language, checked: place === 0, onchange: () => show(language) }),
      TITLES[language]));
  const dialog = el("dialog", { class: "code", "aria-label": "Copy as code", onclose: () => dialog.remove() },
    el("div", { class: "row between" },
      el("fieldset", { class: "row plain" }, el("legend", { class: "away", text: "Language" }), ...choices),
      button("Close", () => dialog.close(), { class: "quiet" })),
    box,
    el("div", { class: "row" }, button("Copy", async () => {
      said.textContent = (await copied(code)) ? "Copied." : "Marked: copy it with Ctrl+C.";
    }, { class: "primary" }), said));
  show("curl");
  document.body.append(dialog);
  dialog.showModal();
}

/** Copy the text of an element; where the browser forbids that, mark it. @param {HTMLElement} element */
export async function copied(element) {
  try {
    await navigator.clipboard.writeText(element.textContent ?? "");
    return true;
  } catch {
    getSelection()?.selectAllChildren(element);
    return false;
  }
}

/** The order that a video was made by. @param {import("./videos.js").Video} video */
export function orderOf(video) {
  return {
    prompt: video.label, model: video.model, size: video.size, seed: video.seed, num_frames: video.num_frames,
    num_inference_steps: video.num_inference_steps, guidance_scale: video.guidance_scale, sampler: video.sampler,
  };
}
