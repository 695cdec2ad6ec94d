/** Making elements. Text is only ever text: nothing here reads HTML. */

/**
 * @param {string} tag
 * @param {Record<string, any>} [properties] Attributes; `on...` are listeners; `class`, `text` and `dataset` as one
 *   expects; false, null and undefined are left out, true is an empty attribute.
 * @param {...(Node|string|null|undefined|false)} children
 * @returns {any}
 */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (["value", "checked", "muted", "htmlFor"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * A table that scrolls by itself where it is too wide.
 *
 * @param {string[]} titles Of its columns.
 * @param {(string|(string|Node)[])[][]} rows Cells, each a text or what is in it; the first names its row.
 * @param {string} [caption] Of a table of fields; else the first title tells what it is of.
 */
export function table(titles, rows, caption) {
  const cell = (/** @type {string} */ tag, /** @type {string|(string|Node)[]} */ content, properties = {}) =>
    el(tag, properties, ...(typeof content === "string" ? [content] : content));
  return el("div", { class: "scrolls", tabindex: 0, role: "group", "aria-label": caption ?? titles[0] },
    el("table", { class: caption && "fields" }, caption && el("caption", { text: caption }),
      el("thead", {}, el("tr", {}, ...titles.map((text) => el("th", { scope: "col", text })))),
      el("tbody", {}, ...rows.map(([first, ...rest]) =>
        el("tr", {}, cell("th", first, { scope: "row" }), ...rest.map((one) => cell("td", one)))))));
}

let lastId = 0;

/** An id that no other element of the page has. @param {string} name */
export function uniqueId(name) {
  lastId += 1;
  return `${name}-${lastId}`;
}

/**
 * A label with its control, a hint and a place for what is wrong.
 *
 * @param {string} title
 * @param {HTMLElement & {id: string}} control
 * @param {string|Node} [hint]
 */
export function field(title, control, hint = "") {
  control.id ||= uniqueId("field");
  const about = el("p", { class: "hint", id: `${control.id}-hint` }, hint);
  const wrong = el("p", { class: "wrong", id: `${control.id}-wrong`, hidden: true });
  control.setAttribute("aria-describedby", `${about.id} ${wrong.id}`);
  const box = el("div", { class: "field" }, el("label", { htmlFor: control.id, text: title }), control, about, wrong);
  return Object.assign(box, {
    control,
    /** @param {string|Node} text */
    setHint: (text) => about.replaceChildren(text),
    /** @param {string} text Empty: nothing is wrong. */
    setWrong: (text) => {
      wrong.textContent = text;
      wrong.hidden = !text;
      if (text) control.setAttribute("aria-invalid", "true");
      else control.removeAttribute("aria-invalid");
    },
  });
}

/** A button of text. @param {string} text @param {(event: Event) => void} onclick @param {object} [more] */
export function button(text, onclick, more = {}) {
  return el("button", { type: "button", onclick, ...more }, text);
}

/** Tell everybody, those who do not see it too. @param {string} text @param {"info"|"wrong"} [kind] */
export function tell(text, kind = "info") {
  const place = /** @type {HTMLElement} */ (document.getElementById(kind === "wrong" ? "alerts" : "notes"));
  const note = el("div", { class: `note ${kind}` }, el("span", { text }),
    button("Dismiss", () => note.remove(), { class: "quiet" }));
  place.replaceChildren(note);
  if (kind === "info") setTimeout(() => note.remove(), 8000);
}

/** What went wrong, with when to try again where the server said it. @param {any} error */
export function problemText(error) {
  if (!error.retryAfterS) return error.message;
  const when = error.retryAfterS < 120 ? `${error.retryAfterS} s` : span(error.retryAfterS);
  return `${error.message} Try again in ${when}.`;
}

/** Seconds in words, such as "4 min". @param {number} seconds */
export function span(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

/** Bytes in words, such as "1.2 MB". @param {number} bytes */
export function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  const step = Math.min(units.length - 1, bytes < 1000 ? 0 : Math.floor(Math.log10(bytes) / 3));
  return `${step ? (bytes / 1000 ** step).toFixed(1) : bytes} ${units[step]}`;
}

/** Ask before something is done for good. @param {string} question @param {string} action @returns {Promise<boolean>} */
export function confirmed(question, action) {
  return new Promise((resolve) => {
    const dialog = el("dialog", { class: "small", "aria-label": question },
      el("p", { text: question }),
      el("div", { class: "row end" },
        button("Keep", () => dialog.close(), { class: "quiet" }),
        button(action, () => dialog.close("yes"), { class: "danger" })));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
