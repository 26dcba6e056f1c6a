// The page: sends what is typed and chosen, shows what comes back. The connection is in live.js.
import { Gallery } from "./gallery.js";
import { Live } from "./live.js";
import { Past } from "./past.js";
import { Sketch } from "./sketch.js";
import { t, translatePage } from "./text.js";
import { showTimes } from "./times.js";

const $ = (id) => document.getElementById(id);
const PAUSE_MS = 1200; // after that pause in typing a picture goes into the history
const KEY = "onestill.key", KEY_LETTERS = /^[\x21-\x7e]*$/;

const shown = { id: 0, urls: [], seeds: [], request: null, blobs: [] };
let model, live, past, gallery, sketch, pauseTimer, frameAsked = false, paused = false;

const anySeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
const words = () => [$("prompt").value.trim(), chosenStyle()].filter(Boolean).join(", ");
const chosenStyle = () => $("styles").querySelector("[aria-pressed=true]")?.dataset.style ?? "";
const seed = () => Number($("seed").value || 0);
const steps = () => Number($("steps").value);

function store(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name) ?? "";
    localStorage.setItem(name, value);
  } catch {
    return ""; // the browser stores nothing; all else works
  }
}

// --- asking -------------------------------------------------------------------------------------------------------

function fields() {
  const found = { prompt: words(), seed: seed(), num_inference_steps: steps() };
  if ($("size").value) found.size = $("size").value;
  if ($("four").checked) found.n = 4;
  if (sketch.used) found.strength = Number($("strength").value) / 100;
  return found;
}

// At most one request a frame, however fast keys and pens are.
function ask() {
  if (frameAsked) return;
  frameAsked = true;
  requestAnimationFrame(async () => {
    frameAsked = false;
    if (!$("prompt").value.trim()) return blank();
    const image = await sketch.bytes();
    const request = fields();
    if (image && request.num_inference_steps < 2) request.num_inference_steps = 2; // one step would ignore the picture
    live.ask(request, image);
    clearTimeout(pauseTimer);
    paused = false;
    pauseTimer = setTimeout(() => { paused = true; settle(); }, PAUSE_MS);
  });
}

function another() {
  if ($("lock").getAttribute("aria-pressed") === "true") return;
  $("seed").value = anySeed();
  ask();
}

function blank() {
  live.pending = null;
  shown.request = null;
  shown.blobs = [];
  shown.blankedAt = live.nextId;
  $("frame").dataset.count = 0;
  $("pictures").replaceChildren();
  for (const id of ["bar", "parts", "total-of"]) $(id).hidden = true;
  $("total").textContent = "";
  for (const id of ["download", "copy", "share"]) $(id).disabled = true;
  gallery?.offer(null);
  history.replaceState(null, "", location.pathname);
}

// --- showing ------------------------------------------------------------------------------------------------------

async function show(header, blobs, request, took) {
  const urls = blobs.map((blob) => URL.createObjectURL(blob));
  const seeds = header.seeds ?? [header.seed];
  const alt = request.fields.prompt;
  const images = urls.map((url) => Object.assign(new Image(), { src: url, alt }));
  await Promise.all(images.map((image) => image.decode().catch(() => null))); // so that nothing flickers between two pictures
  if (header.id <= shown.id || header.id < (shown.blankedAt ?? 0)) return urls.forEach(URL.revokeObjectURL); // a newer one came first
  shown.urls.forEach(URL.revokeObjectURL);
  Object.assign(shown, { id: header.id, urls, seeds, request, blobs });
  $("pictures").replaceChildren(...(images.length > 1 ? images.map((image, i) => choice(image, seeds[i], alt)) : images));
  $("frame").dataset.count = images.length;
  for (const id of ["download", "copy"]) $(id).disabled = false;
  $("share").disabled = Boolean(request.image);
  $("share").title = request.image ? t("noLink") : "";
  gallery?.offer({ ...request.fields, seed: seeds[0] }, urls[0], Boolean(request.image));
  showTimes(header.timings, took);
  say((header.notes ?? []).join(" "));
  $("left").textContent = header.left === undefined ? "" : t("left", { n: header.left }); // spoken when the typing stops
  if (paused) await settle(); // a model that takes longer than the pause
}

function choice(image, own, prompt) {
  const button = document.createElement("button");
  button.type = "button";
  image.alt = t("choose", { prompt, seed: own });
  button.append(image);
  button.addEventListener("click", () => {
    $("seed").value = own;
    $("four").checked = false;
    ask();
    $("prompt").focus();
  });
  return button;
}

function say(text) {
  if ($("notice").textContent !== text) $("notice").textContent = text;
}

// The typing has stopped: the picture goes into the history and the address, and is announced once.
async function settle() {
  const { request, seeds, blobs } = shown;
  if (!request || request.fields.prompt !== words()) return;
  const entry = shownEntry();
  history.replaceState(null, "", "#" + address(entry));
  $("spoken").textContent = [t("drawn", { prompt: request.fields.prompt, seed: seeds[0] }), $("left").textContent].filter(Boolean).join(". ");
  await past.add(entry, blobs[0]);
}

// The parameters of the picture that is shown, whatever is typed by now.
function shownEntry() {
  const { prompt: all, num_inference_steps, size } = shown.request.fields;
  const style = model.styles.find((one) => all.endsWith(`, ${one}`)) ?? "";
  const prompt = style ? all.slice(0, -`, ${style}`.length) : all;
  return { prompt, style, seed: shown.seeds[0], steps: num_inference_steps, size, fromPicture: Boolean(shown.request.image) };
}

function address(entry) {
  const parts = new URLSearchParams({ prompt: entry.prompt, seed: entry.seed });
  if (entry.style) parts.set("style", entry.style);
  if (entry.steps !== model.num_inference_steps) parts.set("steps", entry.steps);
  if (entry.size !== model.size) parts.set("size", entry.size);
  return parts.toString().replaceAll("+", "%20");
}

function restore(entry) {
  $("prompt").value = entry.prompt ?? "";
  if (/^\d{1,16}$/.test(entry.seed ?? "")) $("seed").value = entry.seed;
  $("steps").value = entry.steps ?? model.num_inference_steps;
  $("steps-out").textContent = steps();
  $("size").value = model.sizes.includes(entry.size) ? entry.size : model.size;
  pressStyle(entry.style ?? "");
  grow();
  ask();
}

// --- files --------------------------------------------------------------------------------------------------------

// The same picture once more, as a PNG that carries its parameters.
async function png() {
  const { request } = shown;
  const headers = live.key ? { authorization: `Bearer ${live.key}` } : {};
  const asked = { ...request.fields, n: 1, output_format: "png" };
  let body;
  if (request.image) {
    body = new FormData();
    for (const [name, value] of Object.entries(asked)) body.append(name, value);
    body.append("image", new Blob([request.image], { type: "image/png" }), "start.png");
  } else {
    delete asked.strength;
    body = JSON.stringify(asked);
    headers["content-type"] = "application/json";
  }
  const answer = await fetch(request.image ? "/v1/images/edits" : "/v1/images/generations", { method: "POST", headers, body });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error?.message ?? answer.statusText);
  const bytes = Uint8Array.from(atob(found.data[0].b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

async function download() {
  const { request, seeds } = shown;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await png());
  const stem = request.fields.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  link.download = `${stem || "picture"}-${seeds[0]}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function copy() {
  if (!navigator.clipboard?.write) return say(t("noCopy"));
  await navigator.clipboard.write([new ClipboardItem({ "image/png": png() })]);
  say(t("copied"));
}

async function share() {
  history.replaceState(null, "", "#" + address(shownEntry()));
  if (!navigator.clipboard?.writeText) return say(t("noCopy"));
  await navigator.clipboard.writeText(location.href);
  say(t("linked"));
}

async function loadFile(file) {
  try {
    await sketch.load(file);
    $("start").open = true;
  } catch {
    say(t("badFile"));
  }
}

// --- the connection -------------------------------------------------------------------------------------------------

function state(name, seconds) {
  $("link").dataset.state = name === "refused" ? "offline" : name;
  $("link-text").textContent = name === "offline" && seconds ? t("retry", { s: seconds }) : t(name === "refused" ? "offline" : name);
  $("frame").classList.toggle("stale", name === "offline" || name === "refused");
}

function refused(error, request, retry) {
  const told = { no_api_key: "needKey", invalid_api_key: "badKey", insufficient_quota: "quota", too_many_connections: "tooMany" }[error.code];
  say(told ? t(told) : error.message);
  if (error.code === "no_api_key" || error.code === "invalid_api_key") askKey();
  if (error.type === "server_error" || error.code === "rate_limit") {
    $("link").dataset.state = "busy";
    $("link-text").textContent = t("busy");
    // The newest request is sent again after a pause.
    setTimeout(() => { if (live.ready) state("live"); if (request) ask(); }, 1000 * Math.min(30, retry ?? 1));
  }
}

function askKey() {
  $("key-field").value = live.key;
  $("key-dialog").returnValue = "";
  $("key-dialog").showModal();
}

function takeKey() {
  // Chromium restores the focus, but sends no keys until the field is focused again.
  $("prompt").blur();
  $("prompt").focus();
  if ($("key-dialog").returnValue !== "save") return;
  const key = $("key-field").value.trim();
  if (!KEY_LETTERS.test(key)) return refused({ code: "invalid_api_key" }); // no header or protocol could carry it
  store(KEY, key);
  say("");
  live.reopen(key);
  gallery?.reload();
}

// --- wiring -------------------------------------------------------------------------------------------------------

function grow() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 3}px`;
}

function pressStyle(name) {
  for (const button of $("styles").children) button.setAttribute("aria-pressed", button.dataset.style === name);
}

function addStyles() {
  for (const style of model.styles) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.style = style;
    button.textContent = style;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      pressStyle(chosenStyle() === style ? "" : style);
      ask();
    });
    $("styles").append(button);
  }
  $("styles-set").hidden = !model.styles.length;
}

function addIdeas() {
  for (const idea of t("ideas").split("; ")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = idea;
    button.addEventListener("click", () => {
      restore({ prompt: idea, style: chosenStyle(), seed: seed(), steps: steps(), size: $("size").value });
      $("prompt").focus();
    });
    $("ideas").append(button);
  }
}

function addSizes() {
  for (const size of model.sizes) $("size").append(new Option(size.replace("x", " × "), size));
  $("size").value = model.size;
  $("size-set").hidden = model.sizes.length < 2;
}

const guarded = (action) => () => action().catch((error) => say(error.message));

function wire() {
  $("prompt").addEventListener("input", () => {
    grow();
    ask();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    another();
  });
  $("form").addEventListener("submit", (event) => event.preventDefault());
  $("seed").addEventListener("input", () => {
    $("seed").value = $("seed").value.replace(/\D/g, "").slice(0, 15);
    ask();
  });
  $("dice").addEventListener("click", () => {
    $("seed").value = anySeed();
    ask();
  });
  $("lock").addEventListener("click", () => {
    const locked = $("lock").getAttribute("aria-pressed") !== "true";
    $("lock").setAttribute("aria-pressed", locked);
    $("hint").textContent = t(locked ? "hintLocked" : "hint");
  });
  for (const id of ["size", "four"]) $(id).addEventListener("change", ask);
  $("steps").addEventListener("input", () => {
    $("steps-out").textContent = steps();
    ask();
  });
  $("strength").addEventListener("input", () => {
    $("strength-out").textContent = `${$("strength").value} %`;
    if (sketch.used) ask();
  });
  $("brush").addEventListener("input", () => (sketch.width = Number($("brush").value)));
  $("undo").addEventListener("click", () => sketch.undo());
  $("clear").addEventListener("click", () => sketch.clear());
  $("upload").addEventListener("change", () => {
    if ($("upload").files[0]) loadFile($("upload").files[0]);
    $("upload").value = "";
  });
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) loadFile(file);
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) loadFile(event.dataTransfer.files[0]);
  });
  $("download").addEventListener("click", guarded(download));
  $("copy").addEventListener("click", guarded(copy));
  $("share").addEventListener("click", guarded(share));
  $("forget").addEventListener("click", () => past.forget());
  $("open-key").addEventListener("click", askKey);
  $("cancel-key").addEventListener("click", () => $("key-dialog").close("cancel"));
  $("key-dialog").addEventListener("close", takeKey);
  addEventListener("hashchange", fromAddress);
}

function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("prompt")) restore(Object.fromEntries(asked));
}

async function start() {
  translatePage();
  const models = await (await fetch("/v1/models")).json();
  model = models.data[0];
  $("prompt").maxLength = model.limits.live_prompt;
  $("steps").max = Math.min(8, model.limits.num_inference_steps);
  $("steps").value = model.num_inference_steps;
  $("steps-out").textContent = steps();
  $("four-set").hidden = model.limits.live_n < 4;
  $("seed").value = anySeed();
  addIdeas();
  addStyles();
  addSizes();
  live = new Live({ state, picture: show, refused });
  if (KEY_LETTERS.test(store(KEY))) live.key = store(KEY);
  sketch = new Sketch($("sketch"), $("colours"), Math.min(...model.size.split("x").map(Number)), ask);
  past = new Past($("history"), restore, (count) => {
    $("forget").hidden = !count;
    $("nohistory").hidden = count > 0;
  });
  wire();
  if (models.gallery) gallery = new Gallery(models.gallery, { key: () => live.key, restore, say });
  live.open();
  fromAddress();
  $("prompt").focus({ preventScroll: true });
}

start().catch((error) => say(error.message));
