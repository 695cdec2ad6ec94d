/** One finished video: played, stepped through, downloaded, and made more of. */

import { post } from "./api.js";
import { orderOf, showCode } from "./code_dialog.js";
import { button, confirmed, el, field, problemText, tell } from "./dom.js";
import { downloadButtons } from "./downloads.js";
import { lengths, modelOf, whyNoPrefix } from "./models.js";
import { Stage } from "./stage.js";
import { discard, put } from "./videos.js";

/** @param {import("./videos.js").Video} video @param {(video: import("./videos.js").Video) => void} onReuse */
export async function openViewer(video, onReuse) {
  const stage = new Stage([video], () => el("span", { text: "" }));
  const reason = whyNoPrefix(await modelOf(video.model).catch(() => undefined));
  const extend = button("Extend", () => extendDialog(video), { disabled: Boolean(reason), "aria-describedby": "why-no-extend" });
  const dialog = el("dialog", { class: "viewer", "aria-labelledby": "viewer-title" },
    el("div", { class: "row between" },
      el("h2", { id: "viewer-title", text: video.label }),
      button("Close", () => dialog.close(), { class: "quiet" })),
    el("div", { class: "viewer-body" }, stage.element,
      el("div", { class: "viewer-side" },
        el("p", { class: "synthetic", text: "Synthetic: this video shows no patient. For research only, not for diagnosis." }),
        facts(video),
        el("h3", { text: "Download" }), downloadButtons(video.id),
        el("h3", { text: "More" }),
        el("div", { class: "row" },
          button("Use these settings", () => { dialog.close(); onReuse(video); }),
          button("Copy as code", () => showCode(orderOf(video))),
          extend,
          button("Delete", async () => {
            if (!(await confirmed("Delete this video and its files for good?", "Delete"))) return;
            await discard(video.id).catch((error) => tell(problemText(error), "wrong"));
            dialog.close();
          }, { class: "danger" })),
        el("p", { class: "hint", id: "why-no-extend", text: reason ? `Extend: ${reason}` : "" }))));
  dialog.addEventListener("close", () => {
    stage.end();
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  stage.ready.catch((error) => tell(problemText(error), "wrong"));
}

/** @param {import("./videos.js").Video} video */
function facts(video) {
  const rows = {
    Model: video.model, Seed: video.seed, Size: `${video.size}, ${video.num_frames} frames at ${video.fps}/s`,
    Sampler: `${video.sampler}, ${video.num_inference_steps} steps, guidance ${video.guidance_scale}`,
    Made: video.inference_time_s === null ? "–" : `in ${video.inference_time_s.toFixed(1)} s` +
      (video.batch_size && video.batch_size > 1 ? `, together with ${video.batch_size - 1} others` : ""),
    Id: video.id,
  };
  return el("dl", { class: "facts" },
    ...Object.entries(rows).flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]));
}

/** Ask how much is to come, then ask for it. @param {import("./videos.js").Video} video */
async function extendDialog(video) {
  const model = await modelOf(video.model);
  if (!model) return;
  const most = model.limits.max_frames - video.num_frames;
  const choices = lengths(model).filter((frames) => frames <= most);
  const length = el("select", {}, ...choices.map((frames) => el("option", { value: String(frames), text: `${frames} frames` })));
  const label = el("select", {}, ...model.labels.map(({ name }) => el("option", { value: name, text: name, selected: name === video.label })));
  const wrong = el("p", { class: "wrong", role: "alert" });
  const dialog = el("dialog", { class: "small", "aria-label": "Extend", onclose: () => dialog.remove() },
    el("h2", { text: "Extend" }),
    choices.length ? field("What is new", length) : el("p", { text: `This model makes at most ${model.limits.max_frames} frames.` }),
    field("Label", label), wrong,
    el("div", { class: "row end" },
      button("Not now", () => dialog.close(), { class: "quiet" }),
      button("Extend", async () => {
        try {
          put(await post("/v1/videos/extensions", { prompt: label.value, num_frames: Number(length.value), video: { id: video.id } }));
          dialog.close();
          tell("The longer video is in the queue.");
        } catch (error) {
          wrong.textContent = problemText(error);
        }
      }, { class: "primary", disabled: choices.length === 0 })));
  document.body.append(dialog);
  dialog.showModal();
}
