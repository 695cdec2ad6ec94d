/** Decoded frames of a video as grey levels, for what is computed of them. */

const MOST_SIDE = 128;
/** @type {Map<string, Promise<GreyFrames>>} */
const decoded = new Map();

/** @typedef {{width: number, height: number, frames: Float32Array[]}} GreyFrames Grey levels, 0 to 255, row by row. */

/**
 * Decode every frame of a video; larger ones scaled down to 128 pixels a side.
 *
 * @param {string} url
 * @param {number} numFrames
 * @param {number} fps
 * @returns {Promise<GreyFrames>}
 */
export function greyFrames(url, numFrames, fps) {
  let found = decoded.get(url);
  if (!found) {
    found = decode(url, numFrames, fps);
    decoded.set(url, found);
    if (decoded.size > 12) decoded.delete(/** @type {string} */ (decoded.keys().next().value));
    found.catch(() => decoded.delete(url));
  }
  return found;
}

/** @param {string} url @param {number} numFrames @param {number} fps @returns {Promise<GreyFrames>} */
async function decode(url, numFrames, fps) {
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  video.src = url;
  await once(video, "loadeddata");
  const scale = Math.min(1, MOST_SIDE / Math.max(video.videoWidth, video.videoHeight));
  const width = Math.round(video.videoWidth * scale);
  const height = Math.round(video.videoHeight * scale);
  const canvas = new OffscreenCanvas(width, height);
  const context = /** @type {any} */ (canvas.getContext("2d", { willReadFrequently: true }));
  const frames = [];
  for (let number = 0; number < numFrames; number += 1) {
    video.currentTime = (number + 0.5) / fps;
    await once(video, "seeked");
    context.drawImage(video, 0, 0, width, height);
    frames.push(greyOf(context.getImageData(0, 0, width, height).data));
  }
  video.removeAttribute("src");
  video.load();
  return { width, height, frames };
}

/** @param {Uint8ClampedArray} rgba */
function greyOf(rgba) {
  const grey = new Float32Array(rgba.length / 4);
  for (let i = 0; i < grey.length; i += 1) {
    grey[i] = 0.299 * rgba[4 * i] + 0.587 * rgba[4 * i + 1] + 0.114 * rgba[4 * i + 2];
  }
  return grey;
}

/** @param {HTMLVideoElement} video @param {string} kind */
function once(video, kind) {
  return new Promise((resolve, reject) => {
    video.addEventListener(kind, resolve, { once: true });
    video.addEventListener("error", () => reject(new Error("This browser cannot decode the video.")), { once: true });
  });
}
