// The panel of a conversation's settings. An empty field means: what the server does when it is not told.

import { readTools } from "./answer.js";
import { el } from "./dom.js";

// name, label, what it does, lowest, highest, step
const FIELDS = [
  ["temperature", "Temperature", "0 always takes the likeliest token; higher is more varied", 0, 2, 0.05],
  ["top_p", "Top p", "The likeliest tokens that together reach this probability", 0.01, 1, 0.01],
  ["top_k", "Top k", "Only this many of the likeliest tokens", 0, 1000, 1],
  ["min_p", "Min p", "Only tokens at least this likely beside the likeliest", 0, 1, 0.01],
  ["repetition_penalty", "Repetition penalty", "Above 1, words that were used become less likely", 0.5, 2, 0.01],
  ["presence_penalty", "Presence penalty", "Above 0, what was said once becomes less likely", -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", "Above 0, what was said often becomes less likely", -2, 2, 0.1],
  ["max_tokens", "Longest answer", "In tokens; thinking counts", 1, 1_000_000, 1],
  ["seed", "Seed", "The same seed gives the same answer", 0, 2_147_483_647, 1],
];

export class SettingsPanel {
  /** `onChange(settings)` after each change; `onKeep()` when the settings are to hold for new conversations. */
  constructor(dialog, { onChange, onKeep }) {
    Object.assign(this, { dialog, onChange, settings: null });
    this.inputs = new Map(FIELDS.map((field) => [field[0], this.numberInput(field)]));
    dialog.querySelector("#sampling").append(...FIELDS.map((field) => this.row(field)));
    this.system = dialog.querySelector("#system");
    this.stop = dialog.querySelector("#stop-strings");
    this.tools = dialog.querySelector("#tools");
    this.thinking = dialog.querySelector("#thinking-mode");
    this.budget = dialog.querySelector("#budget");
    for (const [name, area] of [["system", this.system], ["stop", this.stop], ["tools", this.tools]]) {
      area.addEventListener("input", () => this.set(name, area.value));
    }
    this.tools.addEventListener("change", () => this.checkTools());
    this.thinking.addEventListener("change", () => this.set("thinking", this.thinking.value));
    this.budget.addEventListener("input", () => this.setNumber("budget", this.budget));
    dialog.querySelector("#keep").addEventListener("click", () => onKeep());
    dialog.querySelector("#plain").addEventListener("click", () => this.clear());
  }

  numberInput([name, , help, min, max, step]) {
    const input = el("input", { type: "number", id: `set-${name}`, min, max, step: step === 1 ? 1 : "any", placeholder: "default", inputmode: "decimal", "aria-describedby": `help-${name}`, title: help });
    input.addEventListener("input", () => this.setNumber(name, input));
    return input;
  }

  row([name, label, help]) {
    return el("div", { class: "field" }, el("label", { for: `set-${name}`, text: label }), this.inputs.get(name), el("p", { class: "hint", id: `help-${name}`, text: help }));
  }

  /** Shows the settings of a conversation, and what the chosen model does by itself. */
  show(settings, model) {
    this.settings = settings;
    for (const [name, input] of this.inputs) {
      input.value = settings[name] ?? "";
      const given = model?.defaults?.[name];
      input.placeholder = Number.isFinite(given) ? String(given) : "default";
      input.removeAttribute("aria-invalid");
    }
    this.system.value = settings.system;
    this.stop.value = settings.stop;
    this.tools.value = settings.tools;
    this.checkTools();
    this.dialog.querySelector("#thinking-settings").hidden = model?.thinking === false;
    this.showThinking(settings);
  }

  showThinking(settings) {
    this.thinking.value = settings.thinking;
    this.budget.value = settings.budget ?? "";
    this.budget.disabled = settings.thinking === "off";
  }

  set(name, value) {
    this.settings[name] = value;
    this.showThinking(this.settings);
    this.onChange(this.settings);
  }

  /** A number counts when the browser finds it valid; until then the field is marked and the old value holds. */
  setNumber(name, input) {
    const valid = input.validity.valid;
    input.setAttribute("aria-invalid", String(!valid));
    if (!valid) return;
    this.settings[name] = input.value === "" ? null : Number(input.value);
    this.onChange(this.settings);
  }

  checkTools() {
    let problem = "";
    try {
      if (this.tools.value.trim()) readTools(this.tools.value);
    } catch (error) {
      problem = error.message;
    }
    this.tools.setAttribute("aria-invalid", String(Boolean(problem)));
    this.dialog.querySelector("#tools-problem").textContent = problem;
  }

  clear() {
    for (const name of [...this.inputs.keys(), "budget"]) this.settings[name] = null;
    Object.assign(this.settings, { stop: "", thinking: "auto" });
    this.show(this.settings, null);
    this.onChange(this.settings);
  }
}
