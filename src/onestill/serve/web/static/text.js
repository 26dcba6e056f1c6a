// All text of the page. A language is one more object here; `data-t` in the HTML and `t()` in scripts look texts up.
const LANGUAGES = {
  en: {
    motto: "Type and see", connecting: "Connecting", live: "Live", offline: "Offline", busy: "Busy",
    retry: "Offline; trying again in {s} s", picture: "Picture", empty: "Your picture appears here as you type.",
    prompt: "What do you want to see?", placeholder: "a red apple", hint: "Enter draws another one.",
    hintLocked: "The seed is locked: Enter changes nothing.", style: "Style", seed: "Seed", dice: "Another seed",
    lock: "Keep this seed", steps: "Steps", size: "Size", four: "Four at once", start: "Start from a picture",
    sketch: "Drawing canvas", upload: "Upload", undo: "Undo", clear: "Clear", colour: "Colour", brush: "Brush",
    strength: "How much to change", sketchHint: "Draw, paste or drop a picture; it is drawn over as you go.",
    history: "History", historyHint: "Kept in this browser only.", noHistory: "Pictures you pause at are kept here.",
    forget: "Forget all", download: "PNG", copy: "Copy", share: "Link", wordsToPixels: "key to picture",
    key: "Key", keyTitle: "Your key", save: "Save", cancel: "Cancel",
    keyHint: "With a key you draw beyond the free trial. It stays in this browser.",
    ideas: "a red apple; a blue star; a green leaf",
    drawn: "Drawn: {prompt}, seed {seed}", copied: "The picture is copied.", linked: "The link is copied.", noLink: "A link names pictures from words alone.",
    noCopy: "This browser does not let pages copy; use PNG or the address bar.",
    left: "{n} free pictures left today.", quota: "Today's free pictures are used up; they start anew at midnight UTC. With a key you can go on.",
    needKey: "This server needs a key.", badKey: "This key is not valid.", tooMany: "Too many pages are open here; close one.",
    badFile: "That file is no picture this page can read; take a PNG, JPEG or WebP.", restore: "{prompt}, seed {seed}",
    choose: "Take this one: {prompt}, seed {seed}", red: "red", orange: "orange", yellow: "yellow", green: "green",
    blue: "blue", purple: "purple", brown: "brown", black: "black", white: "white",
    gallery: "Gallery", toGallery: "Save to the gallery", more: "Show more", delete: "Delete", showWords: "Show my words under it",
    galleryHint: "What visitors saved. Each stays for {days} days.", noneShown: "Nothing is shown here yet. The first picture could be yours.",
    showHint: "Everyone who opens this page can see it for {days} days. You can delete it before that, from this browser or with your key.",
    onlyWords: "The gallery takes pictures from words alone.", savedHere: "Saved to the gallery.", deleted: "Deleted from the gallery.",
    deleteTitle: "Delete this picture?", deleteHint: "It is gone for everyone, at once and for good.",
    deleteOne: "Delete from the gallery: {what}", wordless: "Picture {seed}", moreShown: "{n} more pictures.",
    queue: "waiting", encode: "words", denoise: "drawing", decode: "pixels", compress: "file", network: "network",
  },
};

const language = (navigator.languages || [navigator.language]).map((tag) => tag.split("-")[0]).find((tag) => tag in LANGUAGES) || "en";

export function t(name, values = {}) {
  const text = LANGUAGES[language][name] ?? LANGUAGES.en[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (whole, key) => values[key] ?? whole);
}

export function translatePage() {
  document.documentElement.lang = language;
  for (const [attribute, target] of [["data-t-label", "aria-label"], ["data-t-title", "title"], ["data-t-placeholder", "placeholder"]])
    for (const node of document.querySelectorAll(`[${attribute}]`)) node.setAttribute(target, t(node.getAttribute(attribute)));
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
}
