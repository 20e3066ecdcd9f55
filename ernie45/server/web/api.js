// Talking to the server: models, streamed answers, and errors in words.

import { apiKey } from "./store.js";

const LONGEST_EVENT = 8_000_000; // characters of one event; no honest server sends more

/** Something the person can read. `status` is the HTTP status (0: no connection), `retryAfter` seconds or null. */
export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Asks for `path`, relative to this page, so that the page also works below a prefix of a reverse proxy. */
export async function ask(path, { body, signal } = {}) {
  const key = apiKey.read();
  const headers = { Accept: body?.stream ? "text/event-stream" : "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET", headers, signal, body: body ? JSON.stringify(body) : undefined, credentials: "same-origin", cache: "no-store", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let said = "";
  try {
    said = errorText(JSON.parse(await response.text()));
  } catch {
    // Not JSON: the status has to speak.
  }
  const wait = Number.parseFloat(response.headers.get("retry-after"));
  return new ServerError(said || statusText(response.status), response.status, Number.isFinite(wait) ? wait : null);
}

function errorText(data) {
  const error = data?.error ?? data?.detail ?? data;
  return typeof error === "string" ? error : typeof error?.message === "string" ? error.message : "";
}

function statusText(status) {
  if (status === 401 || status === 403) return "The server wants an API key.";
  if (status === 404) return "The server does not know this address or this model.";
  if (status === 413) return "The message is too large for the server.";
  if (status === 429) return "Too many requests in a short time.";
  if (status === 503) return "The server is busy or going down.";
  if (status === 504) return "The request waited too long in the queue.";
  return `The server answered with the status ${status}.`;
}

/** The models, adapters among them: `id`, `base` (null for a model of its own), `vision`, `thinking`, `length`, `defaults`. */
export async function listModels() {
  const data = await (await ask("v1/models")).json();
  const entries = Array.isArray(data?.data) ? data.data.filter((entry) => typeof entry?.id === "string") : [];
  const ids = new Set(entries.map((entry) => entry.id));
  return entries.map((entry) => {
    const prefix = entry.id.includes(":") ? entry.id.slice(0, entry.id.lastIndexOf(":")) : null;
    const base = typeof entry.parent === "string" ? entry.parent : prefix && ids.has(prefix) ? prefix : null;
    const can = entry.capabilities ?? {};
    return {
      id: entry.id, base, vision: can.vision === true, thinking: can.thinking !== false,
      length: Number.isFinite(entry.max_model_len) ? entry.max_model_len : null, defaults: entry.defaults ?? {},
    };
  });
}

/** The pieces of a streamed answer: {content}, {reasoning}, {toolCalls: [...]}, {finish}, {usage}. Throws ServerError. */
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", { body, signal });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = readChunk(data);
      for (const piece of pieces(chunk)) {
        finished ||= Boolean(piece.finish);
        yield piece;
      }
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("The connection broke in the middle of the answer.");
  }
  if (!finished) throw new ServerError("The connection ended in the middle of the answer.");
}

function readChunk(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ServerError("The server sent something that is not an answer.");
  }
  if (chunk?.error) throw new ServerError(errorText(chunk) || "The server failed in the middle of the answer.", Number(chunk.error.code) || 500);
  return chunk;
}

function* pieces(chunk) {
  const choice = chunk?.choices?.[0];
  const delta = choice?.delta ?? {};
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (typeof reasoning === "string" && reasoning) yield { reasoning };
  if (typeof delta.content === "string" && delta.content) yield { content: delta.content };
  if (Array.isArray(delta.tool_calls)) yield { toolCalls: delta.tool_calls };
  if (choice?.finish_reason) yield { finish: String(choice.finish_reason) };
  if (chunk?.usage) yield { usage: chunk.usage };
}

/** The data of server-sent events, one at a time (WHATWG, "event stream interpretation"): any line end, comments skipped. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += value ?? "";
      if (rest.length > LONGEST_EVENT) throw new ServerError("The server sent an event that is far too long.");
      // A lone "\r" at the end may be half of "\r\n": it waits.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
