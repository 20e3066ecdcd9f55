// A conversation is a tree of messages: an edited question and a second answer are branches, and nothing that was said is lost.
// `choice` remembers, for every message, which of its branches is shown.

import { newId } from "./dom.js";

export const ROOT = "";

/** The settings a conversation starts with; null means "what the server does when it is not told". */
export const PLAIN_SETTINGS = Object.freeze({
  model: "", system: "", thinking: "auto", budget: null, temperature: null, top_p: null, top_k: null, min_p: null, repetition_penalty: null,
  presence_penalty: null, frequency_penalty: null, max_tokens: null, seed: null, stop: "", tools: "",
});

export function newConversation(settings) {
  const now = Date.now();
  return { id: newId(), title: "", named: false, created: now, updated: now, settings: { ...PLAIN_SETTINGS, ...settings }, nodes: new Map(), choice: new Map() };
}

/** Adds a message below `parent` and shows it. */
export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, created: Date.now(), content: "", images: [], reasoning: "", toolCalls: [], ...fields };
  conversation.nodes.set(node.id, node);
  conversation.choice.set(parent, node.id);
  conversation.updated = node.created;
  return node;
}

/** The branches below a message, the oldest first. */
export function children(conversation, parent) {
  return [...conversation.nodes.values()].filter((node) => node.parent === parent);
}

/** The messages on the branch that is shown, the first one first. */
export function path(conversation) {
  const byParent = new Map();
  for (const node of conversation.nodes.values()) {
    if (!byParent.has(node.parent)) byParent.set(node.parent, []);
    byParent.get(node.parent).push(node);
  }
  const shown = [];
  for (let branches = byParent.get(ROOT); branches; branches = byParent.get(shown.at(-1).id)) {
    const chosen = conversation.choice.get(shown.at(-1)?.id ?? ROOT);
    shown.push(branches.find((node) => node.id === chosen) ?? branches.at(-1));
  }
  return shown;
}

/** The messages from the first to `id`. */
export function pathTo(conversation, id) {
  const line = [];
  for (let node = conversation.nodes.get(id); node; node = conversation.nodes.get(node.parent)) line.unshift(node);
  return line;
}

/** Shows the branch `step` places beside `node`. */
export function turn(conversation, node, step) {
  const branches = children(conversation, node.parent);
  const next = branches[branches.indexOf(node) + step];
  if (next) conversation.choice.set(node.parent, next.id);
}

/** A name from the first question. */
export function titleOf(conversation) {
  const first = path(conversation).find((node) => node.role === "user");
  const text = (first?.content ?? "").replace(/\s+/g, " ").trim();
  return text.length > 60 ? `${text.slice(0, 58).trimEnd()}…` : text || (first?.images.length ? "A picture" : "New chat");
}

/** What the server is sent: the system prompt and the messages up to `id`. Thinking of earlier turns is left out, as the models expect. */
export function toMessages(conversation, id) {
  const messages = conversation.settings.system.trim() ? [{ role: "system", content: conversation.settings.system }] : [];
  for (const node of pathTo(conversation, id)) {
    const message = toMessage(node);
    const last = messages.at(-1);
    if (!message) continue;
    // A question whose answer failed, and the next one: one turn, since templates want the sides to alternate.
    if (message.role === "user" && last?.role === "user") last.content = joined(last.content, message.content);
    else messages.push(message);
  }
  return messages;
}

function toMessage(node) {
  if (node.role === "tool") return { role: "tool", tool_call_id: node.toolCallId, content: node.content };
  if (node.role === "user") return { role: "user", content: node.images.length ? parts(node) : node.content };
  if (!node.content && !node.toolCalls.length) return null;
  const message = { role: "assistant", content: node.content };
  if (node.toolCalls.length) {
    message.tool_calls = node.toolCalls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
  }
  return message;
}

function parts(node) {
  const images = node.images.map((url) => ({ type: "image_url", image_url: { url } }));
  return node.content ? [...images, { type: "text", text: node.content }] : images;
}

function joined(first, second) {
  if (typeof first === "string" && typeof second === "string") return `${first}\n\n${second}`;
  const list = (content) => (typeof content === "string" ? [{ type: "text", text: content }] : content);
  return [...list(first), ...list(second)];
}
