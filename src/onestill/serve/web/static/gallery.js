// The gallery, where the server has one: a grid of the published pictures, the visitor's own with a button to delete them.
import { server } from "./live.js";
import { t } from "./text.js";

const $ = (id) => document.getElementById(id);
const BIN = "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12M10.5 11v5M13.5 11v5";

export class Gallery {
  // rules: {days, each} from the server; page: {key(), restore(entry), say(text)}
  constructor(rules, page) {
    this.page = page;
    this.next = null;
    this.offered = null;
    this.urls = [];
    $("gallery").hidden = $("show").hidden = false;
    $("gallery-hint").textContent = t("galleryHint", rules);
    $("show-hint").textContent = t("showHint", rules);
    $("show").addEventListener("click", () => this.ask());
    $("more").addEventListener("click", () => this.guarded(this.more()));
    $("show-dialog").addEventListener("close", () => $("show-dialog").returnValue === "save" && this.guarded(this.save()));
    $("delete-dialog").addEventListener("close", () => $("delete-dialog").returnValue === "delete" && this.guarded(this.remove()));
    this.reload();
  }

  guarded(work) {
    return work.catch((error) => this.page.say(error.message));
  }

  async call(path, options = {}) {
    const headers = { ...options.headers };
    if (this.page.key()) headers.authorization = `Bearer ${this.page.key()}`;
    const answer = await fetch(new URL(path, server), { ...options, headers });
    if (answer.ok) return answer;
    const found = await answer.json().catch(() => ({}));
    throw new Error(found.error?.message ?? answer.statusText);
  }

  // The picture that may be published now: its parameters, or null; url: shows it in the dialog.
  offer(fields, url = "", fromPicture = false) {
    this.offered = fields && !fromPicture ? { fields, url } : null;
    $("show").disabled = !this.offered;
    $("show").title = t(fromPicture ? "onlyWords" : "toGallery");
  }

  ask() {
    const { fields, url } = this.offered;
    this.asked = fields;
    $("show-picture").src = url;
    $("show-picture").alt = fields.prompt;
    $("show-words").checked = false;
    $("show-dialog").returnValue = "";
    $("show-dialog").showModal();
  }

  async save() {
    const { prompt, seed, num_inference_steps, size } = this.asked;
    const asked = { prompt, seed, num_inference_steps, size: size ?? null, consent: true, show_prompt: $("show-words").checked };
    const headers = { "content-type": "application/json" };
    const entry = await (await this.call("v1/gallery", { method: "POST", headers, body: JSON.stringify(asked) })).json();
    $("shown").prepend(this.item(entry));
    this.count();
    this.page.say(t("savedHere"));
  }

  async reload() {
    this.next = null;
    this.urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
    $("shown").replaceChildren();
    try {
      await this.more();
    } catch {
      this.count(); // the page itself says where a key is needed
    }
  }

  async more() {
    const after = this.next ? `&after=${encodeURIComponent(this.next)}` : "";
    const found = await (await this.call(`v1/gallery?limit=24${after}`)).json();
    const items = found.data.map((entry) => this.item(entry));
    $("shown").append(...items);
    const again = this.next !== null;
    this.next = found.next;
    this.count();
    if (!again) return;
    this.page.say(t("moreShown", { n: items.length }));
    items[0]?.querySelector("button, img")?.focus();
  }

  count() {
    $("none-shown").hidden = $("shown").childElementCount > 0;
    $("more").hidden = !this.next;
  }

  item(entry) {
    const what = entry.prompt ?? t("wordless", { seed: entry.seed });
    const [item, image] = ["li", "img"].map((name) => document.createElement(name));
    Object.assign(image, { alt: what, loading: "lazy", width: entry.width, height: entry.height });
    this.load(image, entry.url);
    const one = document.createElement(entry.prompt === null ? "div" : "button");
    one.className = "one";
    one.append(image);
    item.append(one);
    if (entry.prompt !== null) {
      one.type = "button";
      image.alt = t("restore", { prompt: entry.prompt, seed: entry.seed });
      one.addEventListener("click", () => {
        this.page.restore({ prompt: entry.prompt, seed: String(entry.seed), steps: entry.num_inference_steps, size: `${entry.width}x${entry.height}` });
        $("prompt").focus();
      });
      const words = document.createElement("p");
      words.textContent = entry.prompt;
      words.setAttribute("aria-hidden", "true"); // the button says it
      item.append(words);
    }
    if (entry.mine) item.append(this.bin(entry, item, image, what));
    return item;
  }

  bin(entry, item, image, what) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "delete";
    button.title = t("delete");
    button.setAttribute("aria-label", t("deleteOne", { what }));
    button.innerHTML = `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${BIN}"/></svg>`;
    button.addEventListener("click", () => {
      this.going = { entry, item };
      $("delete-picture").src = image.src;
      $("delete-picture").alt = what;
      $("delete-dialog").returnValue = "";
      $("delete-dialog").showModal();
    });
    return button;
  }

  async remove() {
    const { entry, item } = this.going;
    await this.call(`v1/gallery/${entry.id}`, { method: "DELETE" });
    const beside = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    this.count();
    (beside?.querySelector("button") ?? $("gallery-title")).focus();
    this.page.say(t("deleted"));
  }

  // An <img> cannot send a key, so where there is one a request fetches the file.
  async load(image, url) {
    if (!this.page.key()) return (image.src = url);
    try {
      image.src = URL.createObjectURL(await (await this.call(url)).blob());
      this.urls.push(image.src);
    } catch {
      image.removeAttribute("src"); // deleted meanwhile
    }
  }
}
