"""One HTML file with all in it: a flame graph of what is computed, and the list of breaks.

A bar is as wide as what was computed for it: file, session, agent, role, and under each role what
was new and what was computed again after a break. A click widens a bar; nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import msgspec

from kvmem.explain.lint.values import Break, FileReport

__all__ = ["page"]

MOST_ROWS = 1_000
_WIDTH, _HEIGHT = 1_200, 20
_NARROWEST = 0.2  # pixels; narrower bars could not be seen
_AGAIN = "computed again"

_STYLE = """
body{font:14px system-ui,sans-serif;margin:24px;max-width:1240px;color:#222}
svg text{font:11px system-ui,sans-serif;pointer-events:none}
rect{stroke:#fff;stroke-width:.5;cursor:pointer}
table{border-collapse:collapse;width:100%}td,th{padding:3px 8px;text-align:left;
border-bottom:1px solid #ddd;vertical-align:top}code{white-space:pre-wrap;word-break:break-all}
"""
_SCRIPT = """
const svg=document.querySelector('svg'),bars=[...svg.querySelectorAll('g')];
const W=+svg.getAttribute('width');
function zoom(x,w){for(const g of bars){const r=g.firstElementChild,t=g.lastElementChild;
const a=(g.dataset.x-x)*W/w,b=g.dataset.w*W/w,l=Math.max(0,a),e=Math.min(W,a+b);
g.style.display=e-l>0.2?'':'none';r.setAttribute('x',l);r.setAttribute('width',Math.max(0,e-l));
t.setAttribute('x',l+3);t.textContent=e-l>30?g.dataset.n.slice(0,Math.floor((e-l)/7)):''}}
for(const g of bars)g.addEventListener('click',()=>zoom(+g.dataset.x,+g.dataset.w));
"""


class _Bar(msgspec.Struct):
    name: str
    size: int = 0
    again: int = 0
    below: dict[str, _Bar] = {}

    def add(self, names: tuple[str, ...], size: int, again: int) -> None:
        self.size += size
        self.again += again
        if names:
            bar = self.below.setdefault(names[0], _Bar(names[0]))
            bar.add(names[1:], size, again)


def page(reports: list[FileReport]) -> str:
    """The whole file's text; the same for the same reports."""
    root = _Bar("all")
    for report in reports:
        for found in report.prefill:
            names = (report.path, found.session, found.agent, found.role)
            if found.new:
                root.add((*names, "new"), found.new, 0)
            if found.again:
                root.add((*names, _AGAIN), found.again, found.again)
    unit = reports[0].unit if reports else "token"
    bars = list(_drawn(root, 0.0, float(_WIDTH), 0, unit)) if root.size else []
    height = (6 if bars else 1) * (_HEIGHT + 1)
    breaks = [found for report in reports for found in report.breaks]
    rows = "".join(map(_row, breaks[:MOST_ROWS]))
    n_breaks = sum(report.n_breaks for report in reports)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>kvmem lint</title>'
        f"<style>{_STYLE}</style><h1>kvmem lint</h1>{''.join(map(_summary, reports))}"
        f"<h2>Computed {unit}s, where they stand</h2>"
        "<p>Red was computed before, and again since its prefix was broken. "
        "Click a bar to widen it, the top one to go back.</p>"
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="flame graph of prefill">{"".join(bars)}</svg>'
        f"<h2>Breaks: {n_breaks:,}{_first(n_breaks)}</h2><table><tr><th>line<th>session, agent, "
        f"turn<th>where<th>rule<th>tokens lost<th>before, now<th>what to do</tr>{rows}</table>"
        f"<script>{_SCRIPT}</script></html>\n"
    )


def _first(n_breaks: int) -> str:
    return f", the first {MOST_ROWS:,}" if n_breaks > MOST_ROWS else ""


def _drawn(bar: _Bar, x: float, width: float, depth: int, unit: str) -> Iterator[str]:
    if width < _NARROWEST:
        return
    name = escape(bar.name, quote=True)
    label = name if width > 30 else ""
    title = f"{name}: {bar.size:,} {unit}s computed, {bar.again:,} of them again"
    y = depth * (_HEIGHT + 1)
    yield (
        f'<g data-x="{x:.3f}" data-w="{width:.3f}" data-n="{name}"><rect x="{x:.3f}" y="{y}" '
        f'width="{width:.3f}" height="{_HEIGHT}" fill="{_colour(bar)}">'
        f"<title>{title}</title></rect>"
        f'<text x="{x + 3:.3f}" y="{y + 14}">{label[: int(width / 7)] if "&" not in label else ""}'
        "</text></g>"
    )
    for below in sorted(bar.below.values(), key=lambda b: (-b.size, b.name)):
        part = width * below.size / bar.size
        yield from _drawn(below, x, part, depth + 1, unit)
        x += part


def _colour(bar: _Bar) -> str:
    """From blue, all of it new, to red, all of it computed before."""
    share = bar.again / bar.size
    return f"hsl({215 + 145 * share:.0f},70%,72%)"


def _summary(report: FileReport) -> str:
    share = report.cached / report.prompt if report.prompt else 0.0
    return (
        f"<p><b>{escape(report.path)}</b> ({report.format}): {report.n_calls:,} calls in "
        f"{report.n_sessions:,} sessions, {share:.1%} of {report.prompt:,} {report.unit}s to be "
        f"found, {report.n_breaks:,} breaks, {report.lost_tokens:,} tokens lost, "
        f"{report.n_faults:,} places that could not be read.</p>"
    )


def _row(found: Break) -> str:
    where = f"{found.part} {found.message}" if found.message is not None else found.part
    return (
        f"<tr><td>{found.line}<td>{escape(found.session)}, {escape(found.agent)}, {found.turn}"
        f"<td>{escape(where)}, {found.unit} {found.at:,}<td>{found.rule} {found.name}"
        f"<td>{found.lost_tokens:,}<td><code>{escape(found.before)}</code><br>"
        f"<code>{escape(found.now)}</code><td>{escape(found.fix)}</tr>"
    )
