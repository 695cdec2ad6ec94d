/** One dataset: how far it is, what is in it, and its download. */

import { ask, get, key, post, remove } from "./api.js";
import { button, confirmed, el, problemText, tell } from "./dom.js";
import { save } from "./downloads.js";

const ENDED = ["completed", "cancelled", "failed"];
const SHEET = 24;

export class DatasetCard {
  /** @param {any} dataset @param {(id: string) => void} onRemoved */
  constructor(dataset, onRemoved) {
    this.onRemoved = onRemoved;
    this.state = el("p", { class: "hint state" });
    this.bar = el("progress", { max: 100, "aria-label": `Progress of ${dataset.name}` });
    this.rows = el("tbody", {});
    this.sheet = el("ul", { class: "sheet", "aria-label": "Contact sheet" });
    this.foot = el("div", { class: "row" });
    this.element = el("li", { class: "panel dataset", dataset: { id: dataset.id } },
      el("h3", { text: dataset.name }), this.state, this.bar,
      el("table", { class: "counts" }, el("caption", { class: "away", text: "Clips by label" }),
        el("thead", {}, el("tr", {}, ...["Label", "Done", "Being made", "Missing", "Asked for"].map((text) => el("th", { scope: "col", text })))),
        this.rows),
      this.sheet, this.foot);
    /** Urls of thumbnails by video. @type {Map<string, string>} */
    this.thumbnails = new Map();
    this.show(dataset);
  }

  /** @param {any} dataset */
  show(dataset) {
    this.dataset = dataset;
    const { counts, dropped } = dataset;
    const lost = Object.entries(dropped).map(([code, count]) => `${count} ${code.replaceAll("_", " ")}`).join(", ");
    this.element.dataset.status = dataset.status;
    this.state.textContent = `${dataset.status.replaceAll("_", " ")}: ${counts.done} of ${counts.total} clips · ${dataset.format} · ` +
      `seed ${dataset.seed} · ${dataset.model}${lost ? ` · tried in vain: ${lost}` : ""}`;
    this.bar.value = dataset.progress;
    this.rows.replaceChildren(...dataset.labels.map((/** @type {any} */ { name, counts: of }) => el("tr", {},
      el("th", { scope: "row", text: name }),
      ...[of.done, of.queued + of.running, of.missing, of.total].map((value) => el("td", { text: String(value) })))));
    const isOver = ENDED.includes(dataset.status);
    this.bar.hidden = isOver;
    this.foot.replaceChildren(
      ...(counts.done ? ["zip", "tar"].map((container) => this.#download(container)) : []),
      ...(isOver ? [] : [button("Cancel", () => this.#act(() => post(`/v1/datasets/${dataset.id}/cancel`)))]),
      button("Delete", async () => {
        if (!(await confirmed("Delete this dataset and its clips for good?", "Delete"))) return;
        await this.#act(() => remove(`/v1/datasets/${dataset.id}`), false);
      }, { class: "danger" }));
    if (counts.done > this.thumbnails.size && this.thumbnails.size < SHEET) this.#fillSheet();
  }

  /** Without a key it is a plain link, which the browser writes straight to the disk. @param {string} container */
  #download(container) {
    const path = `/v1/datasets/${this.dataset.id}/content?format=${container}`;
    const text = `Download ${container.toUpperCase()}`;
    return key() ? button(text, () => save(path)) : el("a", { class: "button", href: path, download: true, text });
  }

  async refresh() {
    try {
      this.show(await get(`/v1/datasets/${this.dataset.id}`));
    } catch (error) {
      if (error.status === 404) this.end();
      else tell(problemText(error), "wrong");
    }
  }

  /** @param {() => Promise<any>} action */
  async #act(action, isThere = true) {
    try {
      await action();
      if (isThere) await this.refresh();
      else this.end();
    } catch (error) {
      tell(problemText(error), "wrong");
    }
  }

  async #fillSheet() {
    if (this.isFilling) return;
    this.isFilling = true;
    try {
      const { data } = await get(`/v1/datasets/${this.dataset.id}/clips?limit=200`);
      const done = data.filter((/** @type {any} */ clip) => clip.state === "done" && !this.thumbnails.has(clip.video_id));
      for (const clip of done.slice(0, SHEET - this.thumbnails.size)) {
        const answer = await ask(`/v1/videos/${clip.video_id}/content?variant=thumbnail`);
        const url = URL.createObjectURL(await answer.blob());
        this.thumbnails.set(clip.video_id, url);
        this.sheet.append(el("li", {}, el("img", { src: url, alt: `Synthetic clip ${clip.number}, ${clip.label}`, loading: "lazy" }),
          el("span", { text: clip.label })));
      }
    } catch {
      // deleted meanwhile: the next look at the dataset says so
    } finally {
      this.isFilling = false;
    }
  }

  /** Gone from the page. */
  end() {
    for (const url of this.thumbnails.values()) URL.revokeObjectURL(url);
    this.element.remove();
    this.onRemoved(this.dataset.id);
  }
}
