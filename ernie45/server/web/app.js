// The chat: joins store, server and page. Everything that changes a conversation passes through here.

import { makeAnswer } from "./answer.js";
import { ServerError, listModels } from "./api.js";
import { exportJson, exportMarkdown, fileName, importJson, readSettings } from "./archive.js";
import { Composer } from "./composer.js";
import { el, icon } from "./dom.js";
import { seconds } from "./message.js";
import { SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { apiKey, choices, openStore } from "./store.js";
import { bindTheme, closeButtons } from "./shell.js";
import { Thread } from "./thread.js";
import { ROOT, addNode, children, newConversation, path, turn } from "./tree.js";

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = ["Explain how a hash table works", "Write a short poem about rain", "What is the derivative of x² sin x?"];
const BUDGETS = [512, 2048, 8192];
const SAVE_EVERY = 1000; // milliseconds, while an answer grows

class App {
  constructor(store) {
    Object.assign(this, { store, conversations: [], models: [], runs: new Map(), afterKey: null });
    this.sidebar = new Sidebar($("conversations"), $("search"), {
      open: (id) => this.open(id), exportMarkdown, exportJson: (one) => exportJson([one], fileName(one)),
      rename: (one, title) => this.rename(one, title), remove: (one) => this.remove(one),
    });
    this.thread = new Thread($("scroller"), $("thread"), $("to-end"), {
      edit: (node, text) => this.edit(node, text), regenerate: (node) => this.answer(node.parent), retry: (node) => this.retry(node),
      turn: (node, step) => this.turn(node, step), answerTools: (node, results) => this.answerTools(node, results),
      giveKey: (node) => this.askKey(() => this.retry(node)), openImage: (url) => this.openImage(url),
    });
    this.composer = new Composer($("composer"), {
      onSend: (text, images) => this.send(text, images), onStop: () => this.stop(), onEditLast: () => this.thread.editLast(), onProblem: (text) => this.banner(text),
    });
    this.panel = new SettingsPanel($("settings"), { onChange: () => this.settingsChanged(), onKeep: () => this.keepSettings() });
    this.bind();
  }

  async start() {
    this.conversations = await this.store.all();
    if (!this.store.lasting) this.banner("This browser keeps nothing for this page: conversations end with the tab.");
    const wanted = decodeURIComponent(location.hash.slice(1));
    if (this.conversations.some((one) => one.id === wanted)) this.open(wanted);
    else this.fresh();
    await this.loadModels();
  }

  // ---- what is open

  get busy() {
    return this.runs.has(this.current?.id);
  }

  fresh() {
    this.current = newConversation(this.keptSettings());
    this.current.settings.model ||= choices.read("model") ?? "";
    this.show();
    history.replaceState(null, "", location.pathname);
    this.focusMessage();
  }

  open(id) {
    const found = this.conversations.find((one) => one.id === id);
    if (!found || found === this.current) return this.toggleSidebar(false);
    this.current = found;
    this.show();
    history.replaceState(null, "", `#${id}`);
    this.focusMessage();
  }

  /** Not on a phone: there the keyboard would jump up over what is to be read. */
  focusMessage() {
    if (!matchMedia("(pointer: coarse)").matches) $("message").focus();
  }

  show() {
    this.toggleSidebar(false);
    this.thread.show(this.current);
    this.showList();
    this.showModels();
    this.showState();
  }

  showList() {
    this.sidebar.show(this.conversations, this.current.id);
  }

  showState() {
    const empty = this.current.nodes.size === 0;
    $("welcome").hidden = !empty;
    $("thread").hidden = empty;
    this.composer.setBusy(this.busy);
    const name = this.conversations.includes(this.current) ? this.sidebar.list.querySelector("[aria-current]")?.textContent : null;
    document.title = name ? `${name} · ernie45` : "ernie45";
  }

  // ---- messages

  send(text, images) {
    if (this.busy) return false;
    if (!this.models.length) {
      this.loadModels();
      return false;
    }
    const last = path(this.current).at(-1);
    const node = addNode(this.current, last?.id ?? ROOT, { role: "user", content: text, images: [...images] });
    this.answer(node.id);
    return true;
  }

  edit(node, text) {
    this.stop();
    const changed = addNode(this.current, node.parent, { role: "user", content: text, images: [...node.images] });
    this.answer(changed.id);
  }

  /** After an error: the failed answer gives way to the new one, unless something of it is worth keeping. */
  retry(node) {
    if (!node.content && !node.reasoning && !children(this.current, node.id).length) this.current.nodes.delete(node.id);
    this.answer(node.parent);
  }

  answerTools(node, results) {
    let parent = node.id;
    node.toolCalls.forEach((call, i) => {
      parent = addNode(this.current, parent, { role: "tool", content: results[i], toolCallId: call.id }).id;
    });
    this.answer(parent);
  }

  turn(node, step) {
    turn(this.current, node, step);
    this.thread.follows = false;
    this.thread.show(this.current);
    this.save(this.current);
  }

  async answer(parent) {
    const conversation = this.current;
    if (this.runs.has(conversation.id)) return;
    this.banner(null);
    conversation.settings.model = this.model()?.id ?? conversation.settings.model;
    const node = addNode(conversation, parent, { role: "assistant", model: conversation.settings.model, live: true });
    const run = { controller: new AbortController(), node, saved: performance.now() };
    this.runs.set(conversation.id, run);
    if (!this.conversations.includes(conversation)) this.adopt(conversation);
    this.thread.follows = true;
    this.refresh(conversation);
    this.save(conversation);
    this.announce("The model is answering.");
    await makeAnswer(conversation, node, run.controller.signal, () => this.onPiece(conversation, run));
    this.runs.delete(conversation.id);
    conversation.updated = Date.now();
    this.refresh(conversation);
    this.save(conversation);
    this.announce(node.error ?? `The answer is complete${node.timing.total ? ` after ${seconds(node.timing.total)}` : ""}.`);
  }

  onPiece(conversation, run) {
    if (conversation === this.current) this.thread.refresh(run.node);
    if (performance.now() - run.saved < SAVE_EVERY) return;
    run.saved = performance.now();
    this.save(conversation);
  }

  stop() {
    this.runs.get(this.current.id)?.controller.abort();
  }

  adopt(conversation) {
    this.conversations.unshift(conversation);
    history.replaceState(null, "", `#${conversation.id}`);
  }

  refresh(conversation) {
    this.conversations.sort((a, b) => b.updated - a.updated);
    this.showList();
    if (conversation !== this.current) return;
    this.thread.show(conversation);
    this.showState();
  }

  // ---- keeping

  async save(conversation) {
    if (!this.conversations.includes(conversation)) return;
    try {
      await this.store.put(conversation);
    } catch (error) {
      this.banner(`The browser could not keep this conversation: ${error.message || error.name}`);
    }
  }

  rename(conversation, title) {
    Object.assign(conversation, { title, named: true });
    this.save(conversation);
    this.showList();
    this.showState();
  }

  async remove(conversation) {
    this.runs.get(conversation.id)?.controller.abort();
    this.conversations = this.conversations.filter((one) => one !== conversation);
    await this.store.remove(conversation.id);
    if (conversation === this.current) this.fresh();
    else this.showList();
  }

  /** Another tab changed a conversation: what is shown here follows, unless an answer is growing in it here. */
  async follow(id) {
    if (this.runs.has(id)) return;
    const stored = await this.store.get(id);
    this.conversations = this.conversations.filter((one) => one.id !== id);
    if (stored) this.conversations.push(stored);
    this.conversations.sort((a, b) => b.updated - a.updated);
    if (this.current.id !== id) this.showList();
    else if (stored) {
      this.current = stored;
      this.show();
    } else this.fresh();
  }

  async import(file) {
    try {
      const found = await importJson(file);
      for (const conversation of found) {
        this.conversations.unshift(conversation);
        await this.save(conversation);
      }
      this.conversations.sort((a, b) => b.updated - a.updated);
      this.showList();
      this.banner(`${found.length} ${found.length === 1 ? "conversation" : "conversations"} imported.`, "good");
      if (found.length) this.open(found[0].id);
    } catch (error) {
      this.banner(error.message);
    }
  }

  // ---- settings and models

  keptSettings() {
    try {
      return readSettings(JSON.parse(choices.read("settings") ?? "{}"));
    } catch {
      return {};
    }
  }

  keepSettings() {
    choices.write("settings", JSON.stringify(this.current.settings));
    this.announce("New chats will start with these settings.");
    const button = $("keep");
    button.textContent = "Kept";
    setTimeout(() => { button.textContent = "Use for new chats"; }, 1400);
  }

  settingsChanged() {
    this.showThinking();
    this.save(this.current);
  }

  async loadModels() {
    try {
      this.models = await listModels();
      if (this.models.length) this.banner(null);
      else this.banner("The server has no model.", "again");
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.models = [];
      if (error.status === 401 || error.status === 403) this.askKey(null);
      this.banner(error.message, "again");
    }
    this.showModels();
  }

  model() {
    return this.models.find((one) => one.id === this.current.settings.model) ?? this.models[0] ?? null;
  }

  showModels() {
    const select = $("model");
    const chosen = this.model();
    select.disabled = !this.models.length;
    const option = (one, label) => el("option", { value: one.id, text: label });
    const ids = new Set(this.models.map((one) => one.id));
    const entries = this.models.filter((one) => !one.base || !ids.has(one.base)).map((one) => {
      const adapters = this.models.filter((other) => other.base === one.id);
      if (!adapters.length) return option(one, one.id);
      return el("optgroup", { label: one.id }, option(one, one.id), ...adapters.map((other) => option(other, `${one.id} with ${shortName(other)}`)));
    });
    select.replaceChildren(...(entries.length ? entries : [el("option", { text: "No model" })]));
    if (chosen) select.value = chosen.id;
    this.composer.setSees(Boolean(chosen?.vision));
    $("thinking-chip").hidden = chosen?.thinking === false;
    this.showThinking();
  }

  showThinking() {
    const { thinking, budget } = this.current.settings;
    const budgets = budget && !BUDGETS.includes(budget) ? [...BUDGETS, budget].sort((a, b) => a - b) : BUDGETS;
    const entries = [["auto", "Auto"], ["on", "On"], ...budgets.map((n) => [String(n), `Up to ${n.toLocaleString("en")} tokens`]), ["off", "Off"]];
    $("thinking").replaceChildren(...entries.map(([value, text]) => el("option", { value, text })));
    $("thinking").value = thinking !== "off" && budget ? String(budget) : thinking;
  }

  setThinking(value) {
    const budget = /^\d+$/.test(value) ? Number(value) : null;
    Object.assign(this.current.settings, { thinking: budget ? "on" : value, budget });
    this.save(this.current);
  }

  // ---- words and dialogs

  /** A line above the messages. `kind`: "again" offers to ask the server again, "good" is no problem. */
  banner(text, kind = "") {
    const place = $("banner");
    place.hidden = !text;
    place.className = kind === "good" ? "good" : "";
    const again = kind === "again" ? el("button", { type: "button", class: "plain small", text: "Try again", on: { click: () => this.loadModels() } }) : null;
    place.replaceChildren(...[el("span", { text: text ?? "" }), again, el("button", { type: "button", class: "quiet", "aria-label": "Dismiss", on: { click: () => this.banner(null) } }, icon("close"))].filter(Boolean));
  }

  announce(text) {
    $("announcer").textContent = text;
  }

  askKey(then) {
    this.afterKey = then;
    $("key").value = apiKey.read();
    if (!$("key-dialog").open) $("key-dialog").showModal();
    $("key").select();
  }

  async useKey() {
    apiKey.write($("key").value.trim(), $("remember").checked);
    const then = this.afterKey;
    this.afterKey = null;
    $("key-dialog").close();
    await this.loadModels();
    if (then && this.models.length) then();
  }

  openImage(url) {
    $("viewer").querySelector("img").src = url;
    $("viewer").showModal();
  }

  toggleSidebar(open = !document.body.classList.contains("sidebar-open")) {
    document.body.classList.toggle("sidebar-open", open);
    $("veil").hidden = !open;
    if (open) $("search").focus();
  }

  // ---- the person's hands

  bind() {
    for (const [id, name] of [["open-sidebar", "menu"], ["close-sidebar", "close"], ["open-settings", "sliders"], ["attach", "image"], ["to-end", "down"], ["new-icon", "plus"]]) {
      $(id).append(icon(name));
    }
    const click = (id, action) => $(id).addEventListener("click", action);
    click("new-chat", () => this.fresh());
    click("open-sidebar", () => this.toggleSidebar());
    click("close-sidebar", () => this.toggleSidebar(false));
    click("veil", () => this.toggleSidebar(false));
    click("open-settings", () => { this.panel.show(this.current.settings, this.model()); $("settings").showModal(); });
    click("import", () => $("import-file").click());
    click("export-all", () => exportJson(this.conversations, "ernie45-conversations"));
    click("change-key", () => this.askKey(null));
    $("import-file").addEventListener("change", async (event) => {
      for (const file of [...event.target.files]) await this.import(file);
      event.target.value = "";
    });
    $("model").addEventListener("change", (event) => {
      this.current.settings.model = event.target.value;
      choices.write("model", event.target.value);
      this.showModels();
      this.save(this.current);
    });
    $("thinking").addEventListener("change", (event) => this.setThinking(event.target.value));
    $("key-form").addEventListener("submit", (event) => { event.preventDefault(); this.useKey(); });
    $("suggestions").append(...SUGGESTIONS.map((text) => el("li", {}, el("button", { type: "button", text, on: { click: () => this.send(text, []) } }))));
    document.addEventListener("keydown", (event) => this.onKey(event));
    window.addEventListener("hashchange", () => this.open(decodeURIComponent(location.hash.slice(1))));
    this.store.onElsewhere((id) => this.follow(id));
    bindTheme($("theme"));
    closeButtons();
  }

  onKey(event) {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
      event.preventDefault();
      if (!document.querySelector("dialog[open]")) this.fresh();
    } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      if (document.body.classList.contains("sidebar-open")) this.toggleSidebar(false);
      else if (this.busy) this.stop();
    }
  }
}

function shortName(model) {
  return model.id.startsWith(`${model.base}:`) ? model.id.slice(model.base.length + 1) : model.id;
}

new App(await openStore()).start();
