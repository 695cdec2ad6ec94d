/** How long a dataset will take and how large it will be, from what the same model has made before. */

import { ask } from "./api.js";
import { size, span } from "./dom.js";
import { completed } from "./videos.js";

const MOST = 9;

/**
 * @param {number} clips
 * @param {Record<string, any>} settings Of SettingsFields.
 * @param {string} format Of the archive.
 * @returns {Promise<string>} In words, with what it rests on.
 */
export async function estimate(clips, settings, format) {
  const count = `${clips} ${clips === 1 ? "clip" : "clips"}`;
  const earlier = completed(settings.model).filter((video) => video.inference_time_s !== null).slice(0, MOST);
  const raw = pixelsOf(settings.size) * settings.num_frames * 3;
  if (earlier.length === 0) {
    const known = format === "dicom" || format === "png" ? `, at most ${size(raw * clips)}` : "";
    return `${count}${known}. Make one video with this checkpoint, and time and size can be estimated.`;
  }
  const work = settings.num_inference_steps * settings.num_frames * pixelsOf(settings.size);
  const seconds = median(earlier.map((video) => {
    const each = /** @type {number} */ (video.inference_time_s) / (video.batch_size ?? 1);
    return (each * work) / (video.num_inference_steps * video.num_frames * pixelsOf(video.size));
  }));
  const scale = raw / (pixelsOf(earlier[0].size) * earlier[0].num_frames * 3);
  const bytes = format === "dicom" || format === "png" ? raw
    : scale * (await storedBytes(earlier[0].id, format === "ffv1" ? "lossless" : "video"));
  const most = format === "png" ? "at most " : "about ";
  return `${count}: about ${span(seconds * clips)} on one worker, ${bytes ? most + size(Math.round(bytes * clips)) : "size unknown"} ` +
    `(from your last ${earlier.length === 1 ? "video" : `${earlier.length} videos`} of this checkpoint).`;
}

/** @param {string} videoId @param {string} variant */
async function storedBytes(videoId, variant) {
  try {
    const answer = await ask(`/v1/videos/${videoId}/content?variant=${variant}`, { method: "HEAD" });
    return Number(answer.headers.get("content-length"));
  } catch {
    return 0;
  }
}

/** @param {string} text Such as 128x128. */
function pixelsOf(text) {
  const [width, height] = text.split("x").map(Number);
  return width * height;
}

/** @param {number[]} values */
function median(values) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(sorted.length / 2)];
}
