/** The page of datasets: many labelled clips as one download. */

import { get } from "./api.js";
import { DatasetCard } from "./dataset_card.js";
import { DatasetForm } from "./dataset_form.js";
import { el, problemText, tell } from "./dom.js";
import { models } from "./models.js";
import { page } from "./videos.js";

/** @param {HTMLElement} place @param {URLSearchParams} _query @param {EventTarget} news Dispatches `dataset` (detail: id). */
export function showDatasets(place, _query, news) {
  /** @type {Map<string, DatasetCard>} */
  const cards = new Map();
  const list = el("ul", { class: "datasets" });
  const empty = el("p", { class: "empty", hidden: true, text: "No datasets yet." });
  const side = el("div", {}, el("p", { class: "hint", text: "Asking the server for its checkpoints…" }));
  const ending = new AbortController();
  place.append(el("h1", { tabindex: -1, text: "Datasets" }),
    el("div", { class: "create" }, el("section", { class: "side", "aria-label": "New dataset" }, side),
      el("section", { "aria-labelledby": "datasets-title" }, el("h2", { id: "datasets-title", text: "Your datasets" }), list, empty)));

  /** @param {any} dataset @param {boolean} isNew */
  function add(dataset, isNew) {
    const card = new DatasetCard(dataset, (id) => {
      cards.delete(id);
      empty.hidden = cards.size > 0;
    });
    cards.set(dataset.id, card);
    if (isNew) list.prepend(card.element);
    else list.append(card.element);
    empty.hidden = true;
  }

  news.addEventListener("dataset", (event) => {
    cards.get(/** @type {CustomEvent} */ (event).detail)?.refresh();
  }, { signal: ending.signal });
  models().then((found) => {
    const form = new DatasetForm(found, (dataset) => add(dataset, true));
    side.replaceWith(form.element);
    return page().then(() => form.refresh());
  }).catch((error) => side.replaceChildren(el("p", { class: "wrong", role: "alert", text: problemText(error) })));
  get("/v1/datasets?limit=50").then(({ data }) => {
    for (const dataset of data) if (!cards.has(dataset.id)) add(dataset, false);
    empty.hidden = cards.size > 0;
  }).catch((error) => tell(problemText(error), "wrong"));
  return () => {
    ending.abort();
    for (const card of [...cards.values()]) card.end();
  };
}
