/**
 * The videos of whoever looks: what the server said of each last, and their files.
 *
 * @typedef {object} Video As in GET /v1/videos, seeds as text; `queue_position`, `steps_done` and `preview` from events.
 * @property {string} id
 * @property {"queued"|"in_progress"|"completed"|"failed"} status
 * @property {number} progress
 * @property {number} created_at
 * @property {string} label
 * @property {string} model
 * @property {string} seed
 * @property {string} size
 * @property {number} num_frames
 * @property {number} fps
 * @property {number} num_inference_steps
 * @property {number} guidance_scale
 * @property {string} sampler
 * @property {number|null} inference_time_s
 * @property {number|null} batch_size
 * @property {{code: string, message: string}|null} error
 * @property {number} [queue_position]
 * @property {number} [steps_done]
 * @property {string} [preview]
 */

import { ask, get, remove } from "./api.js";

/** Dispatches `change` (detail: the video) and `removed` (detail: its id). */
export const changes = new EventTarget();
/** @type {Map<string, Video>} */
const known = new Map();
/** @type {Map<string, Promise<string>>} */
const files = new Map();
/** Those that are deleted: what is still told of them is late. @type {Set<string>} */
const gone = new Set();

/** @param {any} video @returns {Video} */
export function put(video) {
  const merged = { ...known.get(video.id), ...video };
  if (merged.status !== "queued") delete merged.queue_position;
  if (merged.status === "completed" || merged.status === "failed") delete merged.preview;
  known.set(video.id, merged);
  changes.dispatchEvent(new CustomEvent("change", { detail: merged }));
  return merged;
}

/** @param {string} id */
export function lookUp(id) {
  return known.get(id);
}

/** All that are known and not finished, in the order in which they are made as far as that is told. */
export function unfinished() {
  const place = (/** @type {Video} */ video) => (video.status === "in_progress" ? 0 : video.queue_position ?? Infinity);
  return [...known.values()]
    .filter((video) => video.status === "queued" || video.status === "in_progress")
    .sort((one, other) => (place(one) === place(other) ? one.created_at - other.created_at : place(one) - place(other)));
}

/** Completed ones of a model, newest first: what estimates are made from. @param {string} model */
export function completed(model) {
  return [...known.values()]
    .filter((video) => video.model === model && video.status === "completed")
    .sort((one, other) => other.created_at - one.created_at);
}

/** @param {string} id @returns {Promise<Video>} */
export async function load(id) {
  return put(await get(`/v1/videos/${id}`));
}

/** @param {string} after Id of the last video of the page before, or empty. */
export async function page(after = "") {
  const query = after ? `&after=${after}` : "";
  const answer = await get(`/v1/videos?limit=24${query}`);
  return { videos: /** @type {Video[]} */ (answer.data.map(put)), hasMore: answer.has_more, last: answer.last_id };
}

/** Delete a video, or cancel it where it is not finished. @param {string} id */
export async function discard(id) {
  await remove(`/v1/videos/${id}`);
  gone.add(id);
  forget(id);
}

/** @param {string} id */
export function forget(id) {
  known.delete(id);
  const file = files.get(id);
  files.delete(id);
  file?.then((url) => URL.revokeObjectURL(url), () => {});
  changes.dispatchEvent(new CustomEvent("removed", { detail: id }));
}

/** Forget all of them: another key sees others. */
export function forgetAll() {
  for (const id of [...known.keys()]) forget(id);
}

/**
 * Address of the MP4 of a completed video, held by this page: it is fetched once, with the key where there is one.
 *
 * @param {string} id
 * @returns {Promise<string>}
 */
export function file(id) {
  let address = files.get(id);
  if (!address) {
    address = ask(`/v1/videos/${id}/content`).then(async (answer) => URL.createObjectURL(await answer.blob()));
    files.set(id, address);
    address.catch(() => files.delete(id));
  }
  return address;
}

/** What an event says of a video. @param {string} kind @param {any} data */
export function heard(kind, data) {
  if (kind === "video.deleted") {
    gone.add(data.id);
    return forget(data.id);
  }
  if (gone.has(data.id)) return;
  if (!known.has(data.id)) return void load(data.id).catch(() => {});
  if (kind === "video.completed" || kind === "video.failed" || kind === "video.cancelled") {
    return void load(data.id).catch(() => {});
  }
  const { id, status, progress, steps_done, num_inference_steps, queue_position, image } = data;
  const news = { id, status, progress, steps_done, num_inference_steps, queue_position, preview: image };
  put(Object.fromEntries(Object.entries(news).filter(([, value]) => value !== undefined)));
}
