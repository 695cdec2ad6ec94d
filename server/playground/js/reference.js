/** Every endpoint of this server with a form to try it, and every object, from its own OpenAPI document. */

import { get } from "./api.js";
import { button, el, field, problemText, table } from "./dom.js";
import { fieldsTable, nameOf, plain, typeOf } from "./schemas.js";
import { trialForm } from "./trial.js";

/** @typedef {Record<string, any>} Schema */

const FIRST = ["videos", "events", "files", "batches", "datasets", "webhooks", "models", "usage", "health"];

/** @param {HTMLElement} place @param {URLSearchParams} query `at`: id of an operation, or name of an object. */
export function showReference(place, query) {
  const body = el("div", { class: "reference" });
  place.append(el("h1", { tabindex: -1, text: "API" }), body);
  const load = () => get("/openapi.json").then((document) => fill(body, document, query.get("at") ?? "")).catch((error) => {
    body.replaceChildren(el("p", { class: "wrong", role: "alert", text: problemText(error) }), button("Try again", load));
  });
  load();
  return () => {};
}

/** @param {HTMLElement} body @param {Schema} document @param {string} at */
function fill(body, document, at) {
  const schemas = document.components.schemas;
  const resolve = (/** @type {string} */ reference) => schemas[nameOf(reference)];
  /** @type {Record<string, HTMLDetailsElement[]>} */
  const groups = Object.fromEntries(FIRST.map((tag) => [tag, []]));
  for (const [path, operations] of Object.entries(document.paths)) {
    for (const [method, operation] of Object.entries(/** @type {Schema} */ (operations))) {
      (groups[operation.tags?.[0] ?? "other"] ??= []).push(endpoint(method, path, operation, resolve));
    }
  }
  groups.objects = Object.keys(schemas).sort().map((name) => object(name, schemas[name]));
  const sections = Object.entries(groups).filter(([, parts]) => parts.length).map(([name, parts]) =>
    el("section", { "aria-labelledby": `group-${name}` }, el("h2", { id: `group-${name}`, text: titleOf(name) }), ...parts));
  const none = el("p", { class: "empty", text: "Nothing here has these words.", hidden: true });
  const find = field("Find", el("input", { type: "search", spellcheck: "false", oninput: () => filter(sections, none, find.control.value) }),
    "Words of a path, a description or an object.");
  body.replaceChildren(
    el("p", {}, `${document.info.title} ${document.info.version}. `, "Open an endpoint to read what it takes and answers, and to try it on this server. " +
      "Where keys are in use, the one given above is sent along. For programs the same is at ",
    el("a", { href: "/openapi.json", text: "/openapi.json" }), "."),
    find, ...sections, none);
  body.addEventListener("click", (event) => {
    const link = /** @type {HTMLElement} */ (event.target).closest("[data-at]");
    if (!link) return;
    event.preventDefault(); // what is filled in elsewhere on this page stays
    find.control.value = "";
    filter(sections, none, "");
    goTo(/** @type {string} */ (/** @type {HTMLElement} */ (link).dataset.at));
  });
  if (at) goTo(at);
}

/** Open a part and go there. @param {string} name Id of an operation, or name of an object. */
function goTo(name) {
  const part = /** @type {HTMLDetailsElement|null} */ (document.getElementById(`part-${name}`));
  if (!part) return;
  part.open = true;
  part.scrollIntoView();
  part.querySelector("summary")?.focus();
}

/** @param {HTMLElement[]} sections @param {HTMLElement} none @param {string} text */
function filter(sections, none, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const section of sections) {
    const parts = [...section.querySelectorAll("details")];
    for (const part of parts) part.hidden = !words.every((word) => part.dataset.words?.includes(word));
    section.hidden = parts.every((part) => part.hidden);
  }
  none.hidden = sections.some((section) => !section.hidden);
}

/**
 * A part that is filled in when it is opened.
 *
 * @param {string} name @param {string} words To be found by. @param {Node[]} head @param {() => Node} make
 */
function folded(name, words, head, make) {
  const part = el("details", { class: "part", id: `part-${name}`, dataset: { words: `${name} ${words}`.toLowerCase() },
    ontoggle: () => {
      if (!part.open) return;
      if (part.childElementCount === 1) part.append(make());
      history.replaceState(null, "", `#/reference?at=${name}`);
    } }, el("summary", {}, ...head));
  return part;
}

/** @param {string} method @param {string} path @param {Schema} operation @param {(reference: string) => Schema} resolve */
function endpoint(method, path, operation, resolve) {
  const [first, ...rest] = plain(operation.description ?? operation.summary).split("\n\n");
  const head = [el("span", { class: `method ${method}`, text: method.toUpperCase() }), el("code", { text: path }),
    el("span", { class: "hint", text: first })];
  return folded(operation.operationId, `${method} ${path} ${first}`, head, () => el("div", { class: "part-body tried" },
    el("div", {}, ...rest.map((text) => el("p", { text })), ...bodyTables(operation.requestBody), answers(operation.responses)),
    el("div", {}, el("h3", { text: "Try it" }), trialForm(method, path, operation, resolve))));
}

/** @param {Schema|undefined} body */
function bodyTables(body) {
  if (!body) return [];
  const kinds = Object.keys(body.content);
  const { schema } = body.content[kinds[kinds.length - 1]];
  const caption = `Body, as ${kinds.join(" or ")}`;
  return schema.properties ? [fieldsTable(schema, caption)] : [el("p", {}, `${caption}: `, ...typeOf(schema))];
}

/** @param {Schema} responses */
function answers(responses) {
  const rows = Object.entries(responses).sort().map(([status, { description, content = {} }]) => {
    const kinds = Object.entries(content).map(([kind, { schema }]) => (schema && /json/.test(kind) ? typeOf(schema) : [kind]));
    return [status, description, kinds.length ? kinds.flatMap((one, place) => (place ? [", ", ...one] : one)) : "without a body"];
  });
  return table(["Status", "When", "Body"], rows, "Answers");
}

/** @param {string} name @param {Schema} schema */
function object(name, schema) {
  const about = plain(schema.description);
  const head = [el("code", { text: name }), el("span", { class: "hint", text: about.split("\n\n")[0] })];
  return folded(name, about, head, () => el("div", { class: "part-body" },
    ...about.split("\n\n").slice(1).map((text) => el("p", { text })),
    schema.properties ? fieldsTable(schema, `Fields of ${name}`) : el("p", {}, ...typeOf(schema))));
}

/** @param {string} tag */
function titleOf(tag) {
  return tag === "health" ? "Health and metrics" : tag[0].toUpperCase() + tag.slice(1);
}
