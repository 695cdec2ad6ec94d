/** One endpoint, tried: a form for what it takes, the same request for a terminal, and what the server answered. */

import { ApiError, format, key, parse, send } from "./api.js";
import { copied } from "./code_dialog.js";
import { button, el, field, size } from "./dom.js";
import { exampleOf, isFile, meaning } from "./schemas.js";
import { shell } from "./snippets.js";

const MOST_SHOWN = 200_000; // characters of an answer

/** @typedef {Record<string, any>} Schema */
/** @typedef {{box: any, name: string, place: string, isNeeded: boolean}} Input */

/**
 * @param {string} method
 * @param {string} path With names of parameters in braces.
 * @param {Schema} operation Of the OpenAPI document.
 * @param {(reference: string) => Schema} resolve
 */
export function trialForm(method, path, operation, resolve) {
  const parameters = (operation.parameters ?? []).map(parameterInput);
  const isHeader = (/** @type {Input} */ one) => one.place === "header";
  const inputs = [...parameters.filter((/** @type {Input} */ one) => !isHeader(one)), ...bodyInputs(operation.requestBody, resolve),
    ...parameters.filter(isHeader)];
  const answer = el("div", { class: "answer", role: "status" });
  const command = el("code", {});
  const said = el("span", { class: "hint", role: "status" });
  const writeCommand = () => {
    command.textContent = curl(method, path, inputs, isFileAnswer(operation));
    said.textContent = "";
  };
  const submit = el("button", { type: "submit", class: method === "delete" ? "danger" : "primary", text: "Send" });
  const form = el("form", { class: "trial", "aria-label": `Try ${method.toUpperCase()} ${path}`, oninput: writeCommand,
    onsubmit: async (/** @type {Event} */ event) => {
      event.preventDefault();
      if (!isComplete(inputs)) return;
      const ending = new AbortController();
      const stop = button("Stop", () => ending.abort(), { class: "quiet" });
      submit.disabled = true;
      submit.after(stop);
      await showAnswer(answer, () => request(method, path, inputs, ending.signal), ending.signal);
      stop.remove();
      submit.disabled = false;
    } },
    ...inputs.map(({ box }) => box),
    el("pre", { tabindex: 0, "aria-label": "The same in a terminal" }, command),
    el("div", { class: "row" }, submit,
      button("Copy for a terminal", async () => {
        said.textContent = (await copied(command)) ? "Copied." : "Marked: copy it with Ctrl+C.";
      }), said),
    answer);
  writeCommand();
  return form;
}

/** @param {Schema} parameter @returns {Input} */
function parameterInput({ name, in: place, required = false, schema, description = "" }) {
  const about = meaning({ ...schema, description: description || schema.description });
  const kind = { path: "in the address", query: "query", header: "header" }[place] ?? place;
  return { box: field(`${name} (${kind}${required ? ", required" : ""})`, control(schema), about), name, place, isNeeded: required };
}

/** @param {Schema} schema */
function control(schema) {
  const plain = schema.anyOf?.find((/** @type {Schema} */ one) => one.type !== "null") ?? schema;
  const choices = plain.type === "boolean" ? ["true", "false"] : plain.enum;
  if (choices) {
    return el("select", {}, el("option", { value: "", text: "not given" }),
      ...choices.map((/** @type {string} */ value) => el("option", { value, text: value })));
  }
  if (isFile(plain)) return el("input", { type: "file" });
  const isNumber = plain.type === "integer" || plain.type === "number";
  return el("input", { type: "text", inputmode: isNumber ? "decimal" : null, spellcheck: "false", autocomplete: "off" });
}

/**
 * JSON where the endpoint takes it, else the fields of the form.
 *
 * @param {Schema|undefined} body
 * @param {(reference: string) => Schema} resolve
 * @returns {Input[]}
 */
function bodyInputs(body, resolve) {
  if (!body) return [];
  const json = body.content["application/json"]?.schema;
  if (json) {
    const text = el("textarea", { rows: 6, spellcheck: "false", value: JSON.stringify(exampleOf(json, resolve), null, 2) });
    return [{ box: field("Body (JSON)", text), name: "body", place: "json", isNeeded: true }];
  }
  const [form] = Object.values(body.content);
  const { properties, required = [] } = form.schema.$ref ? resolve(form.schema.$ref) : form.schema;
  return Object.entries(/** @type {Record<string, Schema>} */ (properties)).map(([name, schema]) => {
    const isNeeded = required.includes(name);
    return { box: field(`${name} (form${isNeeded ? ", required" : ""})`, control(schema), meaning(schema)), name, place: "form", isNeeded };
  });
}

/** Whether everything needed is given; says where it is not. @param {Input[]} inputs */
function isComplete(inputs) {
  let isGood = true;
  for (const { box, isNeeded, place } of [...inputs].reverse()) {
    const value = box.control.value.trim();
    let wrong = isNeeded && !value ? "This is needed." : "";
    if (place === "json" && value) {
      try {
        JSON.parse(value);
      } catch (error) {
        wrong = `This is no JSON: ${/** @type {Error} */ (error).message}`;
      }
    }
    box.setWrong(wrong);
    if (wrong) box.control.focus();
    isGood &&= !wrong;
  }
  return isGood;
}

/** Given values by where they go. @param {Input[]} inputs @param {string} place */
function given(inputs, place) {
  return inputs.filter((one) => one.place === place && one.box.control.value.trim());
}

/** @param {string} path @param {Input[]} inputs */
function addressOf(path, inputs) {
  const whole = given(inputs, "path").reduce(
    (text, { name, box }) => text.replace(`{${name}}`, encodeURIComponent(box.control.value.trim())), path);
  const query = new URLSearchParams(given(inputs, "query").map(({ name, box }) => [name, box.control.value.trim()]));
  return query.size ? `${whole}?${query}` : whole;
}

/** @param {string} method @param {string} path @param {Input[]} inputs @param {AbortSignal} signal */
function request(method, path, inputs, signal) {
  const headers = new Headers(given(inputs, "header").map(({ name, box }) => [name, box.control.value.trim()]));
  /** @type {string|FormData|undefined} */
  let body;
  const [json] = given(inputs, "json");
  const parts = given(inputs, "form");
  if (json) {
    body = json.box.control.value;
    headers.set("content-type", "application/json");
  } else if (parts.length) {
    body = new FormData();
    for (const { name, box } of parts) body.append(name, box.control.files?.[0] ?? box.control.value.trim());
  }
  return send(addressOf(path, inputs), { method: method.toUpperCase(), headers, body, signal });
}

/** Whether what is answered is to be kept rather than read. @param {Schema} operation */
function isFileAnswer({ responses }) {
  const [kind] = Object.keys(responses["200"]?.content ?? {});
  return kind !== undefined && !/json|text/.test(kind);
}

/** @param {string} method @param {string} path @param {Input[]} inputs @param {boolean} isKept To a file, by its name. */
function curl(method, path, inputs, isKept) {
  const [json] = given(inputs, "json");
  const hasBody = json || given(inputs, "form").length > 0;
  const implied = hasBody ? "post" : "get";
  const parts = [
    isKept ? " -OJ" : "",
    method === implied ? "" : ` -X ${method.toUpperCase()}`,
    ` ${shell(location.origin + addressOf(path, inputs))}`,
    key() ? ` \\\n  -H "Authorization: Bearer $MEDSORA_API_KEY"` : "",
    ...given(inputs, "header").map(({ name, box }) => ` \\\n  -H ${shell(`${name}: ${box.control.value.trim()}`)}`),
    json ? ` \\\n  -H 'Content-Type: application/json' \\\n  -d ${shell(json.box.control.value)}` : "",
    ...given(inputs, "form").map(({ name, box }) =>
      ` \\\n  -F ${shell(`${name}=${box.control.files ? `@${box.control.files[0]?.name}` : box.control.value.trim()}`)}`),
  ];
  return `curl${parts.join("")}\n`;
}

/**
 * Send, and show what comes: text as it arrives, pictures and videos as such, the rest as a file to keep.
 *
 * @param {HTMLElement} place
 * @param {() => Promise<Response>} ask
 * @param {AbortSignal} signal
 */
async function showAnswer(place, ask, signal) {
  place.replaceChildren(el("p", { class: "hint", text: "Sent…" }));
  const began = performance.now();
  try {
    const response = await ask();
    const kind = response.headers.get("content-type") ?? "";
    const line = el("p", { class: response.ok ? "ok" : "wrong" },
      `${response.status} ${response.statusText}, after ${Math.round(performance.now() - began)} ms${kind && `, ${kind}`}`);
    place.replaceChildren(line);
    if (kind.startsWith("text/")) await showText(place, response);
    else if (/json/.test(kind)) place.append(preOf(pretty(await response.text())));
    else place.append(fileOf(await response.blob(), kind, response));
  } catch (error) {
    if (signal.aborted) place.append(el("p", { class: "hint", text: "Stopped." }));
    else place.replaceChildren(el("p", { class: "wrong", text: error instanceof ApiError ? error.message : String(error) }));
  }
}

/** @param {HTMLElement} place @param {Response} response */
async function showText(place, response) {
  const shown = preOf("");
  place.append(shown);
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader?.read(); part && !part.done; part = await reader?.read()) {
    shown.textContent += part.value;
    if (shown.textContent.length < MOST_SHOWN) continue;
    place.append(el("p", { class: "hint", text: `What comes after ${MOST_SHOWN} characters is not shown.` }));
    await reader?.cancel();
    return;
  }
}

/** @param {string} text */
function preOf(text) {
  return el("pre", { tabindex: 0, "aria-label": "Answer" }, text);
}

/** @param {string} text */
function pretty(text) {
  try {
    return format(parse(text), 2).slice(0, MOST_SHOWN);
  } catch {
    return text.slice(0, MOST_SHOWN); // lines of JSON
  }
}

/** @param {Blob} blob @param {string} kind @param {Response} response */
function fileOf(blob, kind, response) {
  if (blob.size === 0) return el("p", { class: "hint", text: "Without a body." });
  const url = URL.createObjectURL(blob);
  const name = /filename="([^"]+)"/.exec(response.headers.get("content-disposition") ?? "")?.[1] ?? "answer";
  const shown = kind.startsWith("image/") ? el("img", { src: url, alt: "What was answered: a synthetic picture" })
    : kind.startsWith("video/mp4") ? el("video", { src: url, controls: true, loop: true, muted: true, playsinline: true, "aria-label": "What was answered: a synthetic video" })
      : null;
  return el("div", {}, shown, el("p", {}, el("a", { href: url, download: name, text: `Keep ${name} (${size(blob.size)})` })));
}
