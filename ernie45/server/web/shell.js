// What both pages share: the appearance and the buttons that close a dialog.

import { icon } from "./dom.js";
import { choices } from "./store.js";

/** Joins the choice of appearance to the page and to what the browser keeps. */
export function bindTheme(select) {
  select.value = document.documentElement.dataset.theme ?? "auto";
  select.addEventListener("change", () => {
    const chosen = select.value === "auto" ? null : select.value;
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    choices.write("theme", chosen);
  });
}

/** Gives every `data-close` button its drawing and its work; a click beside a dialog closes it too. */
export function closeButtons() {
  for (const button of document.querySelectorAll("[data-close]")) {
    if (!button.textContent.trim()) button.append(icon("close"));
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
}
