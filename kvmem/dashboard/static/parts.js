// What the page's parts share: elements, tables, figures for people. Text is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";

export const id = (name) => document.getElementById(name);

export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

export function draw(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// columns: [heading, row => value, "n" for numbers]; a value may be an element.
export function table(caption, columns, rows) {
  const head = make("tr", {}, ...columns.map(([name, , kind]) => make("th", { scope: "col", class: kind }, name)));
  const body = rows.map((row) =>
    make("tr", {}, ...columns.map(([, value, kind], i) =>
      i ? make("td", { class: kind }, value(row) ?? "") : make("th", { scope: "row", class: kind }, value(row) ?? ""))));
  return make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
}

// Puts new content in place, keeping the focus on the control that has the same data-key.
export function put(place, ...content) {
  const at = place.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const scrolled = [place.scrollTop, place.scrollLeft];
  place.replaceChildren(...content);
  [place.scrollTop, place.scrollLeft] = scrolled;
  if (at !== undefined) place.querySelector(`[data-key="${CSS.escape(at)}"]`)?.focus();
}

export const empty = (text) => make("p", { class: "empty" }, text);

export const count = (n) => Number(n).toLocaleString("en");

export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) { bytes /= 1024; at += 1; }
  return `${bytes.toFixed(at ? 1 : 0)} ${units[at]}`;
}

export const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "");

export const seconds = (s) => (s >= 1 ? `${s.toFixed(1)} s` : `${Math.round(s * 1000)} ms`);

export const named = (session) => session || "(no name)";

export const clock = (s) => new Date(s * 1000).toLocaleTimeString();
