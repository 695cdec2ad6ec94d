/** What happens on the server, as it happens: server-sent events, read by fetch since they may need a key. */

import { ApiError, ask, parse } from "./api.js";

/**
 * Follow everything of one's own for as long as the page is open; comes back by itself.
 *
 * @param {(kind: string, data: any) => void} onEvent
 * @param {(isConnected: boolean) => void} onConnection
 * @returns {() => void} Ends it.
 */
export function follow(onEvent, onConnection) {
  const ending = new AbortController();
  let place = "";
  let pauseMs = 500;

  async function once() {
    const headers = place ? { "last-event-id": place } : {};
    const response = await ask("/v1/events?preview=true", { headers, signal: ending.signal });
    onConnection(true);
    pauseMs = 500;
    for await (const event of eventsOf(response)) {
      if (event.id) place = event.id;
      if (event.data) onEvent(event.event, parse(event.data).data);
    }
  }

  async function run() {
    while (!ending.signal.aborted) {
      try {
        await once();
      } catch (error) {
        if (ending.signal.aborted) return;
        if (error instanceof ApiError && (error.status === 401 || error.status === 403)) return;
      }
      onConnection(false);
      await new Promise((resolve) => setTimeout(resolve, pauseMs));
      pauseMs = Math.min(10_000, pauseMs * 2);
    }
  }

  run();
  return () => ending.abort();
}

/**
 * The events of a stream, one by one.
 *
 * @param {Response} response
 * @returns {AsyncGenerator<{id: string, event: string, data: string}>}
 */
async function* eventsOf(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let text = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const blocks = text.split("\n\n");
    text = /** @type {string} */ (blocks.pop());
    for (const block of blocks) {
      const event = { id: "", event: "message", data: "" };
      for (const line of block.split("\n")) {
        const [name, rest] = [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trimStart()];
        if (name in event) event[/** @type {"id"} */ (name)] = rest;
      }
      yield event;
    }
  }
}
