// Runs before anything is drawn, so that a dark page never flashes light. Not a module: modules wait for the document.
(() => {
  "use strict";
  let stored = null;
  try {
    stored = localStorage.getItem("ernie45.theme");
  } catch {
    // A browser that keeps nothing: the system's own choice holds.
  }
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
})();
