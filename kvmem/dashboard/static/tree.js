// The prefix tree as an icicle: a row a level, a width as its weight, a run of blocks a box.

import { ask } from "./api.js";
import { count, draw, empty, id, make, named, put, table } from "./parts.js";

const ROW = 34, GAP = 1, LEAST = 3;
const FIELDS = ["name", "parent", "start", "blocks", "total", "prompts", "sessions", "tenants", "host", "disk", "hidden", "names"];
const state = { node: "", version: -1, nodes: [], found: new Set(), focus: 0, asking: false };

const objects = (rows) => rows.map((row) => Object.fromEntries(FIELDS.map((field, i) => [field, row[i]])));
const weigh = (node) => (id("weight").value === "prompts" ? node.prompts : node.total);

export async function refresh(version, force = false) {
  if (state.asking || (!force && version === state.version)) return;
  state.asking = true;
  try {
    const width = id("tree-section").clientWidth;
    const query = { node: state.node, weight: id("weight").value, most: Math.max(60, Math.min(500, Math.round(width / 3))) };
    const told = await ask("tree", query);
    if (!told.nodes.length && state.node) { state.node = ""; state.version = -1; return; }
    state.version = told.version;
    state.nodes = objects(told.nodes);
    trail(objects(told.above));
    picture();
    if (!id("tree-table").hidden) asTable();
  } finally {
    state.asking = false;
  }
}

export function go(node) {
  state.node = node;
  state.focus = 0;
  return refresh(-1, true);
}

export function mark(names) {
  state.found = new Set(names);
  picture();
}

function label(node) {
  if (node.hidden) return `${count(node.hidden)} more runs`;
  if (!node.name) return "all prompts";
  const who = node.names.length ? node.names.slice(0, 1).map(named).join() : "";
  return node.sessions > 1 ? `${count(node.sessions)} sessions` : who || `${count(node.prompts)} prompts`;
}

function told(node) {
  if (node.hidden) return `${count(node.hidden)} more runs with ${count(node.total)} blocks of ${count(node.prompts)} prompts, too narrow to draw`;
  const parts = [node.name ? `blocks ${count(node.start)} to ${count(node.start + node.blocks)}` : "all prompts"];
  parts.push(`${count(node.total)} blocks with all below`, `${count(node.prompts)} prompts of ${count(node.sessions)} named sessions`);
  if (node.tenants) parts.push(`${count(node.tenants)} tenants`);
  if (node.name) parts.push(node.host < 0 ? "where it lies is not known" : `${where(node)}`);
  if (node.names.length) parts.push(`sessions ${node.names.join(", ")}${node.sessions > node.names.length ? " and others" : ""}`);
  if (node.name) parts.push(`key ${node.name}…`);
  return parts.join("; ");
}

function where(node) {
  const disk = Math.max(0, node.disk - node.host), gone = node.blocks - node.host - disk;
  return [[node.host, "on the host"], [disk, "on the disk"], [gone, "not here"]]
    .filter(([n]) => n > 0).map(([n, at]) => `${count(n)} ${at}`).join(", ");
}

function layout(width) {
  const below = state.nodes.map(() => []);
  state.nodes.forEach((node, i) => { if (node.parent >= 0) below[node.parent].push(i); });
  const places = [];
  const lay = (i, x, w, level) => {
    places[i] = { x, w, level };
    const children = below[i], own = state.nodes[i];
    // Blocks: a node's own take room beside those below it. Prompts: those that end here do.
    const whole = id("weight").value === "prompts" ? own.prompts : Math.max(1, own.total - own.blocks);
    let at = x;
    for (const child of children) {
      const its = (w * weigh(state.nodes[child])) / Math.max(1, whole);
      lay(child, at, its, level + 1);
      at += its;
    }
  };
  if (state.nodes.length) lay(0, 0, width, 0);
  return { places, below };
}

function picture() {
  const svg = id("tree"), width = svg.clientWidth || id("tree-section").clientWidth - 32;
  const { places, below } = layout(width);
  const shown = state.nodes.map((_, i) => i).filter((i) => places[i] && places[i].w >= LEAST);
  const levels = 1 + Math.max(0, ...shown.map((i) => places[i].level));
  const had = svg.contains(document.activeElement);
  if (!shown.includes(state.focus)) state.focus = 0;
  svg.setAttribute("viewBox", `0 0 ${width} ${levels * ROW}`);
  svg.setAttribute("height", levels * ROW);
  svg.replaceChildren(...shown.map((i) => box(state.nodes[i], i, places[i], below)));
  if (had) svg.querySelector('[tabindex="0"]')?.focus();
}

function box(node, i, { x, w, level }) {
  const y = level * ROW, h = ROW - GAP, kind = node.hidden || (!node.name && node.host < 0) ? "gone" : node.host < 0 ? "unknown" : "gone";
  const group = draw("g", { class: `node${state.found.has(node.name) && node.name ? " found" : ""}`, role: "treeitem", tabindex: i === state.focus ? 0 : -1,
    "aria-level": level + 1, "aria-label": `${label(node)}; ${told(node)}`, "data-at": i });
  group.append(draw("title", {}, `${label(node)}\n${told(node).replaceAll("; ", "\n")}`));
  group.append(draw("rect", { class: kind, x, y, width: w, height: h }));
  const host = node.host > 0 && node.blocks ? (w * node.host) / node.blocks : 0;
  const disk = node.disk > node.host && node.blocks ? (w * (node.disk - Math.max(0, node.host))) / node.blocks : 0;
  if (host) group.append(draw("rect", { class: "host", x, y, width: host, height: h }));
  if (disk) group.append(draw("rect", { class: "disk", x: x + host, y, width: disk, height: h }));
  if (node.sessions > 1) group.append(draw("rect", { class: "shared", x, y, width: w, height: Math.min(7, 2 + Math.log10(node.sessions) * 2) }));
  group.append(draw("rect", { class: "edge", x: x + .5, y: y + .5, width: Math.max(0, w - 1), height: h - 1 }));
  const text = `${label(node)} · ${count(node.hidden || !node.name ? node.total : node.blocks)}`, fits = Math.floor((w - 8) / 6.6);
  if (fits >= 4) group.append(draw("text", { class: host + disk > w / 3 ? "on" : "off", x: x + 4, y: y + 22 },
    text.length > fits ? `${text.slice(0, fits - 1)}…` : text));
  group.addEventListener("click", () => { state.focus = i; enter(node); });
  group.addEventListener("pointerenter", () => { id("tree-told").textContent = told(node); });
  group.addEventListener("focus", () => { id("tree-told").textContent = told(node); });
  return group;
}

function enter(node) {
  if (node.hidden) node = state.nodes[node.parent]; // its parent has more room for them
  if (node.name !== state.node) go(node.name);
}

function trail(above) {
  put(id("trail"), ...above.map((node) =>
    make("button", { "data-key": node.name || "root", on: { click: () => go(node.name) } }, `${label(node)} ›`)));
}

function keys(event) {
  const children = (i) => state.nodes.flatMap((node, at) => (node.parent === i ? [at] : []));
  const here = state.nodes[state.focus];
  if (!here) return;
  const siblings = here.parent < 0 ? [state.focus] : children(here.parent), at = siblings.indexOf(state.focus);
  const next = { ArrowDown: children(state.focus)[0], ArrowUp: here.parent, ArrowRight: siblings[at + 1], ArrowLeft: siblings[at - 1], Home: 0 }[event.key];
  if (event.key === "Enter" || event.key === " ") enter(here);
  else if (event.key === "Backspace") id("trail").lastElementChild?.click();
  else if (next === undefined || next < 0) { if (!event.key.startsWith("Arrow")) return; }
  else if (id("tree").querySelector(`[data-at="${next}"]`)) {
    id("tree").querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    state.focus = next;
    const found = id("tree").querySelector(`[data-at="${next}"]`);
    found.setAttribute("tabindex", "0");
    found.focus();
  }
  event.preventDefault();
}

function asTable() {
  const into = (node) => (node.hidden || !node.name ? label(node) : make("button", { "data-key": node.name, on: { click: () => go(node.name) } }, label(node)));
  const level = (node) => (node.parent < 0 ? 0 : 1 + level(state.nodes[node.parent]));
  put(id("tree-table"), state.nodes.length ? table("Runs of blocks, parents before what goes on from them", [
    ["Run", into], ["Level", level, "n"], ["From block", (n) => count(n.start), "n"], ["Blocks", (n) => count(n.blocks), "n"],
    ["With all below", (n) => count(n.total), "n"], ["Prompts", (n) => count(n.prompts), "n"], ["Sessions", (n) => (n.hidden ? "" : count(n.sessions)), "n"],
    ["Tenants", (n) => (n.hidden ? "" : count(n.tenants)), "n"], ["Where", (n) => (!n.name ? "" : n.host < 0 ? "not known" : where(n))], ["Who", (n) => n.names.join(", ")],
  ], state.nodes) : empty("No prompt is remembered yet."));
}

export function start() {
  id("tree").addEventListener("keydown", keys);
  id("weight").addEventListener("change", () => refresh(-1, true));
  id("tree-as-table").addEventListener("click", (event) => {
    const on = id("tree-table").hidden;
    event.currentTarget.setAttribute("aria-pressed", String(on));
    id("tree-table").hidden = !on;
    id("tree").toggleAttribute("hidden", on);
    on ? asTable() : picture();
  });
  new ResizeObserver(() => { if (state.nodes.length) picture(); }).observe(id("tree-section"));
}

export function note(tree, blockTokens) {
  id("tree-note").textContent = `${count(tree.prompts)} remembered prompts, ${count(tree.blocks)} different blocks of ${blockTokens} tokens; looked at every ${tree.every_s.toFixed(0)} s`;
}

