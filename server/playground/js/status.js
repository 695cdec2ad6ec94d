/** The page that says whether the server can work, what waits, and what one may still ask for. */

import { ask, get } from "./api.js";
import { button, el, problemText, size, span, table, tell } from "./dom.js";
import { parseMetrics } from "./metrics.js";
import { discard, page, unfinished } from "./videos.js";

const EVERY_MS = 3000;
const PARTS = { database: "Database", disk: "Disk", broker: "Queue (broker)", worker: "Workers" };

/** @param {HTMLElement} place @returns {() => void} */
export function showStatus(place) {
  const parts = { health: el("div", {}), queue: el("div", {}), workers: el("div", {}), own: el("div", {}), usage: el("div", {}) };
  const panel = (/** @type {string} */ title, /** @type {HTMLElement} */ body) =>
    el("section", { class: "panel" }, el("h2", { text: title }), body);
  place.append(el("h1", { tabindex: -1, text: "Queue and health" }),
    el("div", { class: "panels" }, panel("Health", parts.health), panel("Queue", parts.queue), panel("Workers", parts.workers),
      panel("Your videos that wait or are made", parts.own), panel("Your use today", parts.usage)));

  const looks = [
    [parts.health, showHealth], [parts.own, showOwn], [parts.usage, showUsage],
  ];
  let timer = 0;
  async function look() {
    await Promise.all([
      ...looks.map(([part, show]) => show(part).catch((error) => problem(part, error))),
      showMetrics(parts.queue, parts.workers).catch((error) => { problem(parts.queue, error); problem(parts.workers, error); }),
    ]);
    if (place.isConnected) timer = setTimeout(look, EVERY_MS);
  }
  look();
  return () => clearTimeout(timer);
}

/** @param {HTMLElement} part @param {any} error */
function problem(part, error) {
  part.replaceChildren(el("p", { class: "wrong", text: problemText(error) }));
}

/** Not ready is an answer, not an error. @param {HTMLElement} part */
async function showHealth(part) {
  let answer;
  try {
    answer = await (await fetch("/health/ready")).json();
  } catch {
    return problem(part, { message: "The server cannot be reached. Is it running?" });
  }
  part.replaceChildren(
    el("p", { class: answer.status === "ready" ? "ok" : "wrong",
      text: answer.status === "ready" ? "Ready: a video that is asked for now is made." : "Not ready." }),
    el("ul", { class: "checks" }, ...Object.entries(answer.checks).map(([name, check]) => el("li", {},
      el("span", { class: check.status === "ok" ? "ok" : "wrong", text: check.status === "ok" ? "OK" : "Failing" }),
      ` ${PARTS[name] ?? name}`, check.reason ? el("span", { class: "hint", text: ` ${check.reason}` }) : null))));
}

/** @param {HTMLElement} queue @param {HTMLElement} workers */
async function showMetrics(queue, workers) {
  const samples = parseMetrics(await (await ask("/metrics")).text());
  const of = (/** @type {string} */ name) => samples.filter((sample) => sample.name === name);
  const value = (/** @type {string} */ name, /** @type {string} */ label, /** @type {string} */ is) =>
    of(name).find((sample) => sample.labels[label] === is)?.value;
  const models = of("medsora_num_requests_waiting").map(({ labels }) => labels.model);
  queue.replaceChildren(models.length ? table(["Checkpoint", "Waiting", "Being made", "Made"], models.map((model) => [model,
    String(value("medsora_num_requests_waiting", "model", model) ?? 0),
    String(value("medsora_num_requests_running", "model", model) ?? 0),
    String(samples.find(({ name, labels }) => name === "medsora_requests_total" && labels.model === model && labels.status === "succeeded")?.value ?? 0),
  ])) : el("p", { class: "empty", text: "Nothing was ever asked for." }));
  const up = of("medsora_worker_up");
  workers.replaceChildren(up.length ? table(["Worker", "State", "Memory", "GPU memory"], up.map(({ labels, value: isUp }) => [
    labels.worker, isUp ? "able" : "not able",
    size(value("medsora_worker_resident_bytes", "worker", labels.worker) ?? 0),
    value("medsora_gpu_peak_memory_bytes", "worker", labels.worker) ? size(/** @type {number} */ (value("medsora_gpu_peak_memory_bytes", "worker", labels.worker))) : "–",
  ])) : el("p", { class: "wrong", text: "No worker is alive." }));
}

/** @param {HTMLElement} part */
async function showOwn(part) {
  await page();
  const waiting = unfinished();
  part.replaceChildren(waiting.length ? el("ol", { class: "waiting-list" }, ...waiting.map((video) => el("li", { class: "row between" },
    el("span", {}, el("strong", { text: video.label }), ` seed ${video.seed} · `,
      video.status === "queued" ? (video.queue_position ? `place ${video.queue_position}` : "in the queue") : `${video.progress} %`),
    button("Cancel", () => discard(video.id).catch((error) => tell(problemText(error), "wrong")),
      { class: "quiet", "aria-label": `Cancel ${video.label}, seed ${video.seed}` })))) : el("p", { class: "empty", text: "None." }));
}

/** @param {HTMLElement} part */
async function showUsage(part) {
  const usage = await get("/v1/usage");
  const rows = { "Clips today": usage.clips_per_day, "Megapixel-frames today": usage.megapixel_frames_per_day, "Waiting now": usage.queued_jobs };
  part.replaceChildren(el("ul", { class: "checks" }, ...Object.entries(rows).map(([title, { used, limit }]) => el("li", {},
    `${title}: ${Math.round(used * 100) / 100}${limit === null ? "" : ` of ${limit}`} `,
    limit === null ? el("span", { class: "hint", text: "no limit" }) : el("meter", { min: 0, max: limit || 1, value: used, "aria-label": title })))),
  el("p", { class: "hint", text: `Tenant ${usage.tenant}. Daily figures begin anew in ${span(Math.max(0, usage.resets_at - Date.now() / 1000))}.` }));
}
