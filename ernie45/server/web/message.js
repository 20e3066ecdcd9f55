// How one message looks. A view is made once and brought up to date; while an answer grows, only what changed is drawn.

import { copyButton, el, icon, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { children } from "./tree.js";

/** A view of `node`: {root, update()}. `actions`: edit, regenerate, retry, turn, answerTools, giveKey, openImage. */
export function viewOf(conversation, node, actions) {
  if (node.role === "user") return userView(conversation, node, actions);
  if (node.role === "tool") return toolView(node);
  return assistantView(conversation, node, actions);
}

function userView(conversation, node, actions) {
  const bubble = el("div", { class: "bubble", dir: "auto" });
  if (node.images.length) bubble.append(el("div", { class: "pictures" }, ...node.images.map((url, i) => pictureButton(url, i, actions))));
  if (node.content) bubble.append(el("div", { class: "bubble-text", text: node.content }));
  const tools = el("div", { class: "tools" });
  const root = el("article", { class: "message user", "aria-label": "You", "data-id": node.id }, bubble, tools);
  return {
    root,
    update() {
      tools.replaceChildren(...[
        branches(conversation, node, actions), copyButton("Copy message", () => node.content), iconButton("edit", "Edit message", () => startEdit(root, bubble, tools, node, actions)),
      ].filter(Boolean));
    },
    edit: () => startEdit(root, bubble, tools, node, actions),
  };
}

function pictureButton(url, i, actions) {
  const image = el("img", { src: url, alt: `Picture ${i + 1}` });
  return el("button", { type: "button", class: "picture", "aria-label": `Show picture ${i + 1}`, on: { click: () => actions.openImage(url) } }, image);
}

function startEdit(root, bubble, tools, node, actions) {
  if (root.querySelector("form")) return;
  const area = el("textarea", { "aria-label": "Edit message", rows: "2" });
  area.value = node.content;
  const stop = () => {
    form.remove();
    bubble.hidden = tools.hidden = false;
    root.classList.remove("editing");
    root.querySelector("[aria-label='Edit message']")?.focus();
  };
  const send = () => {
    const text = area.value.trim();
    if (!text && !node.images.length) return;
    stop();
    actions.edit(node, text);
  };
  const form = el("form", { class: "edit", on: { submit: (event) => { event.preventDefault(); send(); } } }, area,
    el("div", { class: "row" }, el("span", { class: "hint", text: "The answers so far stay as a branch." }),
      el("button", { type: "button", class: "plain", text: "Cancel", on: { click: stop } }), el("button", { type: "submit", class: "main", text: "Send" })));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      stop();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  bubble.hidden = tools.hidden = true;
  root.classList.add("editing");
  root.append(form);
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function toolView(node) {
  const root = el("article", { class: "message tool", "aria-label": "Tool result" },
    el("details", {}, el("summary", { text: "Tool result" }), el("pre", { tabindex: "0", text: node.content })));
  return { root, update() {} };
}

/** "< 2 / 3 >", when there is more than one. */
function branches(conversation, node, actions) {
  const all = children(conversation, node.parent);
  if (all.length < 2) return null;
  const at = all.indexOf(node);
  const step = (name, label, by, off) => iconButton(name, label, () => actions.turn(node, by), { disabled: off });
  return el("div", { class: "branches", role: "group", "aria-label": "Branches" }, step("left", "Previous branch", -1, at === 0),
    el("span", { text: `${at + 1} / ${all.length}` }), step("right", "Next branch", 1, at === all.length - 1));
}

function assistantView(conversation, node, actions) {
  const thinking = thinkingPart();
  const calls = el("div", { class: "calls" });
  const prose = el("div", { class: "prose", dir: "auto" });
  const waiting = el("div", { class: "waiting", "aria-hidden": "true" }, el("i"), el("i"), el("i"));
  const notice = el("div", { class: "notices" });
  const tools = el("div", { class: "tools" });
  const root = el("article", { class: "message assistant", "aria-label": "Assistant", "data-id": node.id }, thinking.root, prose, calls, waiting, notice, tools);
  let drawn = null;
  return {
    root,
    update() {
      const live = Boolean(node.live);
      root.setAttribute("aria-busy", String(live));
      waiting.hidden = !live || Boolean(node.content || node.reasoning || node.toolCalls.length);
      thinking.update(node);
      if (drawn !== node.content) renderMarkdown(prose, node.content);
      drawn = node.content;
      updateCalls(calls, node.toolCalls);
      notice.replaceChildren(...notices(conversation, node, actions));
      tools.hidden = live;
      if (!live) tools.replaceChildren(...answerTools(conversation, node, actions));
    },
  };
}

function answerTools(conversation, node, actions) {
  return [
    branches(conversation, node, actions), node.content ? copyButton("Copy answer", () => node.content) : null,
    iconButton("again", "Regenerate", () => actions.regenerate(node)), el("span", { class: "numbers", text: numbers(node) }),
  ].filter(Boolean);
}

/** "34 tokens · 12.1 tokens/s · first after 0.42 s · 391 tokens seen": the last are those of pictures in the conversation. */
export function numbers(node) {
  const { tokens, rate, first, seenTokens } = node.timing ?? {};
  const parts = [];
  if (node.model) parts.push(node.model);
  if (tokens) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (rate) parts.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
  if (first !== undefined) parts.push(`first after ${seconds(first)}`);
  if (seenTokens) parts.push(`${seenTokens} tokens seen`);
  return parts.join("  ·  ");
}

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** The thinking, folded; the line that opens it says how long it took. */
function thinkingPart() {
  const label = el("span");
  const body = el("div", { class: "thoughts prose", dir: "auto" });
  const root = el("details", { class: "thinking", hidden: true }, el("summary", {}, icon("right"), label), body);
  let drawn = null;
  const draw = (node) => {
    if (root.open && drawn !== node.reasoning) renderMarkdown(body, (drawn = node.reasoning));
  };
  let current = null;
  root.addEventListener("toggle", () => current && draw(current));
  return {
    root,
    update(node) {
      current = node;
      root.hidden = !node.reasoning;
      const running = node.live && !node.content && !node.toolCalls.length;
      const time = node.timing?.thinking;
      label.textContent = running ? `Thinking${time >= 1 ? `, ${seconds(Math.floor(time))}` : ""}` : time ? `Thought for ${seconds(time)}` : "Thought";
      root.classList.toggle("running", Boolean(running));
      draw(node);
    },
  };
}

function updateCalls(container, calls) {
  calls.forEach((call, i) => {
    const view = container.children[i] ?? container.appendChild(el("details", { class: "call", open: true }, el("summary", {}, icon("right"), el("span")), el("pre", { tabindex: "0" })));
    view.querySelector("span").textContent = call.name || "tool";
    const shown = pretty(call.arguments);
    if (view.querySelector("pre").textContent !== shown) view.querySelector("pre").textContent = shown;
  });
}

function pretty(source) {
  try {
    return JSON.stringify(JSON.parse(source), null, 2);
  } catch {
    return source;
  }
}

function notices(conversation, node, actions) {
  if (node.live) return [];
  const found = [];
  if (node.error) {
    const again = el("button", { type: "button", class: "plain", text: "Try again", on: { click: () => actions.retry(node) } });
    const key = node.wantsKey ? el("button", { type: "button", class: "main", text: "Enter API key", on: { click: () => actions.giveKey(node) } }) : null;
    found.push(el("div", { class: "notice error", role: "alert" }, el("p", { text: node.error }), el("div", { class: "row" }, key, again)));
  } else if (node.finish === "stopped") found.push(el("p", { class: "notice quiet-notice", text: "Stopped." }));
  else if (node.finish === "interrupted") found.push(el("p", { class: "notice quiet-notice", text: "The page was left while this was written." }));
  else if (node.finish === "length") found.push(el("p", { class: "notice quiet-notice", text: "The longest allowed answer was reached." }));
  else if (!node.content && !node.toolCalls.length) found.push(el("p", { class: "notice quiet-notice", text: "The model said nothing." }));
  if (node.toolCalls.length && !children(conversation, node.id).length) found.push(resultForm(node, actions));
  return found;
}

/** Nothing runs in this page: the person says what a tool returned. */
function resultForm(node, actions) {
  const areas = node.toolCalls.map((call) => el("textarea", { rows: "2", "aria-label": `Result of ${call.name}`, placeholder: `What ${call.name || "the tool"} returned` }));
  const send = (event) => {
    event.preventDefault();
    actions.answerTools(node, areas.map((area) => area.value));
  };
  return el("form", { class: "result", on: { submit: send } }, ...areas, el("div", { class: "row" },
    el("span", { class: "hint", text: "Tools are not run here: give their results by hand." }), el("button", { type: "submit", class: "main", text: "Send result" })));
}
