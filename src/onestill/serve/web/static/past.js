// The history, stored in this browser: the parameters and a thumbnail of each picture.
import { t } from "./text.js";

const NAME = "onestill.past", MOST = 48, SIDE = 128;
const NAMING = ["prompt", "style", "seed", "steps", "size"];

export class Past {
  // list: an <ol>; restore(entry): called when one is chosen; shown(count): called when there are more or fewer
  constructor(list, restore, shown) {
    Object.assign(this, { list, restore, shown });
    try {
      this.entries = JSON.parse(localStorage.getItem(NAME)) ?? [];
    } catch {
      this.entries = [];
    }
    if (!Array.isArray(this.entries)) this.entries = [];
    this.show();
  }

  async add(entry, blob) {
    // A picture with a starting picture is never equal to another, as the starting picture is not stored.
    const same = (one) => !one.fromPicture && NAMING.every((name) => one[name] === entry[name]);
    if (!entry.fromPicture && this.entries.some(same)) return;
    this.entries.unshift({ ...entry, picture: await small(blob) });
    this.entries.length = Math.min(this.entries.length, MOST);
    this.keep();
  }

  forget() {
    this.entries = [];
    this.keep();
  }

  keep() {
    for (;;) {
      try {
        localStorage.setItem(NAME, JSON.stringify(this.entries));
        break;
      } catch {
        if (!this.entries.length) break;
        this.entries.pop(); // the browser's storage is full: the oldest goes
      }
    }
    this.show();
  }

  show() {
    this.list.replaceChildren(...this.entries.map((entry) => this.item(entry)));
    this.shown(this.entries.length);
  }

  item(entry) {
    const [item, button, image, words] = ["li", "button", "img", "span"].map((name) => document.createElement(name));
    button.type = "button";
    image.src = entry.picture;
    image.alt = t("restore", { prompt: [entry.prompt, entry.style].filter(Boolean).join(", "), seed: entry.seed });
    image.loading = "lazy";
    button.append(image);
    button.addEventListener("click", () => this.restore(entry));
    words.textContent = [entry.prompt, entry.style].filter(Boolean).join(", ");
    words.setAttribute("aria-hidden", "true"); // the button says it
    item.append(button, words);
    return item;
  }
}

async function small(blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.min(SIDE, bitmap.width);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.85);
}
