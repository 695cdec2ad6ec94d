/**
 * The server's HTTP API, as the pages use it: keys, errors, and numbers that are larger than JavaScript's.
 *
 * @typedef {{message: string, code: string|null, param: string|null, status: number, retryAfterS: number|null}} Problem
 */

const KEY_NAME = "medsora-key";

/** What the server refused, or that it cannot be reached (status 0). */
export class ApiError extends Error {
  /** @param {Problem} problem */
  constructor(problem) {
    super(problem.message);
    this.code = problem.code;
    this.param = problem.param;
    this.status = problem.status;
    this.retryAfterS = problem.retryAfterS;
  }
}

/** The key of this tab, or an empty string. It is gone when the tab is closed. */
export function key() {
  return sessionStorage.getItem(KEY_NAME) ?? "";
}

/** @param {string} text Empty: forget it. */
export function setKey(text) {
  if (text) sessionStorage.setItem(KEY_NAME, text);
  else sessionStorage.removeItem(KEY_NAME);
}

/**
 * Ask the server.
 *
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 * @throws {ApiError} It refused, or cannot be reached.
 */
export async function ask(path, options = {}) {
  const response = await send(path, options);
  if (!response.ok) throw await problemOf(response);
  return response;
}

/**
 * Ask the server, and take whatever it answers.
 *
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 * @throws {ApiError} It cannot be reached.
 */
export async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  headers.set("x-medsora-links", "none"); // files from this server, not by a link to a bucket, which the policy forbids
  if (key()) headers.set("authorization", `Bearer ${key()}`);
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError({
      message: "The server cannot be reached. Is it running?",
      code: "unreachable", param: null, status: 0, retryAfterS: null,
    });
  }
}

/** @param {Response} response */
async function problemOf(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // not ours: a proxy's
  }
  const retry = Number(response.headers.get("retry-after"));
  const problem = new ApiError({
    message: error?.message ?? `The server answered ${response.status}.`,
    code: error?.code ?? null,
    param: error?.param ?? null,
    status: response.status,
    retryAfterS: retry > 0 ? retry : null,
  });
  if (response.status === 401) dispatchEvent(new CustomEvent("key-needed", { detail: problem.message }));
  return problem;
}

/**
 * Parse JSON and keep seeds as text: they go up to 2**63 - 1, where numbers of JavaScript are not exact.
 *
 * @param {string} text
 */
export function parse(text) {
  return JSON.parse(text.replace(/"seed":\s*(\d+)/g, '"seed":"$1"'));
}

/** The body of a request as JSON, where seeds are numbers again. @param {object} body */
export function format(body, indent = 0) {
  return JSON.stringify(body, null, indent).replace(/"seed":( ?)"(\d+)"/g, '"seed":$1$2');
}

/** @param {string} path */
export async function get(path) {
  return parse(await (await ask(path)).text());
}

/** @param {string} path @param {object} [body] */
export async function post(path, body) {
  const options = body === undefined ? {} : { body: format(body), headers: { "content-type": "application/json" } };
  return parse(await (await ask(path, { method: "POST", ...options })).text());
}

/** @param {string} path @param {FormData} form */
export async function postForm(path, form) {
  return parse(await (await ask(path, { method: "POST", body: form })).text());
}

/** @param {string} path */
export async function remove(path) {
  return parse(await (await ask(path, { method: "DELETE" })).text());
}
