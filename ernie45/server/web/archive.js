// Conversations as files, and back. A file may come from anybody: every field is read by its name, checked, and copied into a fresh object;
// identities live in Maps, so no name in a file can reach a prototype.

import { download, newId } from "./dom.js";
import { PLAIN_SETTINGS, ROOT, path, titleOf } from "./tree.js";

const FORMAT = "ernie45-conversations";
const LARGEST = 200_000_000; // characters of a file that is read in
const IMAGE = /^data:image\/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+$/;
const ROLES = new Set(["user", "assistant", "tool"]);
const NUMBERS = ["budget", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "seed"];
const TIMINGS = ["first", "thinking", "total", "tokens", "promptTokens", "rate"];

export class ArchiveError extends Error {}

/** A conversation as plain data: what is stored and what is exported. */
export function pack(conversation) {
  return { ...conversation, nodes: [...conversation.nodes.values()], choice: [...conversation.choice] };
}

/** Plain data as a conversation. Throws ArchiveError when it is not one. */
export function unpack(record) {
  if (!isObject(record)) throw new ArchiveError("a conversation must be an object");
  if (!Array.isArray(record.nodes) || record.nodes.length > 20_000) throw new ArchiveError("a conversation needs a list of messages");
  const nodes = new Map();
  for (const raw of record.nodes) {
    const node = readNode(raw);
    // Parents stand before their children: so there can be no circle.
    if (node.parent !== ROOT && !nodes.has(node.parent)) throw new ArchiveError(`message ${nodes.size + 1} answers a message that is not there`);
    if (nodes.has(node.id)) throw new ArchiveError(`two messages have the identity ${node.id}`);
    nodes.set(node.id, node);
  }
  const choice = new Map();
  for (const pair of Array.isArray(record.choice) ? record.choice : []) {
    if (Array.isArray(pair) && nodes.has(pair[1]) && nodes.get(pair[1]).parent === pair[0]) choice.set(pair[0], pair[1]);
  }
  return {
    id: text(record.id, 64) || newId(), title: text(record.title, 300), named: record.named === true, created: time(record.created), updated: time(record.updated),
    settings: readSettings(record.settings), nodes, choice,
  };
}

/** Settings with nothing in them but what is known and of the right kind. */
export function readSettings(raw) {
  const settings = { ...PLAIN_SETTINGS };
  if (!isObject(raw)) return settings;
  for (const name of NUMBERS) if (Number.isFinite(own(raw, name))) settings[name] = raw[name];
  for (const name of ["model", "system", "stop", "tools"]) settings[name] = text(own(raw, name), 200_000);
  if (["auto", "on", "off"].includes(own(raw, "thinking"))) settings.thinking = raw.thinking;
  return settings;
}

function readNode(raw) {
  if (!isObject(raw) || !ROLES.has(own(raw, "role"))) throw new ArchiveError("a message must be an object with the role user, assistant or tool");
  const node = {
    id: text(own(raw, "id"), 64), parent: text(own(raw, "parent"), 64), role: raw.role, created: time(own(raw, "created")), content: text(own(raw, "content")),
    images: list(own(raw, "images")).filter((url) => typeof url === "string" && IMAGE.test(url)), reasoning: text(own(raw, "reasoning")),
    toolCalls: list(own(raw, "toolCalls")).filter(isObject).map(readCall),
  };
  if (own(raw, "live")) node.finish = "interrupted"; // stored while it grew: the page was left before the end
  if (!node.id) throw new ArchiveError("a message has no identity");
  for (const name of ["model", "finish", "error", "toolCallId"]) if (own(raw, name) && !node[name]) node[name] = text(raw[name], 2000);
  const timing = own(raw, "timing");
  if (isObject(timing)) node.timing = Object.fromEntries(TIMINGS.filter((name) => Number.isFinite(own(timing, name))).map((name) => [name, timing[name]]));
  return node;
}

const readCall = (raw) => ({ id: text(own(raw, "id"), 200), name: text(own(raw, "name"), 200), arguments: text(own(raw, "arguments")) });
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const own = (value, name) => (Object.hasOwn(value, name) ? value[name] : undefined);
const text = (value, most = 5_000_000) => (typeof value === "string" ? value.slice(0, most) : "");
const list = (value) => (Array.isArray(value) ? value : []);
const time = (value) => (Number.isFinite(value) && value > 0 && value < 8.64e15 ? value : Date.now());

export function exportJson(conversations, name) {
  download(`${name}.json`, "application/json", JSON.stringify({ format: FORMAT, version: 1, conversations: conversations.map(pack) }, null, 1));
}

/** The conversations of a file. Each gets a new identity: reading a file twice never overwrites. */
export async function importJson(file) {
  if (file.size > LARGEST) throw new ArchiveError(`${file.name} is larger than ${LARGEST / 1e6} MB`);
  let data;
  try {
    data = JSON.parse(await file.text());
  } catch {
    throw new ArchiveError(`${file.name} is not JSON`);
  }
  if (!isObject(data) || own(data, "format") !== FORMAT || !Array.isArray(own(data, "conversations"))) {
    throw new ArchiveError(`${file.name} is not an export of this page`);
  }
  return data.conversations.map((record) => ({ ...unpack(record), id: newId() }));
}

export function exportMarkdown(conversation) {
  const name = fileName(conversation);
  download(`${name}.md`, "text/markdown", toMarkdown(conversation));
}

/** The branch that is shown, to be read. */
export function toMarkdown(conversation) {
  const heads = { user: "You", assistant: "Assistant", tool: "Tool result" };
  const lines = [`# ${conversation.title || titleOf(conversation)}`];
  if (conversation.settings.system.trim()) lines.push("## System", conversation.settings.system.trim());
  for (const node of path(conversation)) {
    lines.push(`## ${heads[node.role]}${node.model ? ` (${node.model})` : ""}`);
    if (node.reasoning) lines.push(node.reasoning.trim().split("\n").map((line) => `> ${line}`).join("\n"));
    node.images.forEach((url, i) => lines.push(`![picture ${i + 1}](${url})`));
    for (const call of node.toolCalls) lines.push(`\`\`\`json\n${JSON.stringify({ tool: call.name, arguments: call.arguments })}\n\`\`\``);
    if (node.content) lines.push(node.content.trim());
  }
  return `${lines.join("\n\n")}\n`;
}

export function fileName(conversation) {
  const words = (conversation.title || titleOf(conversation)).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return words.slice(0, 60) || "chat";
}
