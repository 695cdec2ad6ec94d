/** Videos side by side, in step: which seeds or settings make which difference. */

import { button, el, problemText } from "./dom.js";
import { Stage } from "./stage.js";
import { load } from "./videos.js";

const SHOWN = /** @type {const} */ ({
  label: "Label", seed: "Seed", model: "Model", num_inference_steps: "Steps", guidance_scale: "Guidance",
  sampler: "Sampler", size: "Size", num_frames: "Frames",
});
export const MOST = 4;

/** @param {HTMLElement} place @param {URLSearchParams} query `ids`: of the videos, with commas. @returns {() => void} */
export function showCompare(place, query) {
  const ids = (query.get("ids") ?? "").split(",").filter(Boolean).slice(0, MOST);
  const body = el("div", { class: "compare" });
  place.append(el("h1", { tabindex: -1, text: "Compare" }), body);
  /** @type {Stage|null} */
  let stage = null;
  if (ids.length < 2) {
    body.append(el("p", { class: "empty" }, "Mark two to four finished videos under ",
      el("a", { href: "#/", text: "Create" }), " and choose Compare: they play here side by side, in step."));
    return () => {};
  }
  Promise.all(ids.map(load)).then(async (videos) => {
    const rates = new Set(videos.map((video) => video.fps));
    if (videos.some((video) => video.status !== "completed") || rates.size > 1) {
      throw new Error("Only finished videos of one frame rate can be compared.");
    }
    const same = Object.keys(SHOWN).filter((name) => new Set(videos.map((video) => video[name])).size === 1);
    stage = new Stage(videos, (video) => differences(video, same));
    body.append(el("p", { class: "hint", text: `The same in all: ${same.map((name) => `${SHOWN[name].toLowerCase()} ${videos[0][name]}`).join(", ") || "nothing"}.` }),
      stage.element);
    await stage.ready;
  }).catch((error) => {
    body.replaceChildren(el("p", { class: "wrong", role: "alert", text: problemText(error) }),
      button("Try again", () => { body.replaceChildren(); location.reload(); }));
  });
  return () => stage?.end();
}

/** @param {import("./videos.js").Video} video @param {string[]} same */
function differences(video, same) {
  const names = Object.keys(SHOWN).filter((name) => !same.includes(name));
  if (names.length === 0) return el("span", { text: `The same settings (${video.id.slice(0, 14)}…)` });
  return el("dl", { class: "facts" }, ...names.flatMap((name) => [
    el("dt", { text: SHOWN[name] }), el("dd", {}, el("mark", { text: String(video[name]) }))]));
}
