// One answer being made: from the settings and the branch to a request, and from the stream into a message.

import { ServerError, streamChat } from "./api.js";
import { toMessages } from "./tree.js";

const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "seed"];

const SHORTEST = 0.1; // seconds; a rate over less says nothing

/** The body of the request for an answer to the message `id`. What the person did not set is not sent: the server's defaults hold. */
export function requestBody(conversation, id) {
  const { settings } = conversation;
  const body = { model: settings.model, messages: toMessages(conversation, id), stream: true, stream_options: { include_usage: true } };
  for (const name of SAMPLING) if (settings[name] !== null) body[name] = settings[name];
  const stop = settings.stop.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  if (stop.length) body.stop = stop;
  if (settings.thinking !== "auto") body.enable_thinking = settings.thinking === "on";
  if (settings.budget !== null && settings.thinking !== "off") body.reasoning_max_tokens = settings.budget;
  if (settings.tools.trim()) body.tools = readTools(settings.tools);
  return body;
}

/** The tools of the settings: a JSON list, of functions or of whole tools. Throws ServerError in words. */
export function readTools(source) {
  let tools;
  try {
    tools = JSON.parse(source);
  } catch (error) {
    throw new ServerError(`The tools in the settings are not JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new ServerError("The tools in the settings must be a JSON list.");
  return tools.map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
}

/** Fills `node` with the answer to its parent. `onChange` is called after each piece; the promise ends with the answer, never with an error. */
export async function makeAnswer(conversation, node, signal, onChange) {
  const clock = { start: performance.now(), first: null, last: null, spoke: null, pieces: 0 };
  let usage = null;
  try {
    for await (const piece of streamChat(requestBody(conversation, node.parent), signal)) {
      if (piece.usage) usage = piece.usage;
      else if (piece.finish) node.finish = piece.finish;
      else take(node, piece, clock);
      onChange();
    }
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else fail(node, error);
  }
  node.timing = timing(clock, usage);
  delete node.live;
}

function take(node, piece, clock) {
  const now = performance.now();
  clock.first ??= now;
  clock.last = now;
  clock.pieces += 1;
  if (piece.reasoning) node.reasoning += piece.reasoning;
  else {
    clock.spoke ??= now;
    if (piece.content) node.content += piece.content;
    for (const delta of piece.toolCalls ?? []) takeCall(node.toolCalls, delta);
  }
  if (node.reasoning) node.timing = { thinking: ((clock.spoke ?? now) - clock.first) / 1000 };
}

/** Calls come in pieces: the first has the identity and the name, the next ones more of the arguments. */
function takeCall(calls, delta) {
  const index = Number.isInteger(delta?.index) && delta.index >= 0 && delta.index < 128 ? delta.index : calls.length;
  while (calls.length <= index) calls.push({ id: "", name: "", arguments: "" });
  const call = calls[index];
  if (typeof delta.id === "string") call.id ||= delta.id;
  if (typeof delta.function?.name === "string") call.name += delta.function.name;
  if (typeof delta.function?.arguments === "string") call.arguments += delta.function.arguments;
}

function fail(node, error) {
  node.finish = "error";
  if (!(error instanceof ServerError)) {
    node.error = "Something went wrong in this page.";
    console.error(error);
    return;
  }
  const said = /[.!?。]$/.test(error.message) ? error.message : `${error.message}.`;
  node.error = error.retryAfter === null ? said : `${said} Try again in ${Math.ceil(error.retryAfter)} s.`;
  if (error.status === 401 || error.status === 403) node.wantsKey = true;
}

/** Seconds and tokens. The rate leaves the first token out: it tells of the prompt. */
function timing(clock, usage) {
  if (clock.first === null) return { total: (performance.now() - clock.start) / 1000 };
  const tokens = Number.isFinite(usage?.completion_tokens) ? usage.completion_tokens : clock.pieces;
  const span = (clock.last - clock.first) / 1000;
  const result = { first: (clock.first - clock.start) / 1000, total: (clock.last - clock.start) / 1000, tokens };
  if (tokens > 1 && span >= SHORTEST) result.rate = (tokens - 1) / span;
  if (Number.isFinite(usage?.prompt_tokens)) result.promptTokens = usage.prompt_tokens;
  const details = usage?.prompt_tokens_details ?? {};
  const seen = (details.image_tokens ?? 0) + (details.video_tokens ?? 0);
  if (Number.isFinite(seen) && seen > 0) result.seenTokens = seen;
  if (clock.spoke !== null && clock.spoke > clock.first) result.thinking = (clock.spoke - clock.first) / 1000;
  else if (clock.spoke === null) result.thinking = span;
  return result;
}
