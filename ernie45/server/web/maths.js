// TeX formulas to MathML, which the browser sets itself. What this converter does not know is shown as its source, never guessed.
//
// Every element and attribute is chosen here; the formula only ever supplies characters.

import { el } from "./dom.js";
import { ACCENTS, ALPHABETS, BIG, FUNCTIONS, LETTERS, OPERATORS, SPACES } from "./symbols.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";
const LONGEST = 4000; // characters of one formula
const DEEPEST = 40; // groups inside groups
const TOKEN = /\\(?:[A-Za-z]+|[^])|\s+|\d+(?:\.\d+)?|[^]/gu;

const MATRICES = new Map(Object.entries({
  matrix: ["", ""], pmatrix: ["(", ")"], bmatrix: ["[", "]"], Bmatrix: ["{", "}"], vmatrix: ["|", "|"], Vmatrix: ["‖", "‖"], smallmatrix: ["", ""],
  array: ["", ""], cases: ["{", ""], aligned: ["", ""], align: ["", ""], "align*": ["", ""], split: ["", ""], gathered: ["", ""], gather: ["", ""],
  "gather*": ["", ""], equation: ["", ""], "equation*": ["", ""],
}));
const SIZES = /^(?:big|Big|bigg|Bigg)[lrm]?$/;
const STYLES = new Set(["displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "nonumber", "notag", "hline"]);
const TEXT = new Set(["text", "textrm", "mbox", "textbf", "textit", "texttt", "textnormal", "hbox"]);

class Unknown extends Error {}

/** A formula as a node: `<math>`, or the source in `<code>` when it holds something unknown. */
export function maths(source, display) {
  try {
    if (source.length > LONGEST) throw new Unknown("too long");
    const reader = new Reader(source.match(TOKEN) ?? [], display);
    const row = reader.row(() => false);
    const root = m("math", display ? { display: "block" } : {}, row);
    root.setAttribute("alttext", source);
    return root;
  } catch (error) {
    if (!(error instanceof Unknown)) throw error;
    return el("code", { class: "tex", title: "A formula this page cannot set, as it was written", text: source });
  }
}

function m(tag, attributes, ...children) {
  const node = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const leaf = (tag, text, attributes = {}) => m(tag, attributes, document.createTextNode(text));
const operator = (text, attributes = {}) => leaf("mo", text, attributes);
const fence = (text) => operator(text, { fence: "true", stretchy: "true" });

class Reader {
  constructor(tokens, display) {
    this.tokens = tokens;
    this.at = 0;
    this.depth = 0;
    this.display = display;
    this.alphabet = null;
  }

  peek() {
    while (/^\s/.test(this.tokens[this.at] ?? "")) this.at += 1;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    if (token === undefined) throw new Unknown("unfinished");
    this.at += 1;
    return token;
  }

  accept(token) {
    if (this.peek() !== token) return false;
    this.at += 1;
    return true;
  }

  expect(token) {
    if (!this.accept(token)) throw new Unknown(`${token} missing`);
  }

  /** Everything up to a token that `stops`, in one `<mrow>`. */
  row(stops) {
    if (++this.depth > DEEPEST) throw new Unknown("too deep");
    const nodes = [];
    for (let token = this.peek(); token !== undefined && !stops(token); token = this.peek()) {
      if (token === "}" || token === "&" || token === "\\\\" || token === "\\right") throw new Unknown(token);
      const atom = this.scripted();
      if (atom) nodes.push(atom);
    }
    this.depth -= 1;
    return nodes.length === 1 ? nodes[0] : m("mrow", {}, ...nodes);
  }

  group() {
    const row = this.row((token) => token === "}");
    this.expect("}");
    return row;
  }

  /** One argument: a group, or the next single thing. */
  argument() {
    if (this.accept("{")) return this.group();
    if (++this.depth > DEEPEST) throw new Unknown("too deep");
    const token = this.peek();
    if (/^\d{2,}/.test(token ?? "")) {
      // "\frac12" and "x^10": TeX takes one digit
      this.tokens.splice(this.at, 1, token[0], token.slice(1));
    }
    const node = this.atom().node ?? m("mrow", {});
    this.depth -= 1;
    return node;
  }

  /** An atom with what stands above and below it. */
  scripted() {
    const { node, limits } = ["^", "_", "'"].includes(this.peek()) ? { node: m("mrow", {}), limits: false } : this.atom();
    let [below, above, primes] = [null, null, ""];
    let over = limits;
    for (;;) {
      if (this.accept("\\limits")) over = true;
      else if (this.accept("\\nolimits")) over = false;
      else if (this.accept("'")) primes += "′";
      else if (!above && this.accept("^")) above = this.argument();
      else if (!below && this.accept("_")) below = this.argument();
      else break;
    }
    if (primes) above = above ? m("mrow", {}, operator(primes), above) : operator(primes);
    if (!below && !above) return node;
    const base = node ?? m("mrow", {});
    if (below && above) return m(over ? "munderover" : "msubsup", {}, base, below, above);
    if (below) return m(over ? "munder" : "msub", {}, base, below);
    return m(over ? "mover" : "msup", {}, base, above);
  }

  atom() {
    const token = this.next();
    if (token === "{") return { node: this.group() };
    if (token.startsWith("\\")) return this.command(token.slice(1), this.tokenBefore());
    if (/^\d/.test(token)) return { node: leaf("mn", this.styled(token)) };
    if (/^\p{L}/u.test(token)) return { node: this.letter(token) };
    if (token === "^" || token === "_" || token === "#" || token === "%" || token === "$") throw new Unknown(token);
    if (token === "-") return { node: operator("−") };
    if (token === "~") return { node: m("mspace", { width: "0.333em" }) };
    return { node: operator(token, "()[]|/".includes(token) ? { stretchy: "false" } : {}) };
  }

  letter(token) {
    const styled = this.styled(token);
    return leaf("mi", styled, this.alphabet && this.alphabet !== "mathit" ? { mathvariant: "normal" } : {});
  }

  /** Characters in the alphabet that is in force. */
  styled(text) {
    const alphabet = ALPHABETS.get(this.alphabet);
    if (!alphabet) return text;
    return Array.from(text, (char) => {
      if (Object.hasOwn(alphabet, char) && typeof alphabet[char] === "string") return alphabet[char];
      for (const [first, last] of [["A", "Z"], ["a", "z"], ["0", "9"]]) {
        if (char >= first && char <= last && Object.hasOwn(alphabet, first) && typeof alphabet[first] === "number") {
          return String.fromCodePoint(alphabet[first] + char.charCodeAt(0) - first.charCodeAt(0));
        }
      }
      return char;
    }).join("");
  }

  /** The token before the one that was just read, spaces left out. */
  tokenBefore() {
    let at = this.at - 2;
    while (/^\s/.test(this.tokens[at] ?? "")) at -= 1;
    return this.tokens[at] ?? "";
  }

  command(name, before) {
    if (LETTERS.has(name)) return { node: leaf("mi", LETTERS.get(name), /[Α-Ω]/.test(LETTERS.get(name)) ? { mathvariant: "normal" } : {}) };
    if (OPERATORS.has(name)) return { node: operator(OPERATORS.get(name), /[⟨⟩⌊⌋⌈⌉|‖{}]/.test(OPERATORS.get(name)) ? { stretchy: "false" } : {}) };
    if (BIG.has(name)) return { node: operator(BIG.get(name)[0], { largeop: String(this.display) }), limits: BIG.get(name)[1] && this.display };
    if (FUNCTIONS.has(name)) return this.named(name.replace(/^arg(?=m)/, "arg "), FUNCTIONS.get(name), before);
    if (SPACES.has(name)) return { node: m("mspace", { width: `${SPACES.get(name)}em` }) };
    if (ACCENTS.has(name)) return { node: this.accent(ACCENTS.get(name), name) };
    if (ALPHABETS.has(name)) return { node: this.inAlphabet(name) };
    if (TEXT.has(name)) return { node: leaf("mtext", this.rawArgument(), name === "textbf" ? { class: "bold" } : {}) };
    if (STYLES.has(name)) return { node: null };
    if (SIZES.test(name)) return { node: fence(this.delimiter()) };
    return this.structure(name);
  }

  structure(name) {
    switch (name) {
      case "frac": case "dfrac": case "tfrac": case "cfrac": return { node: m("mfrac", {}, this.argument(), this.argument()) };
      case "binom": case "dbinom": case "tbinom": return { node: this.binomial() };
      case "sqrt": return { node: this.root() };
      case "left": return { node: this.fenced() };
      case "begin": return { node: this.environment() };
      case "operatorname": return this.operatorName();
      case "overset": case "stackrel": return { node: this.stacked("mover") };
      case "underset": return { node: this.stacked("munder") };
      case "underline": return { node: m("munder", {}, this.argument(), operator("_", { stretchy: "true" })) };
      case "overbrace": return { node: m("mover", {}, this.argument(), operator("⏞", { stretchy: "true" })), limits: true };
      case "underbrace": return { node: m("munder", {}, this.argument(), operator("⏟", { stretchy: "true" })), limits: true };
      case "boxed": return { node: m("mrow", { class: "boxed" }, this.argument()) };
      case "phantom": return { node: m("mphantom", {}, this.argument()) };
      case "not": return { node: this.negated() };
      case "bmod": return { node: operator("mod", { lspace: "0.25em", rspace: "0.25em" }) };
      case "pmod": return { node: m("mrow", {}, m("mspace", { width: "0.5em" }), leaf("mtext", "(mod "), this.argument(), leaf("mtext", ")")) };
      case "tag": return { node: leaf("mtext", `  (${this.rawArgument()})`) };
      case "$": case "%": case "#": case "&": case "_": return { node: operator(name) };
      default: throw new Unknown(name);
    }
  }

  operatorName() {
    const limits = this.accept("*");
    return this.named(this.rawArgument(), limits);
  }

  named(text, limits, before = "") {
    const node = m("mrow", {}, leaf("mi", text, { mathvariant: "normal" }));
    // A thin space on either side, but not against a bracket, an operator or the edge (TeX's rules for "log-like" names).
    if (/[\p{L}\d)\]}]$/u.test(before)) node.prepend(m("mspace", { width: "0.167em" }));
    if (!["(", "[", "{", "^", "_", "\\left", undefined].includes(this.peek())) node.append(m("mspace", { width: "0.167em" }));
    return { node, limits: limits && this.display };
  }

  accent(mark, name) {
    const wide = name.startsWith("wide") || name.startsWith("over");
    return m("mover", { accent: "true" }, this.argument(), operator(mark, { stretchy: String(wide) }));
  }

  inAlphabet(name) {
    const before = this.alphabet;
    this.alphabet = name;
    const node = this.argument();
    this.alphabet = before;
    return node;
  }

  /** The characters of an argument, as text. */
  rawArgument() {
    this.expect("{");
    let text = "";
    for (let open = 1; ; ) {
      const token = this.tokens[this.at++];
      if (token === undefined) throw new Unknown("unfinished");
      if (token === "{") open += 1;
      if (token === "}" && --open === 0) break;
      if (token !== "{" && token !== "}") text += token.startsWith("\\") ? (OPERATORS.get(token.slice(1)) ?? token.slice(1)) : token.replace(/\s+/, " ");
    }
    return text.replace(/^ | $/g, "\u00a0");
  }

  binomial() {
    return m("mrow", {}, fence("("), m("mfrac", { linethickness: "0" }, this.argument(), this.argument()), fence(")"));
  }

  root() {
    if (!this.accept("[")) return m("msqrt", {}, this.argument());
    const index = this.row((token) => token === "]");
    this.expect("]");
    return m("mroot", {}, this.argument(), index);
  }

  delimiter() {
    const token = this.next();
    if (token === ".") return "";
    const char = token.startsWith("\\") ? OPERATORS.get(token.slice(1)) : token;
    if (!char || !"()[]{}|‖⟨⟩⌊⌋⌈⌉/\\<>↑↓".includes(char)) throw new Unknown(token);
    return { "<": "⟨", ">": "⟩" }[char] ?? char;
  }

  fenced() {
    const row = m("mrow", {}, fence(this.delimiter()));
    row.append(this.row((token) => token === "\\right" || token === "\\middle"));
    while (this.accept("\\middle")) row.append(fence(this.delimiter()), this.row((token) => token === "\\right" || token === "\\middle"));
    this.expect("\\right");
    row.append(fence(this.delimiter()));
    return row;
  }

  stacked(tag) {
    const mark = this.argument();
    return m(tag, {}, this.argument(), mark);
  }

  negated() {
    const { node } = this.atom();
    if (node?.localName !== "mo" && node?.localName !== "mi") throw new Unknown("not");
    node.textContent = (node.textContent + "\u0338").normalize("NFC");
    return node;
  }

  environment() {
    const name = this.rawArgument();
    if (!MATRICES.has(name)) throw new Unknown(name);
    if (name === "array") this.rawArgument();
    const [left, right] = MATRICES.get(name);
    const aligned = /^(?:align|split)/.test(name);
    const table = m("mtable", { class: aligned ? "aligned" : name === "cases" ? "cases" : "matrix", displaystyle: String(aligned) });
    for (let row = m("mtr", {}); ; row = m("mtr", {})) {
      const stops = (token) => token === "&" || token === "\\\\" || token === "\\end";
      do row.append(m("mtd", {}, this.row(stops))); while (this.accept("&"));
      table.append(row);
      if (!this.accept("\\\\")) break;
      if (this.peek() === "\\end") break;
    }
    this.expect("\\end");
    if (this.rawArgument() !== name) throw new Unknown(name);
    return left || right ? m("mrow", {}, fence(left), table, fence(right)) : table;
  }
}
