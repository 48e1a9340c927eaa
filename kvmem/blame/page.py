"""One HTML file with all of it: each turn, its arms side by side, and its history coloured.

A piece is the redder the more the answer depends on it: by what leaving it out cost, where that
was measured, else by the share of the question that it has. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from kvmem.blame.values import ARMS, Evidence, Residency, Turn, Verdict

__all__ = ["page"]

MOST_CHARS = 1_200  # of a piece; the rest is counted
_STYLE = """
body{font:14px system-ui,sans-serif;margin:24px;max-width:1100px;color:#222}
table{border-collapse:collapse;margin:8px 0}td,th{padding:3px 10px;text-align:left;
border-bottom:1px solid #ddd;vertical-align:top}.right{color:#06762c}.wrong{color:#a01010}
.piece{white-space:pre-wrap;word-break:break-word;border-left:6px solid #eee;padding:2px 8px;
margin:2px 0;font-family:ui-monospace,monospace;font-size:12px}
.gone{text-decoration:line-through;text-decoration-color:#a01010}h2{margin-top:32px}
"""


def page(tried: Sequence[tuple[Turn, Verdict]]) -> str:
    """The whole file's text; the same for the same turns and verdicts."""
    counts: dict[str, int] = {}
    for _, verdict in tried:
        counts[verdict.fault] = counts.get(verdict.fault, 0) + 1
    summary = ", ".join(f"{n} {fault}" for fault, n in counts.items()) or "no turns"
    arms = "".join(f"<tr><td>{name}<td>{escape(what)}</tr>" for name, what in ARMS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>kvmem blame</title>'
        f"<style>{_STYLE}</style><h1>kvmem blame</h1><p>{len(tried):,} turns: {summary}.</p>"
        + "".join(part for turn, verdict in tried for part in _turn(turn, verdict))
        + f"<h2>The arms</h2><table>{arms}</table></html>\n"
    )


def _turn(turn: Turn, verdict: Verdict) -> Iterator[str]:
    cause = f", {verdict.cause}" if verdict.cause else ""
    yield f"<h2>{escape(verdict.turn)}: {verdict.fault}{cause}</h2>"
    yield (
        f"<p>{escape(verdict.why)} Confidence {min(verdict.confidence, 0.99):.0%}."
        f"{' <b>Fix:</b> ' + escape(verdict.fix) if verdict.fix else ''}</p>"
        f"<p>Asked: {escape(turn.asked)}<br>Expected: {escape(turn.expected or '(a judge)')}"
        f"<br>Answered: {escape(turn.answered or '(not recorded)')}</p>"
    )
    yield (
        "<table><tr><th>arm<th>answer<th>right<th>margin<th>share<th>tokens<th>cached<th>ms</tr>"
    )
    for arm in verdict.arms:
        good = "right" if arm.right else "wrong"
        note = f" <small>({escape(arm.note)})</small>" if arm.note else ""
        yield (
            f"<tr><td>{arm.name}<td>{escape(arm.answer[:200])}{note}<td class={good}>{good}"
            f"<td>{arm.margin:+.2f}<td>{arm.share:.0%}<td>{arm.prompt_tokens:,}"
            f"<td>{arm.cached_tokens:,}<td>{arm.seconds * 1e3:,.0f}</tr>"
        )
    yield "</table><h3>History</h3>"
    weights = _weights(turn, verdict)
    evidence = {one.index: one for one in verdict.evidence}
    residency = {one.index: one for one in verdict.residency}
    served = {(p.role, p.text) for p in turn.served}
    for piece in turn.full:
        gone = "" if (piece.role, piece.text) in served else " gone"
        said = piece.text[:MOST_CHARS]
        more = f" [{len(piece.text) - MOST_CHARS:,} more]" if len(piece.text) > MOST_CHARS else ""
        note = _note(evidence.get(piece.index), residency.get(piece.index))
        yield (
            f'<div class="piece{gone}" style="background:{_colour(weights[piece.index])}">'
            f"<b>{piece.index} {escape(piece.role)}</b>{note} {escape(said)}{more}</div>"
        )
    yield (
        f"<p>{verdict.prompt_tokens:,} tokens replayed, {verdict.cached_tokens:,} of them cached, "
        f"in {verdict.seconds:.2f} s. Struck through: not in the served context as it was said.</p>"
    )


def _weights(turn: Turn, verdict: Verdict) -> list[float]:
    """0..1 of each piece."""
    weights = [0.0] * len(turn.full)
    if verdict.influence:
        most = max((abs(v) for v in verdict.influence), default=0.0) or 1.0
        weights = [max(0.0, value) / most for value in verdict.influence]
    for one in verdict.evidence:
        weights[one.index] = max(weights[one.index], one.coverage, 0.3)
    return weights


def _colour(weight: float) -> str:
    return f"hsl(8,85%,{100 - 28 * min(1.0, weight):.0f}%)"


def _note(evidence: Evidence | None, residency: Residency | None) -> str:
    if evidence is None:
        return ""
    there = "" if residency is None else ", served" if residency.value else f", {residency.cause}"
    gone = f", epoch {residency.epoch}" if residency is not None and residency.epoch else ""
    return f" <i>[evidence by {escape(evidence.why)}{there}{gone}]</i>"
