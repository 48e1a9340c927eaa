"""What two arms of the demo come to: the sums, the table, and the figures as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from rich.table import Table

from kvmem.demo.play import Played
from kvmem.demo.server import Tokens
from kvmem.demo.team import Script

__all__ = [
    "Arm",
    "Equality",
    "Summary",
    "compare",
    "new_tokens",
    "percentile",
    "summarise",
    "table",
]


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One arm as it was played: its turns, and the server's own count of prompt tokens."""

    name: str
    turns: list[Played]
    tokens: Tokens
    start_s: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One column of the table; times in seconds, tokens of prompts."""

    name: str
    ttft_p50_s: float
    ttft_p95_s: float
    prompt_tokens: int
    computed_tokens: int
    device_tokens: int
    host_tokens: int
    total_s: float


class Equality(msgspec.Struct, frozen=True):
    """How many turns got the same reply in both arms, and the first that did not, if any."""

    equal: int
    turns: int
    first_different: str | None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, by linear interpolation between ranks.

    REQUIRES: at least one value, and a share within [0, 1].
    """
    assert values
    assert 0.0 <= share <= 1.0
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summarise(arm: Arm) -> Summary:
    """The arm's column."""
    waits = [turn.ttft_s for turn in arm.turns]
    return Summary(
        name=arm.name,
        ttft_p50_s=percentile(waits, 0.50),
        ttft_p95_s=percentile(waits, 0.95),
        prompt_tokens=arm.tokens.total,
        computed_tokens=arm.tokens.computed,
        device_tokens=arm.tokens.device,
        host_tokens=arm.tokens.host,
        total_s=max(turn.end_s for turn in arm.turns),
    )


def compare(one: Sequence[Played], other: Sequence[Played]) -> Equality:
    """Turn by turn: the same reply, letter for letter, to the same turn of the script."""
    theirs = {turn.turn_id: turn.reply for turn in other}
    ordered = sorted(one, key=lambda turn: turn.end_s)
    different = [t.turn_id for t in ordered if theirs.get(t.turn_id) != t.reply]
    turns = len({t.turn_id for t in one} | set(theirs))
    equal = len(one) - len(different)
    return Equality(equal, turns, different[0] if different else None)


def new_tokens(script: Script, turns: Sequence[Played]) -> int:
    """Tokens of the prompts that no earlier prompt held at their place.

    An agent's last prompt holds all its others, and all of the prompt that it was forked from.
    """
    prompts = {turn.turn_id: turn.prompt_tokens for turn in turns}
    last = {turn.agent: prompts[turn.turn_id] for turn in script.turns}
    forked = [prompts[turn.fork_of] for turn in script.turns if turn.fork_of is not None]
    return sum(last.values()) - sum(forked)


def table(alone: Summary, with_kvmem: Summary, equality: Equality) -> Table:
    """The demo's one table: a row a figure, a column an arm."""
    drawn = Table(title="A team of agents on one vLLM", title_justify="left")
    drawn.add_column("")
    for summary in (alone, with_kvmem):
        drawn.add_column(summary.name, justify="right")
    drawn.add_column("kvmem is", justify="right")

    def row(label: str, before: float, after: float, unit: str, word: str) -> None:
        shown = [f"{v:,.2f} s" if unit == "s" else f"{v:,.0f}" for v in (before, after)]
        drawn.add_row(label, *shown, _times(before, after, word) if word else "")

    one, two = alone, with_kvmem
    row("time to first token, p50", one.ttft_p50_s, two.ttft_p50_s, "s", "faster")
    row("time to first token, p95", one.ttft_p95_s, two.ttft_p95_s, "s", "faster")
    row("prompt tokens", one.prompt_tokens, two.prompt_tokens, "", "")
    row("  computed", one.computed_tokens, two.computed_tokens, "", "fewer")
    row("  reused from the device", one.device_tokens, two.device_tokens, "", "")
    row("  reused from the host (kvmem)", one.host_tokens, two.host_tokens, "", "")
    row("total time, tool pauses included", one.total_s, two.total_s, "s", "faster")
    drawn.add_row("outputs equal", "", f"{equality.equal}/{equality.turns}", "")
    return drawn


def _times(before: float, after: float, word: str) -> str:
    if after <= 0:
        return ""
    ratio = before / after
    return f"{ratio:.1f}x {word}" if ratio >= 1 else f"{1 / ratio:.1f}x {_OPPOSITE[word]}"


_OPPOSITE = {"faster": "slower", "fewer": "more"}
