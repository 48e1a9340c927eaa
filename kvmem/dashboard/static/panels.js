// Sums, tiers and their flows, misses, decisions, receipts: all from the overview.

import { count, draw, empty, id, make, put, seconds, share, size, table } from "./parts.js";

export function show(now) {
  id("what").textContent = `${now.model}, process ${now.pid}, ${now.engine}`;
  sums(now);
  put(id("tiers"), ...now.tiers.map(tier));
  causes(now.causes);
  put(id("decisions"), now.decisions.length ? table("The latest first", [["What", (e) => e.event], ["Blocks", (e) => (e.blocks === undefined ? "" : count(e.blocks)), "n"],
    ["Tier", (e) => e.tier ?? ""], ["Why", (e) => e.reason ?? e.cause ?? e.error ?? ""], ["For", (e) => e.request_id ?? ""]], now.decisions) : empty("Nothing was evicted, refused or switched lately."));
  put(id("receipts"), now.receipts.length ? table("The latest first", [["What", (e) => e.action ?? e.event], ["Became", (e) => e.status ?? e.outcome ?? ""],
    ["Why", (e) => e.reason ?? e.error ?? ""], ["Session", (e) => e.session ?? ""], ["Blocks", (e) => (e.blocks === undefined ? "" : count(e.blocks)), "n"]], now.receipts) : empty("No hint was answered lately."));
}

function sums(now) {
  const { device = 0, host = 0, disk = 0, far = 0, computed = 0 } = now.tokens, hit = device + host + disk + far, all = hit + computed;
  const rows = [["Prompt tokens", count(all)], ["Hit", share(hit, all)], ["on the device", share(device, all)], ["on the host", share(host, all)],
    ["on the disk", share(disk, all)], ["in the far store", share(far, all)], ["Computed", count(computed)], ["Running", count(now.running)], ["Sessions", count(now.n_sessions)],
    ["Failures", count(now.failures)], ["Quarantined", count(now.quarantined)]];
  for (const [what, by] of Object.entries(now.off)) rows.push([`${what} off`, `by ${by}`]);
  if (now.last_failure) rows.push(["Last failure", now.last_failure]);
  if (now.events_missed) rows.push(["Events not shown", count(now.events_missed)]);
  id("sums").replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function tier({ tier: one, flows }) {
  const last = flows.at(-1) ?? [0, 0, 0, 0, 0], full = one.capacity_bytes ? one.bytes / one.capacity_bytes : 0;
  const bar = make("div", { class: `bar ${one.name}` });
  bar.style.width = `${Math.min(100, 100 * full)}%`;
  const meter = make("div", { class: "meter", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * full), "aria-label": `${one.name}: fill` }, bar);
  const top = Math.max(1, ...flows.flatMap((f) => [f[2], f[3]]));
  const points = (at) => flows.map((f, i) => `${(i * 300) / Math.max(1, flows.length - 1)},${39 - (37 * f[at]) / top}`).join(" ");
  const spark = draw("svg", { class: "spark", viewBox: "0 0 300 40", preserveAspectRatio: "none", role: "img", "aria-label": `${one.name}: bytes a second in and out, at most ${size(top)}/s; the table below has them` },
    draw("polyline", { class: "in", points: points(2) }), draw("polyline", { class: "out", points: points(3) }));
  return make("div", { class: "tier" }, make("strong", {}, `${one.name}${one.on ? "" : ", OFF"}`), filled(one),
    ...(one.capacity_bytes ? [meter] : []), spark, table(`${one.name}: flows`, [["", (r) => r[0]], ["now", (r) => r[1], "n"], ["since the start", (r) => r[2], "n"]], [
      ["in (solid)", `${size(last[2])}/s`, `${size(one.in_bytes)}, ${count(one.in_blocks)} blocks`], ["out (dashed)", `${size(last[3])}/s`, `${size(one.out_bytes)}, ${count(one.out_blocks)} blocks`],
      ["evicted", `${count(last[4])} blocks/s`, `${count(one.evicted_blocks)} blocks`]]));
}

function filled(one) {
  const moves = `${count(one.under_way)} moves under way`;
  if (!one.capacity_bytes) return ` what it holds is not known here, ${moves}`;
  return ` ${size(one.bytes)} of ${size(one.capacity_bytes)} (${share(one.bytes, one.capacity_bytes)}), ${count(one.blocks)} blocks, ${count(one.leased)} leased, ${moves}`;
}

function causes(found) {
  put(id("causes"), found.length ? table("By the time that computing took, about", [["Reason", (c) => [c.reason, c.role, c.rule, c.tier && `from ${c.tier}`, c.by && `by ${c.by}`].filter(Boolean).join(", ")],
    ["Time", (c) => seconds((c.ms ?? 0) / 1000), "n"], ["Tokens", (c) => count(c.tokens ?? 0), "n"], ["Requests", (c) => count(c.requests ?? 0), "n"], ["What to do", (c) => c.fix ?? ""]], found)
    : empty("No prompt missed in the last hour."));
}
