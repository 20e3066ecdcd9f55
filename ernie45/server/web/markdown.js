// Markdown to nodes. A model's text is hostile: it becomes text nodes inside elements chosen here, never markup.
//
// First the text is cut into blocks, each with the source it came from; then blocks become nodes. While an answer grows, only the blocks
// whose source changed are drawn again. Raw HTML is not Markdown here: it is shown as it was written.

import { copyButton, el } from "./dom.js";
import { highlight, languageName } from "./highlight.js";
import { inline } from "./inline.js";
import { maths } from "./maths.js";

const DEEPEST = 12; // quotes and lists inside each other; beyond this a text is playing with us
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const TABLE_LINE = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;

/** Draws `text` into `container`, keeping the nodes of the blocks that did not change since the last time. */
export function renderMarkdown(container, text) {
  const blocks = parseBlocks(text);
  const old = container.blockSources ?? [];
  const sources = blocks.map((block) => block.source);
  let same = 0;
  while (same < old.length && same < sources.length && old[same] === sources[same]) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(drawBlock(block, 0));
  container.blockSources = sources;
}

/** The blocks of a text: `kind`, `source` (unique to content and kind), and what the kind needs. */
export function parseBlocks(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n").map(widenTabs);
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = readBlock(lines, at, depth);
    block.source = `${block.kind}${block.open ? "+" : ""}:${lines.slice(at, block.end).join("\n")}`;
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function widenTabs(line) {
  return line.includes("\t") ? line.replace(/^[ \t]+/, (lead) => lead.replaceAll("\t", "    ")) : line;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return readFence(lines, at);
  const display = readDisplay(lines, at);
  if (display) return display;
  if (isHeading(line)) return { kind: "heading", level: line.trimStart().match(/^#+/)[0].length, text: headingText(line), end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (depth < DEEPEST && isQuote(line)) return readQuote(lines, at);
  if (startsTable(lines, at)) return readTable(lines, at);
  if (depth < DEEPEST && ITEM.test(line)) return readList(lines, at);
  return readParagraph(lines, at, depth);
}

const isHeading = (line) => /^ {0,3}#{1,6}(?: |$)/.test(line);
const isQuote = (line) => /^ {0,3}>/.test(line);

function headingText(line) {
  const text = line.trim().replace(/^#+/, "").trim();
  let end = text.length;
  while (end > 0 && text[end - 1] === "#") end -= 1;
  return end === 0 || text[end - 1] === " " ? text.slice(0, end).trim() : text;
}

function readFence(lines, at) {
  const [, indent, marks, info] = FENCE.exec(lines[at]);
  const body = [];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end].trim();
    if (line.length >= marks.length && line === marks[0].repeat(line.length)) break;
    body.push(dedent(lines[end], indent.length));
  }
  const open = end >= lines.length;
  return { kind: "code", language: info.trim().split(/[\s{]/)[0], text: body.join("\n"), open, end: open ? end : end + 1 };
}

/** Maths on lines of its own: `$$ ... $$` or `\[ ... \]`, closed at the end of a line. Unclosed, it stays a paragraph. */
function readDisplay(lines, at) {
  const start = lines[at].trim();
  const pair = [["$$", "$$"], ["\\[", "\\]"]].find(([open]) => start.startsWith(open));
  if (!pair) return null;
  const body = [];
  for (let end = at; end < lines.length && lines[end].trim(); end += 1) {
    const line = end === at ? start.slice(2) : lines[end].trim();
    if (line.endsWith(pair[1])) {
      body.push(line.slice(0, -2));
      const text = body.join("\n").trim();
      return text && !text.includes(pair[1]) ? { kind: "maths", text, end: end + 1 } : null;
    }
    body.push(line);
  }
  return null;
}

function readQuote(lines, at) {
  const body = [];
  let end = at;
  for (; end < lines.length && isQuote(lines[end]); end += 1) body.push(lines[end].replace(/^ {0,3}> ?/, ""));
  return { kind: "quote", text: body.join("\n"), end };
}

function startsTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE_LINE.test(lines[at + 1])
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function cells(line) {
  const trimmed = line.trim().replace(/^\|/, "");
  const parts = [""];
  for (let i = 0; i < trimmed.length; i += 1) {
    if (trimmed[i] === "\\" && trimmed[i + 1] === "|") parts[parts.length - 1] += trimmed[++i];
    else if (trimmed[i] === "|") parts.push("");
    else parts[parts.length - 1] += trimmed[i];
  }
  if (parts.length > 1 && !parts.at(-1).trim()) parts.pop();
  return parts.map((part) => part.trim());
}

function readTable(lines, at) {
  const aligns = cells(lines[at + 1]).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left"));
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end += 1) rows.push(cells(lines[end]).slice(0, aligns.length));
  return { kind: "table", head: cells(lines[at]), aligns, rows, end };
}

function readList(lines, at) {
  const [, lead, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const list = { kind: "list", ordered, start: ordered ? Number.parseInt(mark, 10) : 1, items: [], loose: false };
  let end = at;
  let inset = 0; // where the text of the current item begins
  let fence = null; // marks of a fence that is open inside the item: until it closes, every line is the item's
  let blank = false;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const indent = line.length - line.trimStart().length;
    const item = fence ? null : ITEM.exec(line);
    const sibling = item && !RULE.test(line) && /\d/.test(item[2]) === ordered && indent < lead.length + 2 && indent >= lead.length - 1;
    if (sibling) {
      if (blank && list.items.length) list.loose = true;
      inset = item[1].length + item[2].length + Math.min(item[3].length || 1, 4);
      list.items.push([line.slice(Math.min(inset, line.length))]);
    } else if (!line.trim()) {
      if (!fence && !continues(lines, end, lead.length, ordered)) break;
      list.items.at(-1).push("");
    } else if (fence || indent >= Math.min(inset, lead.length + 2)) {
      list.items.at(-1).push(dedent(line, inset));
    } else if (!blank && !startsBlock(lines, end)) {
      list.items.at(-1).push(line.trimStart());
    } else break;
    fence = fenceAfter(fence, list.items.at(-1).at(-1));
    blank = !line.trim();
  }
  return { ...list, items: list.items.map((item) => item.join("\n")), end };
}

function fenceAfter(fence, line) {
  if (fence) {
    const mark = line.trim();
    return mark.length >= fence.length && mark === fence[0].repeat(mark.length) ? null : fence;
  }
  return FENCE.exec(line)?.[2] ?? null;
}

/** Whether a list goes on after the blank line `at`: by an item, or by a line that is indented into the last one. */
function continues(lines, at, lead, ordered) {
  let next = at;
  while (next < lines.length && !lines[next].trim()) next += 1;
  if (next >= lines.length) return false;
  const item = ITEM.exec(lines[next]);
  const indent = lines[next].length - lines[next].trimStart().length;
  return indent >= lead + 2 || Boolean(item && !RULE.test(lines[next]) && /\d/.test(item[2]) === ordered && indent >= lead - 1);
}

function dedent(line, by) {
  let n = 0;
  while (n < by && line[n] === " ") n += 1;
  return line.slice(n);
}

function startsBlock(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || isHeading(line) || RULE.test(line) || isQuote(line) || startsTable(lines, at)
    || Boolean(item && item[3] && (!/\d/.test(item[2]) || /^1[.)]$/.test(item[2])));
}

function readParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !(depth < DEEPEST && startsBlock(lines, end)) && !readDisplay(lines, end)) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n"), end };
}

// ---- drawing

function drawBlock(block, depth) {
  switch (block.kind) {
    case "code": return drawCode(block);
    case "maths": return el("div", { class: "display-maths", tabindex: "0" }, maths(block.text, true));
    case "heading": return withInline(el(`h${Math.min(block.level + 2, 6)}`, { class: `level-${block.level}` }), block.text);
    case "rule": return el("hr");
    case "quote": return el("blockquote", {}, ...drawAll(block.text, depth + 1));
    case "table": return drawTable(block);
    case "list": return drawList(block, depth);
    default: return withInline(el("p"), block.text);
  }
}

function drawAll(text, depth) {
  return parseBlocks(text, depth).map((block) => drawBlock(block, depth));
}

function withInline(node, text) {
  node.append(inline(text));
  return node;
}

function drawList(block, depth) {
  const list = el(block.ordered ? "ol" : "ul", block.ordered && block.start !== 1 ? { start: block.start } : {});
  for (const item of block.items) {
    const task = /^\[([ xX])\] +/.exec(item);
    const entry = el("li", { class: task ? "task" : null });
    if (task) {
      entry.append(el("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "open" : "done" }));
    }
    for (const child of parseBlocks(task ? item.slice(task[0].length) : item, depth + 1)) {
      if (child.kind === "paragraph" && !block.loose) entry.append(inline(child.text));
      else entry.append(drawBlock(child, depth + 1));
    }
    list.append(entry);
  }
  return list;
}

function drawTable({ head, aligns, rows }) {
  const row = (tag, values) => el("tr", {}, ...aligns.map((align, i) => withInline(el(tag, { class: `align-${align}` }), values[i] ?? "")));
  const table = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...rows.map((values) => row("td", values))));
  return el("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

function drawCode({ language, text }) {
  const name = languageName(language);
  const code = el("code");
  code.append(highlight(text, language));
  return el("div", { class: "code" },
    el("div", { class: "code-head" }, el("span", { text: name }), copyButton("Copy code", () => text)),
    el("pre", { tabindex: "0", role: "region", "aria-label": name ? `Code, ${name}` : "Code" }, code));
}
