// The inside of a paragraph: emphasis, code, links, maths, line breaks. One walk over the text; hostile text costs linear time.

import { el } from "./dom.js";
import { maths } from "./maths.js";

const MOST_OPEN = 60; // emphasis that is open at once; beyond it a mark is only a mark
const DEEPEST = 6; // links inside emphasis inside a label ...
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const BARE_URL = /https?:\/\/[^\s<>"'`\\]+/y;
const ANGLE_URL = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const RASTER = /^data:image\/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+$/;

/** A fragment of nodes for the text of one block. */
export function inline(text, depth = 0, inLink = false) {
  return new Walk(text, depth, inLink).run();
}

/** The address of a link if a person may be led there: absolute, and of a harmless scheme. Otherwise null. */
export function safeUrl(address) {
  let url;
  try {
    url = new URL(address.trim());
  } catch {
    return null;
  }
  return SCHEMES.has(url.protocol) ? url : null;
}

class Walk {
  constructor(text, depth, inLink) {
    this.text = text;
    this.depth = depth;
    this.inLink = inLink;
    this.at = 0;
    this.plain = "";
    this.frames = [{ nodes: [] }]; // the bottom, then one for each emphasis mark that is still open
    this.closers = null; // position of "[" -> position of its "]"
    this.ends = null; // the same for "(" and ")"
    this.ticks = null; // length of a run of backticks -> where such runs begin
  }

  run() {
    while (this.at < this.text.length) this.step(this.text[this.at]);
    this.flush();
    while (this.frames.length > 1) this.dissolve();
    const fragment = document.createDocumentFragment();
    fragment.append(...this.frames[0].nodes);
    return fragment;
  }

  step(char) {
    switch (char) {
      case "\\": return this.backslash();
      case "`": return this.codeSpan();
      case "$": return this.dollar();
      case "\n": return this.lineBreak();
      case "*": case "_": case "~": return this.emphasis(char);
      case "[": return this.link(false) || this.take(1);
      case "!": return (this.text[this.at + 1] === "[" && this.link(true)) || this.take(1);
      case "<": return this.angle() || this.take(1);
      case "h": return this.bareUrl() || this.take(1);
      default: return this.takeWhilePlain();
    }
  }

  take(count) {
    this.plain += this.text.slice(this.at, this.at + count);
    this.at += count;
  }

  takeWhilePlain() {
    const rest = /[\\`$\n*_~[!<]|\bh/g;
    rest.lastIndex = this.at + 1;
    const next = rest.exec(this.text);
    this.take((next ? next.index : this.text.length) - this.at);
  }

  flush() {
    if (this.plain) this.frames.at(-1).nodes.push(document.createTextNode(this.plain));
    this.plain = "";
  }

  add(node, length) {
    this.flush();
    this.frames.at(-1).nodes.push(node);
    this.at += length;
    return true;
  }

  backslash() {
    const next = this.text[this.at + 1];
    if (next === "(" && this.delimitedMaths("\\(", "\\)", false)) return;
    if (next === "[" && this.delimitedMaths("\\[", "\\]", true)) return;
    if (next === "\n") {
      this.at += 1;
    } else if (next && ESCAPABLE.test(next)) {
      this.at += 1;
      this.take(1);
    } else this.take(1);
  }

  delimitedMaths(open, close, display) {
    this.lastClose ??= {};
    this.lastClose[close] ??= this.text.lastIndexOf(close);
    if (this.lastClose[close] < this.at + open.length) return false;
    const end = this.text.indexOf(close, this.at + open.length);
    const body = this.text.slice(this.at + open.length, end);
    return body.trim() ? this.add(maths(body.trim(), display), end + close.length - this.at) : false;
  }

  /** `$x$` is maths when the marks hug it and no digit follows: "from $5 to $10" is money. */
  dollar() {
    if (this.text.startsWith("$$", this.at)) {
      if (!this.delimitedMaths("$$", "$$", true)) this.take(2);
      return;
    }
    const end = this.closingDollar();
    if (end < 0) this.take(1);
    else this.add(maths(this.text.slice(this.at + 1, end), false), end + 1 - this.at);
  }

  closingDollar() {
    if (/[\s$]|^$/.test(this.text[this.at + 1] ?? "")) return -1;
    const limit = Math.min(this.text.length, this.at + 600);
    for (let i = this.at + 1; i < limit; i += 1) {
      if (this.text[i] === "\\") i += 1;
      else if (this.text[i] === "$") return !/\s/.test(this.text[i - 1]) && !/\d/.test(this.text[i + 1] ?? "") ? i : -1;
    }
    return -1;
  }

  codeSpan() {
    this.ticks ??= runsOfTicks(this.text);
    let length = 1;
    while (this.text[this.at + length] === "`") length += 1;
    const starts = this.ticks.get(length) ?? []; // none: an escape took the first tick of a run
    while (starts.length && starts[0] <= this.at) starts.shift();
    if (!starts.length) return this.take(length);
    const end = starts[0];
    let body = this.text.slice(this.at + length, end).replaceAll("\n", " ");
    if (body.startsWith(" ") && body.endsWith(" ") && body.trim()) body = body.slice(1, -1);
    return this.add(el("code", { text: body }), end + length - this.at);
  }

  lineBreak() {
    this.plain = this.plain.trimEnd();
    this.add(el("br"), 1);
    while (this.text[this.at] === " ") this.at += 1;
  }

  angle() {
    ANGLE_URL.lastIndex = this.at;
    const match = ANGLE_URL.exec(this.text);
    const url = match && safeUrl(match[1]);
    return url && !this.inLink ? this.add(anchor(url, match[1].replace(/^mailto:/, "")), match[0].length) : false;
  }

  bareUrl() {
    if (this.inLink || /\w/.test(this.text[this.at - 1] ?? "")) return false;
    BARE_URL.lastIndex = this.at;
    const match = BARE_URL.exec(this.text);
    if (!match) return false;
    let address = match[0].replace(/[.,;:!?*_~]+$/, "");
    while (address.endsWith(")") && count(address, ")") > count(address, "(")) address = address.slice(0, -1);
    const url = safeUrl(address);
    return url ? this.add(anchor(url, address), address.length) : false;
  }

  /** `[label](address "title")`, and with `!` before it an image. What is not safe to lead to stays text. */
  link(image) {
    const open = this.at + (image ? 1 : 0);
    this.closers ??= matchPairs(this.text, "[", "]");
    this.ends ??= matchPairs(this.text, "(", ")");
    const close = this.closers.get(open);
    if (close === undefined || this.text[close + 1] !== "(" || this.depth >= DEEPEST) return false;
    const end = this.ends.get(close + 1);
    if (end === undefined) return false;
    const address = readAddress(this.text.slice(close + 2, end));
    const label = this.text.slice(open + 1, close);
    const length = end + 1 - this.at;
    if (image) return this.add(drawImage(label, address), length);
    const url = this.inLink ? null : safeUrl(address);
    if (!url) return this.add(refused(label, this.depth), length);
    return this.add(labelled(url, inline(label, this.depth + 1, true), label), length);
  }

  emphasis(char) {
    let length = 1;
    while (this.text[this.at + length] === char) length += 1;
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[this.at + length] ?? " ";
    this.at += length;
    if (char === "~" && length !== 2) {
      this.plain += char.repeat(length);
      return;
    }
    const [opens, closes] = flanking(char, before, after);
    this.flush();
    const left = closes ? this.close(char, length) : length;
    if (left > 0 && opens && this.frames.length < MOST_OPEN) this.frames.push({ char, length: left, nodes: [] });
    else if (left > 0) this.plain += char.repeat(left);
  }

  /** Closes what `length` marks can close; returns how many marks are left over. */
  close(char, length) {
    let left = length;
    while (left > 0) {
      const found = this.frames.findLastIndex((frame) => frame.char === char);
      if (found < 0) return left;
      while (this.frames.length > found + 1) this.dissolve();
      const frame = this.frames[found];
      if (!frame.nodes.length) return left;
      const used = Math.min(2, left, frame.length);
      const node = el(char === "~" ? "del" : used === 2 ? "strong" : "em");
      node.append(...frame.nodes);
      left -= used;
      frame.length -= used;
      frame.nodes = [node];
      if (frame.length === 0) {
        this.frames.pop();
        this.frames.at(-1).nodes.push(node);
      }
    }
    return left;
  }

  /** The topmost open mark was none: its marks are text, its content belongs to what is below. */
  dissolve() {
    const frame = this.frames.pop();
    this.frames.at(-1).nodes.push(document.createTextNode(frame.char.repeat(frame.length)), ...frame.nodes);
  }
}

/** Whether marks between these neighbours may open and close (CommonMark's flanking rules; `_` not inside a word). */
function flanking(char, before, after) {
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [signBefore, signAfter] = [/[\p{P}\p{S}]/u.test(before), /[\p{P}\p{S}]/u.test(after)];
  const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
  const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
  return char === "_" ? [left && (!right || signBefore), right && (!left || signAfter)] : [left, right];
}

function runsOfTicks(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    if (!runs.has(match[0].length)) runs.set(match[0].length, []);
    runs.get(match[0].length).push(match.index);
  }
  return runs;
}

/** Where each opening mark is closed, in one pass; a pair does not reach over a line's end. */
function matchPairs(text, opening, closing) {
  const pairs = new Map();
  let open = [];
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === opening) open.push(i);
    else if (text[i] === closing && open.length) pairs.set(open.pop(), i);
    else if (text[i] === "\n") open = [];
  }
  return pairs;
}

/** What stands in the parentheses of a link, without its title and without angle brackets. */
function readAddress(inside) {
  const trimmed = inside.trim();
  const quote = trimmed.at(-1);
  const start = quote === '"' || quote === "'" ? trimmed.lastIndexOf(quote, trimmed.length - 2) : -1;
  const address = start > 0 && /\s/.test(trimmed[start - 1]) ? trimmed.slice(0, start).trim() : trimmed;
  return address.startsWith("<") && address.endsWith(">") ? address.slice(1, -1) : address;
}

function anchor(url, text) {
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href, text });
}

/** A link with a label. A label that looks like an address of another host gets the true host beside it. */
function labelled(url, content, label) {
  const node = anchor(url, "");
  node.append(content);
  if (/[\w-]\.[a-z]{2,}/i.test(label) && url.host && !label.toLowerCase().includes(url.host)) {
    node.append(el("span", { class: "true-host", text: ` (${url.host})` }));
  }
  return node;
}

/** A link that leads nowhere safe keeps its label and says so. */
function refused(label, depth) {
  const node = el("span", { class: "refused", title: "This link was not made: its address is not a web address" });
  node.append(inline(label, depth + 1, true));
  return node;
}

/** Pictures are shown only when they come inside the text: nothing is fetched from elsewhere because a model says so. */
function drawImage(alt, address) {
  if (RASTER.test(address)) return el("img", { src: address, alt, class: "inline-image" });
  const url = safeUrl(address);
  return url ? anchor(url, alt || url.href) : el("span", { class: "refused", title: "This picture was not shown", text: alt || "picture" });
}

function count(text, char) {
  return text.split(char).length - 1;
}
