/** Pictures computed of the frame that is shown: its spectrum, and the motion to the next one. */

import { el } from "./dom.js";
import { FULL_SPEED, flow, flowImage, wheelImage } from "./flow.js";
import { greyFrames } from "./frames.js";
import { spectrumImage } from "./spectrum.js";

export const OVERLAYS = /** @type {const} */ (["spectrum", "flow"]);
const TITLES = { spectrum: "Spectrum", flow: "Flow" };

/** Canvases of one video, drawn for a frame when they are asked for. */
export class Overlays {
  /** @param {string} url @param {import("./videos.js").Video} video */
  constructor(url, video) {
    this.url = url;
    this.video = video;
    this.element = el("div", { class: "overlays", hidden: true });
    /** @type {Map<string, HTMLCanvasElement>} */
    this.canvases = new Map();
    /** @type {Map<string, ImageData>} */
    this.drawn = new Map();
    this.frame = 0;
  }

  /** @param {"spectrum"|"flow"} name @param {boolean} isOn */
  set(name, isOn) {
    this.canvases.get(name)?.closest("figure")?.remove();
    this.canvases.delete(name);
    if (isOn) {
      const canvas = el("canvas", { class: name, role: "img", "aria-label": `${TITLES[name]} of the frame that is shown` });
      const legend = name === "flow" ? flowLegend() : el("span", { text: "80 dB, zero frequency amid" });
      this.element.append(el("figure", { class: "overlay" }, canvas,
        el("figcaption", {}, el("strong", { text: TITLES[name] }), legend)));
      this.canvases.set(name, canvas);
    }
    this.element.hidden = this.canvases.size === 0;
    return this.show(this.frame);
  }

  /** @param {number} frame */
  async show(frame) {
    this.frame = Math.min(frame, this.video.num_frames - 1);
    if (this.canvases.size === 0) return;
    const decoded = await greyFrames(this.url, this.video.num_frames, this.video.fps);
    for (const [name, canvas] of this.canvases) draw(canvas, this.#image(name, decoded));
  }

  /** @param {string} name @param {import("./frames.js").GreyFrames} decoded */
  #image(name, { width, height, frames }) {
    const place = `${name} ${this.frame}`;
    let image = this.drawn.get(place);
    if (!image) {
      const here = frames[this.frame];
      // the last frame has no next one: how it was reached is shown
      const [from, to] = this.frame + 1 < frames.length ? [here, frames[this.frame + 1]] : [frames.at(-2) ?? here, here];
      image = name === "flow" ? flowImage(flow(from, to, width, height)) : spectrumImage(here, width, height);
      this.drawn.set(place, image);
    }
    return image;
  }
}

/** @param {HTMLCanvasElement} canvas @param {ImageData} image */
function draw(canvas, image) {
  if (canvas.width !== image.width || canvas.height !== image.height) {
    canvas.width = image.width;
    canvas.height = image.height;
  }
  canvas.getContext("2d")?.putImageData(image, 0, 0);
}

function flowLegend() {
  const canvas = el("canvas", { class: "wheel", role: "img", "aria-label": "Colour wheel: red is to the right, " +
    "yellow-green down, cyan to the left, violet up; the stronger, the faster" });
  draw(canvas, wheelImage(64));
  return el("span", { class: "legend" }, canvas, `direction; full colour from ${FULL_SPEED} px a frame`);
}
