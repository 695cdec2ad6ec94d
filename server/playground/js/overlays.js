/** Pictures computed of the frame that is shown: its spectrum, and the motion to the next one. */

import { el } from "./dom.js";
import { FULL_SPEED, flow, flowPicture, wheelImage } from "./flow.js";
import { greyFrames } from "./frames.js";
import { spectrumImage } from "./spectrum.js";

export const OVERLAYS = /** @type {const} */ (["spectrum", "flow"]);
const TITLES = { spectrum: "Spectrum", flow: "Flow" };

/** Canvases of one video, drawn for a frame when they are asked for: over the video, or beside it. */
export class Overlays {
  /** @param {string} url @param {import("./videos.js").Video} video @param {HTMLElement} screen Holds the video. */
  constructor(url, video, screen) {
    this.url = url;
    this.video = video;
    this.screen = screen;
    /** Legends, and the pictures where they are shown beside the video. */
    this.element = el("div", { class: "overlays", hidden: true });
    /** @type {Map<string, {canvas: HTMLCanvasElement, figure: HTMLElement}>} */
    this.shown = new Map();
    /** @type {Map<string, OffscreenCanvas>} */
    this.drawn = new Map();
    this.frame = 0;
    this.isOver = true;
    this.opacity = 1;
  }

  /** @param {"spectrum"|"flow"} name @param {boolean} isOn */
  set(name, isOn) {
    const before = this.shown.get(name);
    before?.canvas.remove();
    before?.figure.remove();
    this.shown.delete(name);
    if (isOn) {
      const canvas = el("canvas", { class: name, role: "img", "aria-label": `${TITLES[name]} of the frame that is shown` });
      const legend = name === "flow" ? flowLegend() : el("span", { text: "80 dB, zero frequency amid" });
      const figure = el("figure", { class: "overlay" }, el("figcaption", {}, el("strong", { text: TITLES[name] }), legend));
      this.element.append(figure);
      this.shown.set(name, { canvas, figure });
    }
    this.element.hidden = this.shown.size === 0;
    this.place(this.isOver, this.opacity);
    return this.show(this.frame);
  }

  /** @param {boolean} isOver Over the video; else beside it. @param {number} opacity Over the video, 0 to 1. */
  place(isOver, opacity) {
    this.isOver = isOver;
    this.opacity = opacity;
    for (const { canvas, figure } of this.shown.values()) {
      if (isOver && canvas.parentElement !== this.screen) this.screen.append(canvas);
      else if (!isOver) figure.prepend(canvas);
      canvas.style.opacity = isOver ? String(opacity) : "";
    }
  }

  /** @param {number} frame */
  async show(frame) {
    this.frame = Math.min(frame, this.video.num_frames - 1);
    if (this.shown.size === 0) return;
    const decoded = await greyFrames(this.url, this.video.num_frames, this.video.fps);
    for (const [name, { canvas }] of this.shown) draw(canvas, this.#picture(name, decoded));
  }

  /** @param {string} name @param {import("./frames.js").GreyFrames} decoded */
  #picture(name, { width, height, frames }) {
    const place = `${name} ${this.frame}`;
    let picture = this.drawn.get(place);
    if (!picture) {
      const here = frames[this.frame];
      // the last frame has no next one: how it was reached is shown
      const [from, to] = this.frame + 1 < frames.length ? [here, frames[this.frame + 1]] : [frames.at(-2) ?? here, here];
      picture = name === "flow" ? flowPicture(flow(from, to, width, height), width, height)
        : canvasOf(spectrumImage(here, width, height));
      this.drawn.set(place, picture);
    }
    return picture;
  }
}

/** @param {ImageData} image */
function canvasOf(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  /** @type {any} */ (canvas.getContext("2d")).putImageData(image, 0, 0);
  return canvas;
}

/** @param {HTMLCanvasElement} canvas @param {OffscreenCanvas} picture */
function draw(canvas, picture) {
  if (canvas.width !== picture.width || canvas.height !== picture.height) {
    canvas.width = picture.width;
    canvas.height = picture.height;
  }
  canvas.getContext("2d")?.drawImage(picture, 0, 0);
}

function flowLegend() {
  const canvas = el("canvas", { class: "wheel", role: "img", "aria-label": "Colour wheel: red is to the right, " +
    "yellow-green down, cyan to the left, violet up; the stronger, the faster" });
  draw(canvas, canvasOf(wheelImage(64)));
  return el("span", { class: "legend" }, canvas, `direction; full colour from ${FULL_SPEED} px a frame`);
}
