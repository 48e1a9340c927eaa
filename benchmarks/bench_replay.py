"""What does the agent-aware policy keep when there is not room for all of it?

    python -m benchmarks.bench_replay [--short] [--data FOLDER]

Real traces under each eviction order at five capacities, as shares of the distinct blocks: `weka_a`
with the times that its sessions had, begun by a Poisson process so that 16 and 64 are under way;
`mooncake_conversation` as it arrived, which has no sessions; `lmc_miniswe`, `tau_airline` and
`bfcl_multi_turn`, eight sessions taking turns, and again with waits drawn from weka_a's: after a
person from its waits for persons, after a tool from a band of its waits for tools that belongs to
that tool alone. (weka_a has no tool names: its own hints are the kinds of waits. lmc_miniswe does
not say what its agents wait for: they run commands, so all of it counts as one tool.)

`kvmem_events_only` sees prompts and when they come. `kvmem_with_hints` is told as well which agent
sends a prompt and, when its reply is over, what it waits for: a tool by name, a person, nothing.
What it knows of waits it learned while the trace ran. Of the gap between LRU and Belady's order for
prefixes, which knows the future, each closes a share, where the gap is at least two points.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import _corpus
from benchmarks._report import finish
from kvmem.explain.replay import ORDERS, Forest, Played, Prefill, Prompt, play
from kvmem.explain.replay.arrange import as_recorded, at_once, poisson
from kvmem.explain.replay.traces import Recorded, Trace, read_trace

__all__: list[str] = []

SHARES = (0.01, 0.02, 0.05, 0.10, 0.25)
AGENTS = ("lmc_miniswe", "tau_airline", "bfcl_multi_turn")
NAMES = {"kvmem": "kvmem_events_only", "kvmem_hints": "kvmem_with_hints"}
SESSIONS, SEED = 8, 20_261_127
BAND = 0.3  # of the ranks of weka_a's waits for tools, a tool has so many
GAP_POINTS = 2.0


class Waits:
    """Waits drawn from weka_a's."""

    def __init__(self, calls: list[Recorded]) -> None:
        self._of: dict[str, list[float]] = {"tool": [], "user": []}
        for call in calls:
            if call.waited_for in self._of and call.waited_s is not None:
                self._of[call.waited_for].append(call.waited_s)
        for found in self._of.values():
            found.sort()
        self._draw = random.Random(SEED)
        self._kinds: dict[str, str] = {}

    def before(self, call: Recorded, kind: str) -> float:
        """Seconds before a call whose agent waited for this; sets what the call says of it."""
        call.waited_s = self._wait(kind)
        return call.waited_s + 2.0  # two seconds of reply

    def _wait(self, kind: str) -> float:
        if kind == "user":
            return self._draw.choice(self._of["user"])
        waits = self._of["tool"]
        digest = hashlib.sha256(kind.encode()).digest()
        low = int.from_bytes(digest[:4], "little") / 2**32 * (1 - BAND)
        return waits[int((low + BAND * self._draw.random()) * len(waits))]


def arrangements(folder: Path, *, short: bool) -> Iterator[tuple[str, str, Trace, list[Prompt]]]:
    """Name of the set, of the arrangement, the trace, its prompts."""
    waits = None
    if not short:
        weka = read_trace(folder / "weka_a.jsonl.gz")
        waits = Waits(weka.calls)
        for active in (16, 64):
            yield "weka_a", f"{active} active", weka, poisson(weka.calls, active, seed=SEED)
        del weka
        mooncake = read_trace(folder / "mooncake_conversation.jsonl.gz")
        yield "mooncake_conversation", "as it arrived", mooncake, as_recorded(mooncake.calls)
    for name in AGENTS[:1] if short else AGENTS:
        trace = read_trace(folder / f"{name}.jsonl.gz")
        yield name, "taking turns", trace, at_once(trace.calls, SESSIONS, lambda call: SESSIONS)
        if waits is not None:
            before = {}
            last: dict[str, str] = {}
            for call in trace.calls:
                before[id(call)] = last.get(call.agent, "user")
                last[call.agent] = call.kind

            def gap(call: Recorded, waits: Waits = waits, before: Any = before) -> float:
                return waits.before(call, before[id(call)])

            yield name, "drawn waits", trace, at_once(trace.calls, SESSIONS, gap)


def point(found: dict[str, Played]) -> dict[str, Any]:
    """One capacity: each order in both measures, in points, and the share of the gap closed."""
    row: dict[str, Any] = {}
    for measure in ("hit_rate", "saved_rate"):
        got = {NAMES.get(name, name): 100 * getattr(one, measure) for name, one in found.items()}
        gap = got["belady"] - got["lru"]
        row[measure] = {name: round(value, 2) for name, value in got.items()}
        for key, name in (("gap_closed_events", "kvmem_events_only"),
                          ("gap_closed_hints", "kvmem_with_hints")):  # fmt: skip
            closed = (got[name] - got["lru"]) / gap if gap >= GAP_POINTS else None
            row[measure][key] = None if closed is None else round(closed, 3)
    return row


def show(name: str, how: str, share: float, row: dict[str, Any]) -> None:
    """The point as JSON, one line."""
    print(json.dumps({"set": name, "arrangement": how, "capacity": share, **row}), flush=True)


def main() -> None:
    """Prints every point, then the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="lmc_miniswe only, taking turns")
    parser.add_argument("--data", type=Path, help="the folder of the traces")
    args = parser.parse_args()
    folder = _corpus.trace_folder(args.data)
    if folder is None:
        raise SystemExit("bench_replay: no folder of traces; name one with --data")
    rows: list[dict[str, Any]] = []
    blocks, seconds = 0, 0.0
    for name, how, trace, prompts in arrangements(folder, short=args.short):
        forest = Forest([prompt.keys for prompt in prompts])
        n_asked = forest.n_asked
        print(f"{name}, {how}: {len(prompts):,} prompts, {n_asked:,} blocks, "
              f"{forest.n_distinct:,} distinct", flush=True)  # fmt: skip
        for share in SHARES:
            capacity, found = max(1, int(forest.n_distinct * share)), {}
            for order in ORDERS:
                begin = time.perf_counter()
                found[order] = play(
                    prompts, forest, order, capacity,
                    block_tokens=trace.block_tokens, prefill=Prefill(),
                )  # fmt: skip
                if order == "kvmem_hints":
                    blocks, seconds = blocks + n_asked, seconds + time.perf_counter() - begin
            row = point(found)
            rows.append(row)
            show(name, how, share, row)
    finish(summary(rows) | {"kvmem_s_per_million_blocks": seconds / blocks * 1e6})


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The closing line's figures, over both measures."""
    measured = [row[measure] for row in rows for measure in ("hit_rate", "saved_rate")]
    closed = {
        key: [one[key] for one in measured if one[key] is not None]
        for key in ("gap_closed_events", "gap_closed_hints")
    }
    worst = min(one[name] - one["lru"] for one in measured for name in NAMES.values())
    return {
        "mean_gap_closed_events": statistics.mean(closed["gap_closed_events"]),
        "mean_gap_closed_hints": statistics.mean(closed["gap_closed_hints"]),
        "worst_vs_lru_points": worst,
        "points": len(rows),
        "with_a_gap": len(closed["gap_closed_events"]),
    }


if __name__ == "__main__":
    main()
