// Where the person writes: text, pictures by button, paste or drop.

import { el, icon, iconButton } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MOST = 8; // pictures in one message
const WIDEST = 2048; // pixels; larger pictures are made smaller before they are sent
const HEAVIEST = 3_000_000; // bytes that are sent as they are

export class Composer {
  constructor(form, { onSend, onStop, onEditLast, onProblem }) {
    Object.assign(this, { form, onSend, onStop, onEditLast, onProblem, images: [], sees: false, busy: false });
    this.area = form.querySelector("textarea");
    this.button = form.querySelector("#send");
    this.strip = form.querySelector("#pictures");
    this.file = form.querySelector("#file");
    this.attach = form.querySelector("#attach");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.busy) this.onStop();
      else this.send();
    });
    this.area.addEventListener("keydown", (event) => this.onKey(event));
    this.area.addEventListener("input", () => this.fit());
    this.area.addEventListener("paste", (event) => this.takeFiles(event.clipboardData?.files, event));
    this.attach.addEventListener("click", () => this.file.click());
    this.file.addEventListener("change", () => this.takeFiles(this.file.files).then(() => { this.file.value = ""; }));
    this.acceptDrops();
    this.setBusy(false);
  }

  acceptDrops() {
    const page = document.body;
    page.addEventListener("dragover", (event) => {
      event.preventDefault(); // a file that is dropped beside the target must not replace the page
      page.classList.toggle("dropping", this.sees && event.dataTransfer?.types.includes("Files"));
    });
    page.addEventListener("dragleave", (event) => event.relatedTarget || page.classList.remove("dropping"));
    page.addEventListener("drop", (event) => {
      event.preventDefault();
      page.classList.remove("dropping");
      this.takeFiles(event.dataTransfer?.files);
    });
  }

  onKey(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      if (!this.busy) this.send();
    } else if (event.key === "ArrowUp" && !this.area.value && !this.busy && this.onEditLast()) event.preventDefault();
  }

  send() {
    const text = this.area.value.trim();
    if (!text && !this.images.length) return;
    if (this.onSend(text, this.images) === false) return;
    this.area.value = "";
    this.images = [];
    this.drawImages();
    this.fit();
  }

  fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, window.innerHeight * 0.4)}px`;
    this.setBusy(this.busy);
  }

  setBusy(busy) {
    this.busy = busy;
    const label = busy ? "Stop" : "Send";
    if (this.button.getAttribute("aria-label") !== label) {
      this.button.replaceChildren(icon(busy ? "stop" : "send"));
      this.button.setAttribute("aria-label", label);
      this.button.title = busy ? "Stop (Esc)" : "Send (Enter)";
    }
    this.button.disabled = !busy && !this.area.value.trim() && !this.images.length;
  }

  /** Whether the model that is chosen sees pictures. */
  setSees(sees) {
    this.sees = sees;
    this.attach.hidden = !sees;
    if (!sees && this.images.length) {
      this.images = [];
      this.drawImages();
      this.onProblem("This model sees no pictures: they were taken out of the message.");
    }
  }

  async takeFiles(files, event) {
    const list = [...(files ?? [])];
    if (!list.length) return;
    if (!this.sees) {
      if (list.some((file) => TYPES.includes(file.type)) && !event?.clipboardData?.types.includes("text/plain")) this.onProblem("This model sees no pictures.");
      return;
    }
    event?.preventDefault();
    for (const file of list) {
      if (!TYPES.includes(file.type)) this.onProblem(`${file.name} is not a PNG, JPEG, WebP or GIF picture.`);
      else if (this.images.length >= MOST) this.onProblem(`One message takes ${MOST} pictures at most.`);
      else await this.takePicture(file);
    }
    this.drawImages();
    this.area.focus();
  }

  async takePicture(file) {
    try {
      this.images.push(await asDataUrl(file));
    } catch {
      this.onProblem(`${file.name} cannot be read as a picture.`);
    }
  }

  drawImages() {
    this.strip.replaceChildren(...this.images.map((url, i) => el("div", { class: "thumb" }, el("img", { src: url, alt: `Picture ${i + 1}` }),
      iconButton("close", `Remove picture ${i + 1}`, () => {
        this.images.splice(i, 1);
        this.drawImages();
      }))));
    this.strip.hidden = !this.images.length;
    this.setBusy(this.busy);
  }
}

/** A picture as a data URL; one that is large is drawn smaller first. Throws when the bytes are no picture. */
async function asDataUrl(file) {
  const bitmap = await createImageBitmap(file);
  const scale = WIDEST / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && file.size <= HEAVIEST) return readAsDataUrl(file);
  const canvas = el("canvas", { width: Math.max(1, Math.round(bitmap.width * Math.min(1, scale))), height: Math.max(1, Math.round(bitmap.height * Math.min(1, scale))) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(file.type === "image/png" && file.size <= HEAVIEST ? "image/png" : "image/jpeg", 0.9);
}

function readAsDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
