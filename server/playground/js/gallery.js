/** One's videos, newest first; those that are marked can be compared. */

import { Card } from "./card.js";
import { MOST } from "./compare.js";
import { button, el, problemText, tell } from "./dom.js";
import { changes, page } from "./videos.js";

export class Gallery {
  /** @param {(video: import("./videos.js").Video) => void} open */
  constructor(open) {
    this.open = open;
    /** @type {Map<string, Card>} */
    this.cards = new Map();
    /** @type {Set<string>} */
    this.marked = new Set();
    this.list = el("ul", { class: "cards" });
    this.empty = el("p", { class: "empty", hidden: true, text: "No videos yet. Choose a label and press Generate." });
    this.more = button("Show more", () => this.#load(), { hidden: true });
    this.link = el("a", { class: "button primary", href: "#/compare", text: "Compare" });
    this.bar = el("div", { class: "marked", role: "status", hidden: true });
    this.element = el("section", { class: "gallery", "aria-labelledby": "gallery-title" },
      el("h2", { id: "gallery-title", text: "Your videos" }), this.bar, this.list, this.empty,
      el("div", { class: "row" }, this.more));
    this.last = "";
    this.ending = new AbortController();
    const { signal } = this.ending;
    changes.addEventListener("change", (event) => this.#onChange(/** @type {CustomEvent} */ (event).detail), { signal });
    changes.addEventListener("removed", (event) => this.#onRemoved(/** @type {CustomEvent} */ (event).detail), { signal });
    this.#load();
  }

  async #load() {
    try {
      const found = await page(this.last);
      this.last = found.last ?? this.last;
      this.more.hidden = !found.hasMore;
      this.empty.hidden = this.cards.size > 0;
    } catch (error) {
      tell(problemText(error), "wrong");
    }
  }

  /** @param {any} video */
  #onChange(video) {
    const card = this.cards.get(video.id);
    if (card) return card.show(video);
    const made = new Card(video, { open: this.open, mark: (id, isMarked) => this.#mark(id, isMarked) });
    this.cards.set(video.id, made);
    const older = [...this.cards.values()]
      .filter((other) => other !== made && other.video.created_at < video.created_at)
      .sort((one, other) => other.video.created_at - one.video.created_at)[0];
    this.list.insertBefore(made.element, older?.element ?? null);
    this.empty.hidden = true;
  }

  /** @param {string} id */
  #onRemoved(id) {
    this.cards.get(id)?.end();
    this.cards.delete(id);
    this.#mark(id, false);
    this.empty.hidden = this.cards.size > 0;
  }

  /** @param {string} id @param {boolean} isMarked */
  #mark(id, isMarked) {
    if (isMarked) this.marked.add(id);
    else this.marked.delete(id);
    const count = this.marked.size;
    this.bar.hidden = count === 0;
    this.link.href = `#/compare?ids=${[...this.marked].join(",")}`;
    const tooMany = count > MOST ? ` At most ${MOST} can be compared.` : count < 2 ? " Mark another one to compare." : "";
    this.bar.replaceChildren(`${count} marked.${tooMany} `, ...(count >= 2 && count <= MOST ? [this.link] : []));
  }

  end() {
    this.ending.abort();
    for (const card of this.cards.values()) card.end();
  }
}
