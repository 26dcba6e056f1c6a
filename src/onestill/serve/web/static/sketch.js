// The picture to start from: an upload on a small canvas, drawn over with finger, pen or mouse.
import { t } from "./text.js";

const COLOURS = { black: "#1d1b19", red: "#e2442f", orange: "#f0862a", yellow: "#f5c83c", green: "#2f9e58", blue: "#2f66d0", purple: "#8148c2", brown: "#8a5a36", white: "#ffffff" };
const UNDO_KEPT = 24;

export class Sketch {
  // side: pixels of the model; changed(): called when there is a new picture to start from, or none any more
  constructor(canvas, palette, side, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.pen = canvas.getContext("2d", { willReadFrequently: true });
    canvas.width = canvas.height = Math.max(256, side);
    this.side = side;
    this.colour = COLOURS.black;
    this.width = 7;
    this.before = [];
    this.blank();
    this.addColours(palette);
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.draw(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (this.last = null));
  }

  get used() { return !this.empty; }

  addColours(palette) {
    for (const [name, colour] of Object.entries(COLOURS)) {
      const button = document.createElement("button");
      button.type = "button";
      button.style.background = colour;
      button.setAttribute("role", "radio");
      button.setAttribute("aria-label", t(name));
      button.title = t(name);
      button.addEventListener("click", () => this.choose(palette, button, colour));
      palette.append(button);
    }
    palette.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const all = [...palette.children];
      const next = all[(all.indexOf(document.activeElement) + step + all.length) % all.length];
      next.focus();
      next.click();
    });
    this.choose(palette, palette.firstElementChild, this.colour);
  }

  choose(palette, chosen, colour) {
    this.colour = colour;
    for (const one of palette.children) {
      one.setAttribute("aria-checked", one === chosen);
      one.tabIndex = one === chosen ? 0 : -1;
    }
  }

  blank() {
    this.pen.fillStyle = "#fff";
    this.pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.empty = true;
  }

  remember() {
    this.before.push([this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height), this.empty]);
    if (this.before.length > UNDO_KEPT) this.before.shift();
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  begin(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.remember();
    this.last = this.at(event);
    this.draw(event);
  }

  draw(event) {
    if (!this.last) return;
    const [x, y] = this.at(event);
    Object.assign(this.pen, { strokeStyle: this.colour, lineWidth: (this.width / 128) * this.canvas.width, lineCap: "round", lineJoin: "round" });
    this.pen.beginPath();
    this.pen.moveTo(...this.last);
    this.pen.lineTo(x, y + 0.01);
    this.pen.stroke();
    this.last = [x, y];
    this.empty = false;
    this.changed();
  }

  undo() {
    const last = this.before.pop();
    if (!last) return;
    this.pen.putImageData(last[0], 0, 0);
    this.empty = last[1];
    this.changed();
  }

  clear() {
    if (this.empty) return;
    this.remember();
    this.blank();
    this.changed();
  }

  async load(file) {
    const bitmap = await createImageBitmap(file);
    this.remember();
    this.blank();
    const side = Math.min(bitmap.width, bitmap.height), full = this.canvas.width;
    this.pen.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, full, full);
    this.empty = false;
    this.changed();
  }

  // The bytes of a PNG of the model's size, or null when nothing was drawn.
  async bytes() {
    if (this.empty) return null;
    const small = new OffscreenCanvas(this.side, this.side);
    const pen = small.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(this.canvas, 0, 0, this.side, this.side);
    return new Uint8Array(await (await small.convertToBlob({ type: "image/png" })).arrayBuffer());
  }
}
