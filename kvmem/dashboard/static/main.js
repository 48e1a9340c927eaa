// Puts the parts together: the stream, the search, the theme.

import { ask, chosen, follow } from "./api.js";
import * as lanes from "./lanes.js";
import * as panels from "./panels.js";
import { id, make, named } from "./parts.js";
import * as tree from "./tree.js";

const state = { paused: false, end: null };

function trouble(text) {
  id("state").textContent = text;
  id("state").classList.toggle("bad", Boolean(text));
}

const safely = (promise) => promise.catch((error) => trouble(error.message));

function told(now) {
  if (state.paused || document.hidden || !now) return;
  trouble(now.error);
  panels.show(now);
  tree.note(now.tree, now.block_tokens);
  safely(tree.refresh(now.tree.version));
  safely(lanes.refresh());
  document.body.dataset.updates = Number(document.body.dataset.updates ?? 0) + 1;
}

function reopen() {
  state.end?.();
  state.end = follow(told, trouble);
}

async function engines() {
  const found = await ask("engines");
  id("engine").replaceChildren(...found.map((name) => make("option", { value: name }, name)));
  id("engine-label").hidden = found.length < 2;
}

async function search(event) {
  event.preventDefault();
  const text = id("query").value.trim();
  if (!text) return;
  const told = await ask("search", { text });
  const nodes = [...told.chains.map(([, node]) => node), ...(told.node ? [told.node] : [])];
  const row = (name, label, go) => make("li", {}, make("button", { "data-key": name, on: { click: go } }, label));
  const sessions = [...new Set(told.chains.map(([session]) => session))];
  const rows = sessions.map((session) => row(session, `session ${named(session)}`, () => safely(lanes.openSession(session))));
  for (const node of new Set(nodes)) if (node) rows.push(row(node, `blocks ${node}…`, () => { safely(tree.go(node)); id("h-tree").scrollIntoView({ block: "start" }); }));
  id("found").hidden = false;
  id("h-found").textContent = rows.length ? `Found for “${text}”` : `Nothing is found for “${text}”`;
  id("found-list").replaceChildren(...rows);
  tree.mark(nodes);
  id("h-found").focus();
}

function theme(value) {
  if (value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
  localStorage.setItem("kvmem-theme", value);
}

id("theme").value = localStorage.getItem("kvmem-theme") ?? "auto";
theme(id("theme").value);
id("theme").addEventListener("change", (event) => theme(event.target.value));
id("search").addEventListener("submit", (event) => safely(search(event)));
id("found-close").addEventListener("click", () => { id("found").hidden = true; tree.mark([]); id("query").focus(); });
id("pause").addEventListener("click", (event) => {
  state.paused = !state.paused;
  event.currentTarget.setAttribute("aria-pressed", String(state.paused));
});
id("engine").addEventListener("change", (event) => { chosen.engine = event.target.value; safely(tree.go("")); reopen(); });
document.addEventListener("visibilitychange", () => { if (document.hidden) { state.end?.(); state.end = null; } else if (!state.end) reopen(); });
tree.start();
lanes.start();
safely(engines());
reopen();
