"""What must not be found: leases and slots that nobody gives back, memory that grows, errors.

Each is looked for where nothing moves: at rest, when no request is under way.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvmem.cli.live import Page

__all__ = ["MOST_GROWTH", "errors_in", "growth", "held_at_rest", "memory_of"]

MOST_GROWTH = 0.02
_ENDS = "[shutdown] API server: shutdown triggered"
_ITS_OWN = "[async_llm.py:"
_ERROR = re.compile(
    r"(?:^|[\s)])(?:ERROR|CRITICAL|FATAL)\b"  # a log's level, after the process's name or first
    r"|Traceback \(most recent call last\)"
    r"|^kvmem: .* failed"
    r"|Fatal Python error|Exception ignored in|Segmentation fault"
)
# A part of a process's command line or title, and what it is called here.
_ROLES = {"EngineCore": "engine", "Worker": "worker", "api_server": "front", "serve": "front"}


def held_at_rest(page: Page | None, metrics: Mapping[str, float]) -> list[str]:
    """What is still held though nothing runs; empty when all is given back.

    Args:
        page: what kvmem says of itself, written since the last request ended.
        metrics: the server's own, by name.
    """
    if page is None:
        return ["kvmem's page is not there"]
    counts = {
        "leases": page.host.leased,
        "reserved slots": page.host.reserved,
        "running requests": metrics["vllm:num_requests_running"],
        "waiting requests": metrics["vllm:num_requests_waiting"],
    }
    return [f"{n:g} {what}" for what, n in counts.items() if n]


def memory_of(pids: Sequence[int]) -> dict[str, int]:
    """Private bytes by what a process is; each process's share of what it has with others.

    Anonymous memory only: kvmem's arena is shared memory with a size of its own, and the pages of
    libraries come and go as the kernel likes.
    """
    totals: dict[str, int] = {}
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            rollup = (folder / "smaps_rollup").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        role = next((role for part, role in _ROLES.items() if part in title), "other")
        n_kib = re.search(r"^Pss_Anon:\s+(\d+) kB", rollup, re.MULTILINE)
        if n_kib is not None:  # a zombie has an empty one
            totals[role] = totals.get(role, 0) + int(n_kib[1]) * 1024
    return totals


def growth(samples: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """The share by which each kind of process grew, and all together, after the warm-up.

    The first third of the samples is the warm-up: until then the device's blocks are touched for
    the first time, say. Of the rest, the last quarter is held against the first.
    """
    rest = samples[len(samples) // 3 :]
    quarter = max(1, len(rest) // 4)
    roles = sorted({role for sample in rest for role in sample})
    ends = {
        role: tuple(
            statistics.median(sample.get(role, 0) for sample in part)
            for part in (rest[:quarter], rest[-quarter:])
        )
        for role in roles
    }
    ends["all"] = tuple(
        statistics.median(sum(sample.values()) for sample in part)
        for part in (rest[:quarter], rest[-quarter:])
    )
    return {role: last / first - 1.0 if first else 1.0 for role, (first, last) in ends.items()}


def errors_in(log: str) -> list[str]:
    """The lines of a server's log that tell of an error.

    But for vLLM's own at its orderly end: its front may find its engine gone before it looks for
    the reason, and then calls that an error.
    """
    running, _, ending = log.partition(_ENDS)
    told = [line for line in running.splitlines() if _ERROR.search(line)]
    later = [line for line in ending.splitlines() if _ERROR.search(line)]
    return told + [line for line in later if _ITS_OWN not in line]
