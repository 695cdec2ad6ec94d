/** The first page: a form, and what came of it. */

import { el, problemText } from "./dom.js";
import { Gallery } from "./gallery.js";
import { models } from "./models.js";
import { OrderForm } from "./order_form.js";
import { openViewer } from "./viewer.js";

/** @param {HTMLElement} place @returns {() => void} */
export function showCreate(place) {
  const side = el("div", {}, el("p", { class: "hint", text: "Asking the server for its checkpoints…" }));
  /** @type {OrderForm|null} */
  let form = null;
  const gallery = new Gallery((video) => openViewer(video, (chosen) => form?.take(chosen)));
  place.append(el("h1", { class: "away", tabindex: -1, text: "Create" }),
    el("div", { class: "create" }, el("section", { class: "side", "aria-label": "New video" }, side), gallery.element));
  models().then((found) => {
    form = new OrderForm(found);
    side.replaceWith(form.element);
  }).catch((error) => side.replaceChildren(el("p", { class: "wrong", role: "alert", text: problemText(error) })));
  return () => gallery.end();
}
