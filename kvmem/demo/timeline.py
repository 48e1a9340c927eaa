"""The picture: who waited for what, and where each prompt's KV came from.

One row an agent, one panel an arm, one time axis for both. In a row, the upper lane is time (tool
at work, queued, waiting for the first token, decoding) and the lower lane is the turn's prompt
from its first token to its last, divided by source. Drawn from what was recorded, and nothing
else; the same turns give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvmem.demo.play import Played
from kvmem.demo.report import Arm, Summary, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "save", "shares"]

# Okabe and Ito's colours, which readers with any colour vision tell apart.
COLOURS = {
    "computed": "#D55E00",
    "device": "#56B4E9",
    "host": "#009E73",
    "reused": "#7AA6A0",
    "queued": "#F0C6A0",
    "waiting": "#333333",
    "decoding": "#B8B8B8",
    "tool": "#E3E3E3",
}
MEANINGS = {
    "tool": "tool at work",
    "queued": "queued: the device is full or busy",
    "waiting": "waiting for the first token",
    "decoding": "decoding the reply",
    "computed": "prompt: computed",
    "device": "prompt: reused from the device",
    "host": "prompt: reused from the host (kvmem)",
    "reused": "prompt: reused, tier not told",
}
LANE = 0.36  # of a row's height of 1


def shares(turn: Played) -> dict[str, int]:
    """The prompt's tokens by source, in their order in the prompt: a prefix lies on the device,
    what follows it on the host, and the rest is computed. `reused` where the tier is not known.
    """
    if turn.host_tokens is None:
        found = {"reused": turn.cached_tokens, "computed": turn.computed_tokens}
    else:
        device = turn.cached_tokens - turn.host_tokens
        found = {"device": device, "host": turn.host_tokens, "computed": turn.computed_tokens}
    return {source: tokens for source, tokens in found.items() if tokens > 0}


def draw(arms: Sequence[Arm]) -> Figure:
    """The figure: a panel an arm over one time axis, and the sums below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10), layout="constrained")
    figure.suptitle(
        "Who waited for what (upper lane: time), and where each prompt's KV came from "
        "(lower lane: the prompt, first token to last)",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    grid = figure.add_gridspec(len(arms) + 1, 2, height_ratios=[*([4] * len(arms)), 1.5])
    ends_s = max(turn.end_s for arm in arms for turn in arm.turns)
    names = list(dict.fromkeys(t.agent for arm in arms for t in _by_start(arm.turns)))
    for i, arm in enumerate(arms):
        panel = figure.add_subplot(grid[i, :])
        _panel(panel, arm, names, ends_s)
    summaries = [summarise(arm) for arm in arms]
    _tokens(figure.add_subplot(grid[len(arms), 0]), summaries)
    _waits(figure.add_subplot(grid[len(arms), 1]), arms)
    _legend(figure, arms)
    return figure


def save(figure: Figure, folder: Path) -> list[Path]:
    """Writes timeline.svg and timeline.png into `folder`; the answer is where."""
    import matplotlib

    paths = [folder / "timeline.svg", folder / "timeline.png"]
    # Names inside an SVG come from this salt, and its date from metadata: fixed, so that the same
    # turns give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "kvmem", "svg.fonttype": "none"}):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=120, metadata={"Software": None})
    return paths


def _by_start(turns: Sequence[Played]) -> list[Played]:
    return sorted(turns, key=lambda turn: (turn.ready_s, turn.turn_id))


def _panel(panel: Axes, arm: Arm, names: Sequence[str], ends_s: float) -> None:
    rows = {name: len(names) - 1 - i for i, name in enumerate(names)}
    for turn in _by_start(arm.turns):
        _turn(panel, turn, rows[turn.agent])
    total_s = max(turn.end_s for turn in arm.turns)
    waited_s = sum(turn.ttft_s for turn in arm.turns)
    panel.axvline(total_s, color="#333333", linewidth=0.8, linestyle=":")
    panel.set_title(
        f"{arm.name}: {total_s:.1f} s; the agents waited {waited_s:.1f} s in all for first tokens",
        loc="left",
        fontsize=11,
        fontweight="bold",
    )
    panel.set_yticks(list(rows.values()), list(rows))
    panel.set_ylim(-0.6, len(names) - 0.4)
    panel.set_xlim(0, ends_s * 1.01)
    panel.set_xlabel("seconds since the first prompt could be sent", fontsize=9)
    panel.tick_params(length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _turn(panel: Axes, turn: Played, row: int) -> None:
    queued_until_s = min(turn.first_s, turn.sent_s + turn.queued_s)
    spans = (
        ("tool", turn.ready_s, turn.sent_s),
        ("queued", turn.sent_s, queued_until_s),
        ("waiting", queued_until_s, turn.first_s),
        ("decoding", turn.first_s, turn.end_s),
    )
    for phase, start_s, end_s in spans:
        height = LANE * 0.4 if phase == "tool" else LANE
        middle = row + LANE / 2 + 0.02
        panel.barh(
            middle,
            end_s - start_s,
            left=start_s,
            height=height,
            color=COLOURS[phase],
            linewidth=0,
            label=f"{turn.turn_id}:{phase}",
        )
    left_s = turn.sent_s
    for source, tokens in shares(turn).items():
        width_s = (turn.end_s - turn.sent_s) * tokens / turn.prompt_tokens
        panel.barh(
            row - LANE / 2 - 0.02,
            width_s,
            left=left_s,
            height=LANE,
            color=COLOURS[source],
            linewidth=0,
            label=f"{turn.turn_id}:{source}",
        )
        left_s += width_s


def _tokens(panel: Axes, summaries: Sequence[Summary]) -> None:
    for i, summary in enumerate(reversed(summaries)):
        left = 0
        for source in ("device", "host", "computed"):
            tokens = getattr(summary, f"{source}_tokens")
            panel.barh(i, tokens, left=left, color=COLOURS[source], linewidth=0, height=0.6)
            if tokens > 0.06 * summary.prompt_tokens:
                panel.text(
                    left + tokens / 2, i, f"{tokens:,}", ha="center", va="center", fontsize=8
                )
            left += tokens
    panel.set_yticks(range(len(summaries)), [s.name for s in reversed(summaries)])
    panel.set_title("prompt tokens by source", loc="left", fontsize=10)
    panel.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    panel.tick_params(length=0, labelsize=8)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _waits(panel: Axes, arms: Sequence[Arm]) -> None:
    for arm, style in zip(arms, ("--", "-"), strict=False):
        waits = sorted(turn.ttft_s for turn in arm.turns)
        shares_done = [(i + 1) / len(waits) for i in range(len(waits))]
        panel.step(
            waits, shares_done, where="post", color="#333333", linestyle=style, label=arm.name
        )
    panel.set_xscale("log")
    panel.set_ylim(0, 1.02)
    panel.set_ylabel("share of turns", fontsize=8)
    panel.set_xlabel("time to first token, seconds (log)", fontsize=8)
    panel.set_title("how long turns waited", loc="left", fontsize=10)
    panel.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    panel.tick_params(labelsize=8)
    panel.legend(fontsize=8, frameon=False, loc="lower right")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _legend(figure: Figure, arms: Sequence[Arm]) -> None:
    from matplotlib.patches import Patch

    used = {source for arm in arms for turn in arm.turns for source in shares(turn)}
    shown = [k for k in MEANINGS if k in used or k in ("tool", "queued", "waiting", "decoding")]
    figure.legend(
        handles=[Patch(color=COLOURS[k], label=MEANINGS[k]) for k in shown],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
