// The list of conversations: by day, searched, renamed, taken away.

import { el, icon } from "./dom.js";
import { titleOf } from "./tree.js";

const DAY = 86_400_000;

export class Sidebar {
  /** `actions`: open, rename, remove, exportJson, exportMarkdown. */
  constructor(list, search, actions) {
    Object.assign(this, { list, search, actions, conversations: [], current: null });
    search.addEventListener("input", () => this.draw());
    document.addEventListener("click", (event) => {
      for (const menu of list.querySelectorAll("details[open]")) if (!menu.contains(event.target)) menu.open = false;
    });
  }

  show(conversations, current) {
    this.conversations = conversations;
    this.current = current;
    this.draw();
  }

  draw() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = this.conversations.filter((conversation) => matches(conversation, words));
    const groups = new Map();
    for (const conversation of found) {
      const name = dayName(conversation.updated);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(conversation);
    }
    const sections = [...groups].map(([name, members]) => el("section", {}, el("h2", { text: name }), el("ul", {}, ...members.map((one) => this.entry(one)))));
    if (!sections.length) sections.push(el("p", { class: "hint", text: words.length ? "Nothing found." : "Conversations will be listed here. They stay in this browser." }));
    this.list.replaceChildren(...sections);
  }

  entry(conversation) {
    const title = conversation.title || titleOf(conversation);
    const here = conversation.id === this.current;
    const open = el("button", { type: "button", class: "entry-open", "aria-current": here ? "page" : null, title, text: title, on: { click: () => this.actions.open(conversation.id) } });
    const item = el("li", { class: here ? "entry here" : "entry", "data-id": conversation.id }, open);
    item.append(this.menu(conversation, item, title));
    return item;
  }

  menu(conversation, item, title) {
    const choice = (name, label, action) => el("button", { type: "button", on: { click: () => { menu.open = false; action(); } } }, icon(name), label);
    const menu = el("details", { class: "menu" }, el("summary", { "aria-label": `More for ${title}`, title: "More" }, icon("more")), el("div", { class: "menu-list" },
      choice("edit", "Rename", () => this.rename(conversation, item, title)),
      choice("export", "Export as Markdown", () => this.actions.exportMarkdown(conversation)),
      choice("export", "Export as JSON", () => this.actions.exportJson(conversation)),
      choice("trash", "Delete", () => this.confirmRemoval(conversation, item, title))));
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation();
      menu.open = false;
      menu.querySelector("summary").focus();
    });
    return menu;
  }

  rename(conversation, item, title) {
    const input = el("input", { type: "text", class: "rename", "aria-label": "New name", maxlength: "200" });
    input.value = title;
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      const name = input.value.trim();
      if (keep && name && name !== title) this.actions.rename(conversation, name);
      else this.draw();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) finish(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    });
    input.addEventListener("blur", () => finish(true));
    item.replaceChildren(input);
    input.focus();
    input.select();
  }

  confirmRemoval(conversation, item, title) {
    const no = el("button", { type: "button", class: "plain small", text: "Keep", on: { click: () => this.draw() } });
    const yes = el("button", { type: "button", class: "danger small", text: "Delete", on: { click: () => this.actions.remove(conversation) } });
    item.replaceChildren(el("div", { class: "confirm", role: "group", "aria-label": `Delete ${title}?` }, el("span", { text: "Delete?" }), no, yes));
    yes.focus();
  }
}

/** Whether every word stands somewhere in the conversation. */
function matches(conversation, words) {
  if (!words.length) return true;
  const texts = [conversation.title || titleOf(conversation), ...[...conversation.nodes.values()].map((node) => node.content)].map((text) => text.toLowerCase());
  return words.every((word) => texts.some((text) => text.includes(word)));
}

function dayName(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  if (time >= midnight - 7 * DAY) return "Last seven days";
  return new Date(time).toLocaleDateString("en", { month: "long", year: "numeric" });
}
