/** One or more videos side by side under one set of controls. */

import { button, el, uniqueId } from "./dom.js";
import { OVERLAYS, Overlays } from "./overlays.js";
import { Transport } from "./transport.js";
import { file } from "./videos.js";

const RATES = [0.25, 0.5, 1, 2];
const NAMES = { spectrum: "Spectrum", flow: "Flow" };

/** @typedef {import("./videos.js").Video} Video */

export class Stage {
  /**
   * @param {Video[]} videos Completed ones, of one frame rate.
   * @param {(video: Video) => Node} caption Under each.
   */
  constructor(videos, caption) {
    this.videos = videos;
    this.transport = /** @type {Transport|null} */ (null);
    /** @type {Overlays[]} */
    this.overlays = [];
    /** Names of overlays that are asked for, also before the videos are here. @type {Set<"spectrum"|"flow">} */
    this.wanted = new Set();
    this.figures = el("div", { class: "figures" });
    this.element = el("div", { class: "stage", onkeydown: (/** @type {KeyboardEvent} */ event) => this.#onKey(event) },
      this.figures, this.#controls());
    this.ready = this.#fill(caption);
  }

  /** @param {(video: Video) => Node} caption */
  async #fill(caption) {
    const urls = await Promise.all(this.videos.map((video) => file(video.id)));
    const tracks = this.videos.map((video, place) => {
      const element = el("video", { src: urls[place], muted: true, playsinline: true, preload: "auto",
        "aria-label": `Synthetic video, ${video.label}, seed ${video.seed}` });
      const screen = el("div", { class: "screen" }, element, el("span", { class: "badge", text: "Synthetic" }));
      const overlays = new Overlays(urls[place], video, screen);
      this.overlays.push(overlays);
      for (const name of this.wanted) overlays.set(name, true).catch(() => {});
      this.figures.append(el("figure", { class: "clip" }, screen, overlays.element, el("figcaption", {}, caption(video))));
      return { element, numFrames: video.num_frames };
    });
    this.#placeOverlays();
    await Promise.all(tracks.map(({ element }) => loaded(element)));
    this.transport = new Transport(tracks, this.videos[0].fps);
    this.transport.addEventListener("frame", () => this.#onFrame());
    this.transport.addEventListener("state", () => this.#onState());
    this.slider.max = String(this.transport.numFrames - 1);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.transport.show(0);
    else this.transport.play();
  }

  #controls() {
    const act = (/** @type {(transport: Transport) => void} */ action) => () => this.transport && action(this.transport);
    this.playButton = button("Play", act((transport) => transport.toggle()), { class: "primary play" });
    this.slider = el("input", { type: "range", min: 0, max: 0, step: 1, value: "0", "aria-label": "Frame",
      oninput: () => this.transport?.show(Number(this.slider.value)) });
    this.counter = el("output", { class: "counter", text: "–" });
    const rate = el("select", { id: uniqueId("rate"),
      onchange: () => this.transport?.setRate(Number(rate.value)) },
      ...RATES.map((value) => el("option", { value: String(value), text: `${value}×`, selected: value === 1 })));
    const toggles = OVERLAYS.map((name) => {
      const box = el("input", { type: "checkbox", onchange: () => {
        if (box.checked) this.wanted.add(name);
        else this.wanted.delete(name);
        for (const overlay of this.overlays) overlay.set(name, box.checked).catch(() => {});
        this.#placeOverlays();
      } });
      return el("label", { class: "check" }, box, NAMES[name]);
    });
    this.where = el("select", { "aria-label": "Place of overlays", onchange: () => this.#placeOverlays() },
      el("option", { value: "over", text: "over the video" }), el("option", { value: "beside", text: "beside it" }));
    this.opacity = el("input", { type: "range", min: 0, max: 100, step: 5, value: "70", oninput: () => this.#placeOverlays() });
    this.strength = el("label", { class: "check strength" }, "Opacity", this.opacity);
    this.placing = el("span", { class: "row", hidden: true }, this.where, this.strength);
    return el("div", { class: "transport", role: "group", "aria-label": "Playback" },
      el("div", { class: "row" },
        button("‹", act((transport) => transport.step(-1)), { "aria-label": "Frame back", title: "Frame back (,)" }),
        this.playButton,
        button("›", act((transport) => transport.step(1)), { "aria-label": "Frame on", title: "Frame on (.)" }),
        this.slider, this.counter),
      el("div", { class: "row" },
        el("label", { class: "check" }, "Speed", rate), ...toggles, this.placing));
  }

  #placeOverlays() {
    const isOver = this.where.value === "over";
    this.placing.hidden = this.wanted.size === 0;
    this.strength.hidden = !isOver;
    this.element.classList.toggle("computes", this.wanted.size > 0 && !isOver);
    for (const overlay of this.overlays) overlay.place(isOver, Number(this.opacity.value) / 100);
  }

  #onFrame() {
    const transport = /** @type {Transport} */ (this.transport);
    this.slider.value = String(transport.frame);
    this.slider.setAttribute("aria-valuetext", `${transport.frame + 1} of ${transport.numFrames}`);
    this.counter.textContent = `${transport.frame + 1} / ${transport.numFrames}`;
    for (const overlay of this.overlays) overlay.show(transport.frame).catch(() => {});
  }

  #onState() {
    this.playButton.textContent = this.transport?.isPlaying ? "Pause" : "Play";
  }

  /** Space plays, comma and full stop go by a frame, as in many players. @param {KeyboardEvent} event */
  #onKey(event) {
    const target = /** @type {HTMLElement} */ (event.target);
    if (!this.transport || event.ctrlKey || event.metaKey || event.altKey || target.matches("select, input[type=text]")) return;
    if (event.key === ",") this.transport.step(-1);
    else if (event.key === ".") this.transport.step(1);
    else if (event.key === "k") this.transport.toggle();
    else return;
    event.preventDefault();
  }

  /** Stop everything. */
  end() {
    this.transport?.end();
  }
}

/** @param {HTMLVideoElement} video */
function loaded(video) {
  if (video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA) return null;
  return new Promise((resolve, reject) => {
    video.addEventListener("loadeddata", resolve, { once: true });
    video.addEventListener("error", () => reject(new Error("This browser cannot decode the video.")), { once: true });
  });
}
