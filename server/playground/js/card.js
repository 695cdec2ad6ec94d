/** One video in the gallery, whatever state it is in. */

import { button, confirmed, el, problemText, tell } from "./dom.js";
import { discard, file } from "./videos.js";

const WORDS = { queued: "In the queue", in_progress: "Being made", completed: "Finished", failed: "Failed" };
const mayMove = matchMedia("(prefers-reduced-motion: no-preference)");

/** Clips play while they are seen, and only then. */
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const card = cards.get(target);
    if (card) card.onSeen(isIntersecting);
  }
}, { rootMargin: "100px" });
/** @type {WeakMap<Element, Card>} */
const cards = new WeakMap();

export class Card {
  /**
   * @param {import("./videos.js").Video} video
   * @param {{open: (video: any) => void, mark: (id: string, isMarked: boolean) => void}} actions
   */
  constructor(video, actions) {
    this.video = video;
    this.actions = actions;
    this.screen = el("div", { class: "screen" });
    this.title = el("h3", {});
    this.state = el("p", { class: "hint state" });
    this.bar = el("progress", { max: 100, "aria-label": `Progress of ${video.label}, seed ${video.seed}` });
    this.foot = el("div", { class: "row between" });
    this.element = el("li", { class: "card", dataset: { id: video.id } },
      this.screen, el("div", { class: "card-text" }, this.title, this.state, this.bar, this.foot));
    this.isSeen = false;
    this.shown = "";
    cards.set(this.element, this);
    watcher.observe(this.element);
    this.show(video);
  }

  /** @param {import("./videos.js").Video} video */
  show(video) {
    this.video = video;
    this.title.textContent = video.label;
    this.state.textContent = this.#words();
    this.bar.hidden = video.status !== "in_progress";
    this.bar.value = video.progress;
    if (this.shown !== video.status) {
      this.shown = video.status;
      this.element.dataset.status = video.status;
      this.#fillFoot();
      this.#fillScreen();
    }
    if (video.preview && video.status === "in_progress") this.#showPreview(video.preview);
  }

  #words() {
    const { video } = this;
    const what = `seed ${video.seed}, ${video.num_inference_steps} steps`;
    if (video.status === "queued" && video.queue_position) return `Place ${video.queue_position} in the queue · ${what}`;
    if (video.status === "in_progress" && video.steps_done) return `Step ${video.steps_done} of ${video.num_inference_steps} · seed ${video.seed}`;
    if (video.status === "failed") return video.error?.message ?? WORDS.failed;
    return `${WORDS[video.status]} · ${what}`;
  }

  #fillFoot() {
    const { video } = this;
    const isDone = video.status === "completed";
    const isOver = isDone || video.status === "failed";
    const mark = el("input", { type: "checkbox", onchange: () => this.actions.mark(video.id, mark.checked) });
    this.mark = mark;
    this.foot.replaceChildren(
      isDone ? el("label", { class: "check" }, mark, "Compare") : el("span", {}),
      button(isOver ? "Delete" : "Cancel", () => this.#discard(isOver), { class: "quiet",
        "aria-label": `${isOver ? "Delete" : "Cancel"} ${video.label}, seed ${video.seed}` }));
  }

  #fillScreen() {
    const badge = el("span", { class: "badge", text: "Synthetic" });
    if (this.video.status !== "completed") {
      this.screen.replaceChildren(el("span", { class: "waiting", text: this.video.status === "failed" ? "No video" : "" }), badge);
      return;
    }
    this.clip = el("video", { muted: true, loop: true, playsinline: true, preload: "auto", tabindex: -1, "aria-hidden": "true" });
    const open = el("button", { type: "button", class: "open", onclick: () => this.actions.open(this.video),
      "aria-label": `Open synthetic video ${this.video.label}, seed ${this.video.seed}`,
      onpointerenter: () => this.#play(), onfocus: () => this.#play() }, this.clip);
    this.screen.replaceChildren(open, badge);
    if (this.isSeen) this.onSeen(true);
  }

  /** @param {string} picture A data: address. */
  #showPreview(picture) {
    let image = this.screen.querySelector("img");
    if (!image) {
      image = el("img", { alt: "Running estimate of the video" });
      this.screen.querySelector(".waiting")?.replaceWith(image);
    }
    image.src = picture;
  }

  /** @param {boolean} isSeen */
  async onSeen(isSeen) {
    this.isSeen = isSeen;
    const { clip } = this;
    if (!clip) return;
    if (!isSeen) return clip.pause();
    try {
      if (!clip.src) clip.src = await file(this.video.id);
      if (mayMove.matches && this.isSeen) this.#play();
    } catch (error) {
      this.state.textContent = problemText(error);
    }
  }

  #play() {
    this.clip?.play().catch(() => {});
  }

  /** @param {boolean} isOver */
  async #discard(isOver) {
    const { video } = this;
    if (isOver && video.status === "completed" && !(await confirmed("Delete this video and its files for good?", "Delete"))) return;
    await discard(video.id).catch((error) => tell(problemText(error), "wrong"));
  }

  /** Gone from the page. */
  end() {
    watcher.unobserve(this.element);
    this.clip?.pause();
    this.element.remove();
  }
}
