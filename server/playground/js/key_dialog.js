/** Asks for a key, on servers that need one. It stays in this tab, and is gone with it. */

import { key, setKey } from "./api.js";
import { button, el, field } from "./dom.js";

/** @type {any} */
let open = null;

/** @param {string} why @param {() => void} onChange */
export function askForKey(why, onChange) {
  if (open) return;
  const box = field("Key", el("input", { type: "password", autocomplete: "off", spellcheck: "false", placeholder: "medsora_…" }),
    "Kept in this tab until it is closed. `medsora-server keys create` makes one.");
  const keep = () => {
    setKey(box.control.value.trim());
    open.close();
    onChange();
  };
  open = el("dialog", { class: "small", "aria-label": "Key" },
    el("form", { onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); keep(); } },
      el("h2", { text: "Key" }), why ? el("p", { class: "wrong", role: "alert", text: why }) : null, box,
      el("div", { class: "row end" },
        key() ? button("Forget the key", () => { setKey(""); open.close(); onChange(); }, { class: "quiet" })
          : button("Not now", () => open.close(), { class: "quiet" }),
        el("button", { type: "submit", class: "primary", text: "Use this key" }))));
  open.addEventListener("close", () => {
    open.remove();
    open = null;
  });
  document.body.append(open);
  open.showModal();
  box.control.focus();
}
