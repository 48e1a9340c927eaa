// Sessions on a timeline: a lane a session, a bar a turn. Below a bar's length its tokens by source.

import { ask } from "./api.js";
import { clock, count, draw, empty, id, make, named, put, seconds, share, table } from "./parts.js";

const state = { first: 0, most: 25, told: null, asking: false };
const SOURCES = [["device", "device"], ["host", "host"], ["disk", "disk"], ["far", "far"], ["computed", "miss"]];
const hits = (one) => one.device + one.host + one.disk + one.far;
const waits = (turn) => turn.disk_s + turn.far_s + turn.load_s;

export async function refresh() {
  if (state.asking) return;
  state.asking = true;
  try {
    state.told = await ask("lanes", { text: id("lanes-text").value, sort: id("lanes-sort").value, span_s: id("lanes-span").value, first: state.first, most: state.most });
    show();
  } finally {
    state.asking = false;
  }
}

function show() {
  const { lanes, n } = state.told;
  const until = Math.min(n, state.first + lanes.length);
  id("lanes-which").textContent = n ? `${count(state.first + 1)} to ${count(until)} of ${count(n)} sessions` : "no session";
  id("lanes-before").disabled = state.first === 0;
  id("lanes-after").disabled = until >= n;
  if (id("lanes-table").hidden) put(id("lanes"), ...(lanes.length ? lanes.map(lane) : [empty("No session has ended a request yet.")]));
  else asTable();
}

function lane({ session, turns }) {
  const open = make("button", { "data-key": session.session, title: named(session.session), on: { click: () => openSession(session.session) } }, named(session.session));
  return make("div", { class: "lane" }, open, bars(session, turns), make("span", {}, `${share(hits(session), session.prompt)} hit`));
}

function bars(session, turns) {
  const { from_s: from, to_s: to } = state.told, x = (s) => (1000 * (Math.max(from, Math.min(to, s)) - from)) / (to - from || 1);
  const svg = draw("svg", { viewBox: "0 0 1000 24", preserveAspectRatio: "none", role: "img",
    "aria-label": `${count(turns.length)} turns in view, ${share(hits(session), session.prompt)} of all prompt tokens hit, waited ${seconds(session.waited_s)}` });
  for (const turn of turns) {
    const start = x(turn.began_s), wide = Math.max(2.5, x(turn.ended_s) - start);
    const group = draw("g", {}, draw("title", {}, text(turn)));
    let at = start;
    for (const [field, kind] of SOURCES) {
      const w = turn.prompt ? (wide * turn[field]) / turn.prompt : 0;
      if (w) group.append(draw("rect", { class: kind, x: at, y: 2, width: w, height: 14 }));
      at += w;
    }
    const waited = waits(turn);
    if (waited > 0) group.append(draw("rect", { class: "wait", x: start, y: 18, width: Math.max(2.5, Math.min(wide, x(turn.began_s + waited) - start)), height: 4 }));
    svg.append(group);
  }
  return svg;
}

function text(turn) {
  return `${turn.request_id}\n${clock(turn.began_s)}, ${seconds(turn.ended_s - turn.began_s)}\n${count(turn.prompt)} tokens: ${count(turn.device)} device, ${count(turn.host)} host, ${count(turn.disk)} disk, ${count(turn.far)} far, ${count(turn.computed)} computed\nwaited ${seconds(waits(turn))} for kvmem`;
}

function asTable() {
  put(id("lanes-table"), state.told.lanes.length ? table("Sessions since the engine's start", [
    ["Session", ({ session: s }) => make("button", { "data-key": s.session, on: { click: () => openSession(s.session) } }, named(s.session))],
    ["Requests", ({ session: s }) => count(s.requests), "n"], ["Prompt tokens", ({ session: s }) => count(s.prompt), "n"],
    ["Device", ({ session: s }) => count(s.device), "n"], ["Host", ({ session: s }) => count(s.host), "n"], ["Disk", ({ session: s }) => count(s.disk), "n"], ["Far", ({ session: s }) => count(s.far), "n"],
    ["Computed", ({ session: s }) => count(s.computed), "n"], ["Hit", ({ session: s }) => share(hits(s), s.prompt), "n"],
    ["Waited", ({ session: s }) => seconds(s.waited_s), "n"], ["Misses", ({ session: s }) => reasons(s.missed)], ["Last", ({ session: s }) => clock(s.last_s)],
  ], state.told.lanes) : empty("No session."));
}

const reasons = (missed) => Object.entries(missed).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]).slice(0, 3).map(([why, n]) => `${why} ${count(n)}`).join(", ");

export async function openSession(name) {
  const told = await ask("session", { name });
  id("session-section").hidden = false;
  id("h-session").textContent = `Session ${named(name)}`;
  const parts = [table("Last requests", [
    ["Request", (t) => t.request_id], ["Began", (t) => clock(t.began_s)], ["Took", (t) => seconds(t.ended_s - t.began_s), "n"], ["Prompt", (t) => count(t.prompt), "n"],
    ["Device", (t) => count(t.device), "n"], ["Host", (t) => count(t.host), "n"], ["Disk", (t) => count(t.disk), "n"], ["Far", (t) => count(t.far), "n"], ["Computed", (t) => count(t.computed), "n"],
    ["Waited", (t) => seconds(waits(t)), "n"]], told.turns)];
  const runs = told.explained.flatMap((one) => one.runs.map((run) => ({ ...run, request: one.request_id })));
  parts.push(runs.length ? table("Why they missed", [
    ["Request", (r) => r.request], ["Reason", (r) => r.reason], ["From token", (r) => count(r.first), "n"], ["Tokens", (r) => count(r.tokens), "n"],
    ["About", (r) => seconds((r.ms ?? 0) / 1000), "n"], ["Where", (r) => [r.role, r.message ?? "", r.tier].filter((v) => v !== "" && v !== undefined).join(" ")]], runs)
    : empty("The engine has no reasons for this session any more: it keeps those of its last requests."));
  if (told.branches.length) parts.push(table("Its prompts, and what of them is here now", [
    ["Request", (b) => b.request_id], ["Tokens", (b) => count(b.prompt), "n"], ["Blocks", (b) => count(b.blocks), "n"],
    ["Device", (b) => (b.device === null ? "?" : count(b.device)), "n"], ["Host", (b) => (b.host === null ? "?" : count(b.host)), "n"], ["Disk", (b) => (b.disk === null ? "?" : count(b.disk)), "n"]], told.branches));
  id("session").replaceChildren(...parts);
  id("h-session").focus();
  id("session-section").scrollIntoView({ block: "nearest" });
}

export function start() {
  const again = () => { state.first = 0; refresh(); };
  for (const name of ["lanes-text", "lanes-sort", "lanes-span"]) id(name).addEventListener("input", again);
  id("lanes-before").addEventListener("click", () => { state.first = Math.max(0, state.first - state.most); refresh(); });
  id("lanes-after").addEventListener("click", () => { state.first += state.most; refresh(); });
  id("session-close").addEventListener("click", () => { id("session-section").hidden = true; id("h-lanes").scrollIntoView({ block: "nearest" }); });
  id("lanes-as-table").addEventListener("click", (event) => {
    const on = id("lanes-table").hidden;
    event.currentTarget.setAttribute("aria-pressed", String(on));
    id("lanes-table").hidden = !on;
    id("lanes").hidden = on;
    if (state.told) show();
  });
}
