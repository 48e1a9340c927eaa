"""One report of many benchmarks: Markdown for a terminal or a pull request, HTML with pictures.

The HTML needs nothing beside itself. A bar's length is the figure over its aim, so that one look
says which aims are met; figures without an aim have no bar.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks._page import Aim, Benchmark

__all__ = ["Run", "as_html", "as_markdown"]

MET, MISSED, NO_AIM = "met", "missed", ""


class Run(msgspec.Struct, frozen=True):
    """What became of one benchmark: `state` is "done", "failed" or "left out", `note` says why."""

    name: str
    command: str
    state: str
    seconds: float
    note: str
    environment: dict[str, Any]
    result: dict[str, Any]
    finished: str


def _flat(result: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Key, label and value; a value by arm is one line an arm."""
    lines: list[tuple[str, str, Any]] = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [(key, f"{key}, {arm}", its) for arm, its in value.items()]
        else:
            lines.append((key, key, value))
    return lines


def _verdict(aim: Aim | None, value: Any) -> str:
    met = aim.met(value) if aim is not None else None
    return NO_AIM if met is None else (MET if met else MISSED)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value)
    return f"{value:,}"


def _lines(benchmark: Benchmark, run: Run) -> list[tuple[str, str, str, str]]:
    """Label, figure, aim and verdict of each figure."""
    lines = []
    for key, label, value in _flat(run.result):
        aim = benchmark.keys.get(key)
        text = aim.text if aim is not None else ""
        lines.append((label, _shown(value), text, _verdict(aim, value)))
    return lines


def _of(run: Run) -> str:
    """Where and with what it ran."""
    return ", ".join(f"{key} {value}" for key, value in run.environment.items())


def as_markdown(pairs: Sequence[tuple[Benchmark, Run | None]], title: str) -> str:
    """The report; benchmarks that have not run yet are said to be missing."""
    parts = [f"# {title}", "", _tally(pairs), ""]
    for benchmark, run in pairs:
        parts += [f"## {benchmark.name}", "", f"{benchmark.question.capitalize()}", ""]
        if run is None:
            parts += ["Not run yet.", ""]
            continue
        parts += [f"`{run.command}`: {run.state} in {run.seconds:.0f} s, {run.finished}."]
        if run.note:
            parts += ["", f"> {run.note}"]
        if run.result:
            parts += ["", "| figure | value | aim | |", "| --- | --- | --- | --- |"]
            parts += [f"| {' | '.join(line)} |" for line in _lines(benchmark, run)]
        if run.environment:
            parts += ["", f"{_of(run)}"]
        parts.append("")
    return "\n".join(parts)


def _tally(pairs: Sequence[tuple[Benchmark, Run | None]]) -> str:
    states = [run.state if run is not None else "not run yet" for _, run in pairs]
    verdicts = [
        verdict for b, run in pairs if run is not None for *_, verdict in _lines(b, run) if verdict
    ]
    counts = [f"{states.count(s)} {s}" for s in dict.fromkeys(states)]
    met, missed = verdicts.count(MET), verdicts.count(MISSED)
    return f"{', '.join(counts)}; of {len(verdicts)} aims {met} met, {missed} not."


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .15rem .8rem .15rem 0;
text-align: left; border-bottom: 1px solid #ddd } td.n { text-align: right;
font-variant-numeric: tabular-nums } .met { color: #17743a } .missed { color: #b3261e;
font-weight: 600 } .quiet { color: #666; font-size: 13px } code { font-size: 13px }
"""


def as_html(pairs: Sequence[tuple[Benchmark, Run | None]], title: str) -> str:
    """The report as one page, pictures inside."""
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_tally(pairs))}</p>"]
    for benchmark, run in pairs:
        body += [
            f'<h2 id="{benchmark.name}">{benchmark.name}</h2>',
            f"<p>{html.escape(benchmark.question.capitalize())}</p>",
        ]
        if run is None:
            body.append("<p>Not run yet.</p>")
            continue
        told = f"{run.state} in {run.seconds:.0f} s, {run.finished}"
        body.append(f"<p><code>{html.escape(run.command)}</code>: {html.escape(told)}</p>")
        if run.note:
            body.append(f'<p class="missed">{html.escape(run.note)}</p>')
        if run.result:
            rows = [
                f'<tr><td>{html.escape(label)}</td><td class="n">{html.escape(value)}</td>'
                f'<td>{html.escape(aim)}</td><td class="{verdict}">{verdict}</td></tr>'
                for label, value, aim, verdict in _lines(benchmark, run)
            ]
            body.append(f"<table><tr><th>figure<th>value<th>aim<th></tr>{''.join(rows)}</table>")
            body.append(_picture(benchmark, run))
        body.append(f'<p class="quiet">{html.escape(_of(run))}</p>')
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>"


def _picture(benchmark: Benchmark, run: Run) -> str:
    """An SVG of figures over their aims; empty where none has an aim, or without matplotlib."""
    bars = []
    for key, label, value in _flat(run.result):
        aim = benchmark.keys.get(key)
        if aim is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(aim.value, bool) or aim.value <= 0:
            continue
        bars.append((label, value / aim.value, _verdict(aim, value)))
    if not bars:
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    figure = Figure(figsize=(7, 0.6 + 0.34 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    colours = {MET: "#17743a", MISSED: "#b3261e", NO_AIM: "#888888"}
    axes.barh(
        [label for label, _, _ in bars],
        [min(share, 4.0) for _, share, _ in bars],
        color=[colours[verdict] for _, _, verdict in bars],
    )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("figure / aim (cut off at 4)")
    axes.invert_yaxis()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    drawn = out.getvalue()
    return drawn[drawn.index("<svg") :]
