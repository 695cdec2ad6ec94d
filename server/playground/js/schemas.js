/** What JSON schemas of the OpenAPI document say, in words, tables and examples. */

import { el, table } from "./dom.js";

/** @typedef {Record<string, any>} Schema */

/** @param {string} reference Such as `#/components/schemas/VideoObject`. */
export function nameOf(reference) {
  return reference.slice(reference.lastIndexOf("/") + 1);
}

/**
 * A type in a few words. Objects that are described elsewhere on the page become links to there.
 *
 * @param {Schema} schema
 * @returns {(string|HTMLElement)[]}
 */
export function typeOf(schema) {
  if (schema.$ref) {
    const name = nameOf(schema.$ref);
    return [el("a", { href: `#/reference?at=${name}`, dataset: { at: name }, text: name })];
  }
  if (schema.anyOf) return joined(schema.anyOf.map(typeOf), " or ");
  if (schema.enum) return [schema.enum.map((/** @type {unknown} */ value) => JSON.stringify(value)).join(" or ")];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items ?? {})];
  if (isFile(schema)) return ["file"];
  if (schema.type === "object" && typeof schema.additionalProperties === "object") {
    return ["object of ", ...typeOf(schema.additionalProperties)];
  }
  return [`${schema.format ?? schema.type ?? "any"}${bounds(schema)}`];
}

/** @param {Schema} schema */
export function isFile(schema) {
  return schema.format === "binary" || "contentMediaType" in schema;
}

/** @param {Schema} schema */
function bounds({ minimum, maximum }) {
  if (minimum !== undefined && maximum !== undefined) return `, ${minimum} to ${maximum}`;
  if (minimum !== undefined) return `, at least ${minimum}`;
  return maximum === undefined ? "" : `, at most ${maximum}`;
}

/** @param {(string|HTMLElement)[][]} parts @param {string} between */
function joined(parts, between) {
  const seen = new Set();
  const different = parts.filter((part) => {
    const words = part.map((one) => (typeof one === "string" ? one : one.textContent)).join("");
    return !seen.has(words) && seen.add(words);
  });
  return different.flatMap((part, place) => (place ? [between, ...part] : part));
}

/**
 * Fields of an object, each with type and meaning.
 *
 * @param {Schema} schema
 * @param {string} caption
 */
export function fieldsTable(schema, caption) {
  const required = new Set(schema.required);
  const rows = Object.entries(/** @type {Record<string, Schema>} */ (schema.properties ?? {})).map(([name, one]) => [
    [el("code", { text: name }), required.has(name) && !("default" in one) ? " (required)" : ""], typeOf(one), meaning(one),
  ]);
  return table(["Field", "Type", "Meaning"], rows, caption);
}

/** Description, and the default where there is one. @param {Schema} schema */
export function meaning(schema) {
  const standard = schema.default === undefined || schema.default === null ? "" : `Default: ${JSON.stringify(schema.default)}.`;
  return [plain(schema.description), standard].filter(Boolean).join(" ");
}

/** Docstrings mark code by double backticks. @param {string} [text] */
export function plain(text = "") {
  return text.replaceAll("``", "`").trim();
}

/**
 * A value to begin with: the fields that are required, each with what the schema gives as example, default or first choice.
 *
 * @param {Schema} schema
 * @param {(reference: string) => Schema} resolve
 * @returns {any}
 */
export function exampleOf(schema, resolve) {
  if (schema.$ref) return exampleOf(resolve(schema.$ref), resolve);
  if (schema.examples?.length) return schema.examples[0];
  if (schema.default !== undefined) return schema.default;
  if (schema.const !== undefined) return schema.const;
  if (schema.enum) return schema.enum[0];
  if (schema.anyOf) return exampleOf(schema.anyOf[0], resolve);
  if (schema.type === "object") {
    const required = /** @type {string[]} */ (schema.required ?? []);
    return Object.fromEntries(required.map((name) => [name, exampleOf(schema.properties[name], resolve)]));
  }
  if (schema.type === "array") return [];
  if (schema.type === "integer" || schema.type === "number") return schema.minimum ?? 1;
  return schema.type === "boolean" ? false : "";
}
