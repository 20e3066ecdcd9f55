// Code in colour: one pass with one pattern per family of languages. It need not parse, it must help the eye and never hang.

import { el } from "./dom.js";

const LONGEST = 60_000; // characters; longer code stays plain
const words = (text) => new Set(text.trim().split(/\s+/));

const C_LIKE = words(`auto break case catch class const constexpr continue default delete do else enum explicit export extern final finally for friend
goto if implements import inline instanceof interface namespace new noexcept operator override package private protected public register return
sizeof static static_assert struct super switch template this throw throws try typedef typename union using virtual volatile while async await
abstract as base bool byte char decimal double float int long object sbyte short string uint ulong ushort var void null nullptr true false unsigned
signed size_t get set in is out ref where yield foreach readonly sealed let val fun when data companion init lateinit`);

const LANGUAGES = {
  python: { comment: "#[^\\n]*", string: `[rbfuRBFU]{0,2}(?:"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:[^"\\\\\\n]|\\\\.)*"?|'(?:[^'\\\\\\n]|\\\\.)*'?)`, mark: "@[\\w.]+",
    keywords: words(`and as assert async await break class continue def del elif else except finally for from global if import in is lambda match case
      nonlocal not or pass raise return try while with yield True False None self type`) },
  javascript: { comment: "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", string: "\"(?:[^\"\\\\\\n]|\\\\.)*\"?|'(?:[^'\\\\\\n]|\\\\.)*'?|`(?:[^`\\\\]|\\\\[^])*`?",
    keywords: words(`abstract any as async await boolean break case catch class const continue debugger declare default delete do else enum export extends
      false finally for from function get if implements import in instanceof interface keyof let namespace never new null number of private protected
      public readonly return satisfies set static string super switch this throw true try type typeof undefined unknown var void while with yield`) },
  c: { comment: "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", string: `"(?:[^"\\\\\\n]|\\\\.)*"?|'(?:[^'\\\\\\n]|\\\\.)*'?`, mark: "#[ ]*[a-z]+|@\\w+", keywords: C_LIKE },
  go: { comment: "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", string: "\"(?:[^\"\\\\\\n]|\\\\.)*\"?|'(?:[^'\\\\\\n]|\\\\.)*'?|`[^`]*`?",
    keywords: words(`break case chan const continue default defer else fallthrough for func go goto if import interface map package range return select
      struct switch type var true false nil iota string int int64 int32 uint8 byte rune error bool float64 any make len append`) },
  rust: { comment: "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", string: `b?"(?:[^"\\\\]|\\\\[^])*"?|'(?:[^'\\\\\\n]|\\\\.)'`, mark: "#!?\\[[^\\]\\n]*\\]?|\\w+!",
    keywords: words(`as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut pub ref return
      self Self static struct super trait true type unsafe use where while bool char str u8 u16 u32 u64 usize i8 i16 i32 i64 isize f32 f64`) },
  shell: { comment: "(?<![\\w$])#[^\\n]*", string: `"(?:[^"\\\\]|\\\\[^])*"?|'[^']*'?`, mark: "\\$\\{?[\\w@#?*!]+\\}?|(?<=\\s)--?[A-Za-z][\\w-]*",
    keywords: words(`if then else elif fi for in do done while until case esac function return exit export local set unset source echo cd sudo read shift
      trap alias eval exec test true false`) },
  sql: { comment: "--[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", string: `'(?:[^']|'')*'?|"[^"\\n]*"?`, ignoreCase: true,
    keywords: words(`select from where and or not in is null as on join left right inner outer full cross group by order having limit offset insert into
      values update set delete create table primary key foreign references index view drop alter add column distinct union all case when then else end
      exists between like asc desc with returning default unique check constraint integer int text varchar boolean date timestamp numeric real begin
      commit rollback count sum avg min max`) },
  json: { string: `"(?:[^"\\\\\\n]|\\\\.)*"?`, property: true, keywords: words("true false null") },
  yaml: { comment: "(?<![^\\s])#[^\\n]*", string: `"(?:[^"\\\\\\n]|\\\\.)*"?|'[^'\\n]*'?`, mark: "(?<=^[ \\t]*(?:- )?)[\\w.\\/-]+(?=:(?:\\s|$))", keywords: words("true false null yes no on off") },
  ini: { comment: "(?<![^\\s])[#;][^\\n]*", string: `"(?:[^"\\\\\\n]|\\\\.)*"?|'[^'\\n]*'?`, mark: "^[ \\t]*\\[[^\\]\\n]*\\]+|^[ \\t]*[\\w.-]+(?=\\s*=)", keywords: words("true false") },
  markup: { comment: "<!--[^]*?(?:-->|$)", string: `"[^"<>\\n]*"|'[^'<>\\n]*'`, mark: "<[\\/!?]?[\\w:-]+|\\/?>", keywords: new Set() },
  css: { comment: "\\/\\*[^]*?(?:\\*\\/|$)", string: `"[^"\\n]*"?|'[^'\\n]*'?`, mark: "@[\\w-]+|--[\\w-]+|[\\w-]+(?=\\s*:[^:])|#[\\da-fA-F]{3,8}\\b", keywords: words("important var calc none auto inherit") },
  ruby: { comment: "#[^\\n]*", string: `"(?:[^"\\\\]|\\\\[^])*"?|'(?:[^'\\\\]|\\\\[^])*'?`, mark: "@{1,2}\\w+|:\\w+",
    keywords: words(`alias and begin break case class def do else elsif end ensure false for if in module next nil not or redo rescue retry return self
      super then true undef unless until when while yield require puts attr_accessor attr_reader`) },
  php: { comment: "\\/\\/[^\\n]*|#[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", string: `"(?:[^"\\\\]|\\\\[^])*"?|'(?:[^'\\\\]|\\\\[^])*'?`, mark: "\\$\\w+|<\\?php|\\?>",
    keywords: words(`abstract and array as break case catch class const continue declare default do echo else elseif extends final finally fn for foreach
      function if implements instanceof interface match namespace new null or private protected public readonly return static switch throw trait true
      false try use var while yield string int float bool`) },
  lua: { comment: "--[^\\n]*", string: `"(?:[^"\\\\\\n]|\\\\.)*"?|'(?:[^'\\\\\\n]|\\\\.)*'?|\\[\\[[^]*?(?:\\]\\]|$)`,
    keywords: words("and break do else elseif end false for function goto if in local nil not or repeat return then true until while") },
};

const ALIASES = {
  py: "python", python3: "python", js: "javascript", jsx: "javascript", ts: "javascript", tsx: "javascript", typescript: "javascript", mjs: "javascript",
  cpp: "c", "c++": "c", cc: "c", h: "c", hpp: "c", java: "c", "c#": "c", cs: "c", csharp: "c", kotlin: "c", kt: "c", swift: "c", scala: "c", dart: "c",
  cuda: "c", golang: "go", rs: "rust", sh: "shell", bash: "shell", zsh: "shell", console: "shell", jsonc: "json", jsonl: "json", yml: "yaml", toml: "ini",
  conf: "ini", html: "markup", xml: "markup", svg: "markup", vue: "markup", scss: "css", less: "css", rb: "ruby", dockerfile: "shell", makefile: "shell",
};
const PLAIN_NAMES = { js: "javascript", py: "python", ts: "typescript", sh: "shell", rs: "rust", rb: "ruby", yml: "yaml", cpp: "c++", cs: "c#", md: "markdown" };

// Marks that make text read in another order than it runs: in code they are shown, not obeyed.
const REORDERING = /([\u202a-\u202e\u2066-\u2069\u200e\u200f])/;

/** What a block of code is called on the page. */
export function languageName(language) {
  const name = language.toLowerCase().slice(0, 24);
  return Object.hasOwn(PLAIN_NAMES, name) ? PLAIN_NAMES[name] : name;
}

/** A fragment: the code, with spans around what is to be coloured. */
export function highlight(text, language) {
  const fragment = document.createDocumentFragment();
  const name = language.toLowerCase();
  if (name === "diff" || name === "patch") return colourDiff(fragment, text);
  const key = Object.hasOwn(ALIASES, name) ? ALIASES[name] : name;
  const rules = Object.hasOwn(LANGUAGES, key) ? LANGUAGES[key] : null;
  if (!rules || text.length > LONGEST) append(fragment, text, null);
  else colour(fragment, text, rules);
  return fragment;
}

function patternOf(rules) {
  rules.pattern ??= new RegExp([
    rules.comment && `(?<comment>${rules.comment})`,
    `(?<string>${rules.string})`,
    rules.mark && `(?<mark>${rules.mark})`,
    "(?<number>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)[a-zA-Z]{0,3}\\b)",
    "(?<word>[\\p{L}_$][\\p{L}\\d_$]*)",
  ].filter(Boolean).join("|"), "gmu");
  return rules.pattern;
}

function colour(fragment, text, rules) {
  let done = 0;
  for (const match of text.matchAll(patternOf(rules))) {
    const kind = kindOf(match, text, rules);
    if (!kind) continue;
    append(fragment, text.slice(done, match.index), null);
    append(fragment, match[0], kind);
    done = match.index + match[0].length;
  }
  append(fragment, text.slice(done), null);
}

function kindOf({ groups, index, 0: found }, text, rules) {
  if (groups.comment !== undefined) return "comment";
  if (groups.string !== undefined) return rules.property && /^\s*:/.test(text.slice(index + found.length, index + found.length + 8)) ? "mark" : "string";
  if (groups.mark !== undefined) return "mark";
  if (groups.number !== undefined) return "number";
  if (rules.keywords.has(rules.ignoreCase ? found.toLowerCase() : found)) return "keyword";
  return text[index + found.length] === "(" ? "call" : null;
}

function colourDiff(fragment, text) {
  const lines = text.split("\n");
  lines.forEach((line, i) => {
    const kind = line.startsWith("@@") ? "mark" : line.startsWith("+") ? "added" : line.startsWith("-") ? "removed" : null;
    append(fragment, i < lines.length - 1 ? `${line}\n` : line, kind);
  });
  return fragment;
}

function append(fragment, text, kind) {
  if (!text) return;
  const target = kind ? el("span", { class: `code-${kind}` }) : fragment;
  for (const part of text.split(REORDERING)) {
    if (REORDERING.test(part)) target.append(el("span", { class: "code-hidden", text: `U+${part.codePointAt(0).toString(16).toUpperCase()}` }));
    else if (part) target.append(part);
  }
  if (kind) fragment.append(target);
}
