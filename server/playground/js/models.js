/**
 * The served checkpoints, and what each can do.
 *
 * @typedef {object} Model As in GET /v1/models.
 * @property {string} id
 * @property {string} description
 * @property {string} intended_use
 * @property {boolean} is_default
 * @property {{name: string, description: string, synonyms: string[]}[]} labels
 * @property {any} limits
 */

import { get } from "./api.js";

/** @type {Promise<Model[]>|null} */
let loading = null;

/** All of them, the default first. @returns {Promise<Model[]>} */
export function models() {
  loading ??= get("/v1/models").then((answer) => answer.data);
  loading.catch(() => forgetModels());
  return loading;
}

/** Ask anew the next time. */
export function forgetModels() {
  loading = null;
}

/** @param {string} id */
export async function modelOf(id) {
  return (await models()).find((model) => model.id === id);
}

/** Lengths in frames that can be chosen: those of the model, and where it goes on from given frames multiples of them. */
export function lengths(/** @type {Model} */ model) {
  const { num_frames: own, max_frames: most } = model.limits;
  const found = new Set(own);
  for (let times = 2; times <= 8 && own[0] * times <= most; times += 1) found.add(own[0] * times);
  return [...found].sort((one, other) => one - other);
}

/** Why a model cannot begin with a picture or go on from a video, or an empty string. @param {Model|undefined} model */
export function whyNoPrefix(model) {
  if (!model) return "The model of this video is not served any more.";
  if (model.limits.clean_prefixes) return "";
  return `${model.id} was not trained to go on from given frames.`;
}
