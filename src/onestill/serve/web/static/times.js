// The time of each stage of a picture: a figure, a bar and a list.
import { t } from "./text.js";

const $ = (id) => document.getElementById(id);
const PARTS = ["queue", "encode", "denoise", "decode", "compress", "network"];

// timings: from the server; took: milliseconds from the request to the picture
export function showTimes(timings, took) {
  const parts = Object.fromEntries(PARTS.map((name) => [name, timings[`${name}_ms`] ?? 0]));
  parts.network = Math.max(0, took - PARTS.reduce((sum, name) => sum + parts[name], 0));
  const text = (ms) => (ms < 10 ? ms.toFixed(1) : Math.round(ms)) + " ms";
  $("total").textContent = text(took);
  const bits = PARTS.map((name, i) => {
    const bit = document.createElement("i");
    bit.className = `part${i}`;
    bit.style.flex = `${parts[name]} 0 0`;
    return bit;
  });
  $("bar").replaceChildren(...bits);
  $("bar").setAttribute("aria-label", PARTS.map((name) => `${t(name)} ${text(parts[name])}`).join(", "));
  const rows = PARTS.map((name, i) => {
    const row = document.createElement("div");
    const [swatch, term, value] = ["i", "dt", "dd"].map((tag) => document.createElement(tag));
    swatch.className = `part${i}`;
    term.textContent = t(name);
    value.textContent = text(parts[name]);
    term.prepend(swatch, " ");
    row.append(term, value);
    return row;
  });
  $("parts").replaceChildren(...rows);
  for (const id of ["bar", "parts", "total-of"]) $(id).hidden = false;
}
