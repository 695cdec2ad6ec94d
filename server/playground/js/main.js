/** The page as a whole: which part is shown, the key, and what the server tells. */

import { key } from "./api.js";
import { showCompare } from "./compare.js";
import { showCreate } from "./create.js";
import { showDatasets } from "./datasets.js";
import { el } from "./dom.js";
import { follow } from "./events.js";
import { askForKey } from "./key_dialog.js";
import { forgetModels } from "./models.js";
import { showReference } from "./reference.js";
import { showStatus } from "./status.js";
import { forgetAll, heard, page } from "./videos.js";

const PAGES = {
  "/": showCreate, "/compare": showCompare, "/datasets": showDatasets, "/status": showStatus, "/reference": showReference,
};
const news = new EventTarget();
const main = /** @type {HTMLElement} */ (document.querySelector("main"));
const connection = /** @type {HTMLElement} */ (document.getElementById("connection"));
const keyButton = /** @type {HTMLElement} */ (document.getElementById("key"));
/** @type {() => void} */
let leave = () => {};
/** @type {() => void} */
let stopFollowing = () => {};

/** Show the part that the address names. @param {boolean} isFirst */
function show(isFirst) {
  const [path, query] = (location.hash.slice(1) || "/").split("?");
  const open = PAGES[path] ?? showCreate;
  leave();
  main.replaceChildren();
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#${path}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const place = el("div", {});
  main.append(place);
  leave = open(place, new URLSearchParams(query), news);
  const title = place.querySelector("h1");
  document.title = `${title?.textContent ?? "Create"} · MedSora playground`;
  if (!isFirst) title?.focus();
}

/** The server answers again: what was filled in stays, and what happened meanwhile is asked for. */
function comeBack() {
  if (main.querySelector("form, .stage, .panels")) page().catch(() => {});
  else show(true);
}

function listen() {
  stopFollowing();
  stopFollowing = follow((kind, data) => {
    if (kind.startsWith("video.")) heard(kind, data);
    else if (kind.startsWith("dataset.")) news.dispatchEvent(new CustomEvent("dataset", { detail: data.id }));
  }, (isConnected) => {
    if (isConnected && connection.dataset.state === "lost") comeBack();
    connection.dataset.state = isConnected ? "live" : "lost";
    connection.textContent = isConnected ? "Live" : "Connection lost. Trying again…";
  });
}

/** Another key, another tenant: begin anew. */
function onKey() {
  keyButton.textContent = key() ? "Key set" : "Key";
  forgetAll();
  forgetModels();
  listen();
  show(true);
}

// the address tells the part that is shown, so this link must not change it
document.querySelector(".skip")?.addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
keyButton.addEventListener("click", () => askForKey("", onKey));
addEventListener("key-needed", (event) => askForKey(/** @type {CustomEvent} */ (event).detail, onKey));
addEventListener("hashchange", () => show(false));
keyButton.textContent = key() ? "Key set" : "Key";
listen();
show(true);
