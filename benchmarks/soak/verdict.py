"""What a soak amounts to: one line of JSON, and whether all is well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from benchmarks.soak.oracle import Judgement
from benchmarks.soak.plan import Plan
from benchmarks.soak.traffic import KINDS
from benchmarks.soak.watch import MOST_GROWTH
from kvmem.cli.live import Page

__all__ = ["Evidence", "Verdict", "never_happened", "verdict"]

_SMALL_BYTES = 64 << 20  # a process this small grows by 2 % when it opens a file


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that was seen of one soak."""

    judgement: Judgement
    happened: Mapping[str, int]
    failed: Sequence[str]
    held: Sequence[str]
    growth: Mapping[str, float]
    last_memory: Mapping[str, int]
    log_errors: Sequence[str]
    page: Page | None
    preemptions: int
    left_behind: Sequence[str]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The closing line; docs/benchmarks.md says what each key means."""

    minutes: float
    streams: int
    adapters: int
    answers: int
    distinct: int
    hung_up: int
    wrong: int
    near_ties: int
    drift: float
    failed: int
    held: int
    memory_growth: float
    log_errors: int
    failures: int
    quarantined: int
    preemptions: int
    evictions: int
    blocks_loaded: int
    blocks_stored: int
    rests: int
    never_happened: list[str]
    left_behind: list[str]

    @property
    def trouble(self) -> list[str]:
        """What must not be, by key; empty when all is well."""
        counts = {
            "wrong": self.wrong,
            "failed": self.failed,
            "held": self.held,
            "memory_growth": self.memory_growth > MOST_GROWTH,
            "log_errors": self.log_errors,
            "failures": self.failures,
            "quarantined": self.quarantined,
            "never_happened": len(self.never_happened),
            "left_behind": len(self.left_behind),
        }
        return [name for name, n in counts.items() if n]

    def line(self) -> dict[str, Any]:
        """The verdict as the benchmarks' last line has it."""
        return msgspec.to_builtins(self)


def verdict(plan: Plan, seen: Evidence) -> Verdict:
    """What the evidence amounts to."""
    counters = seen.page.counters if seen.page is not None else None
    judged = seen.judgement
    return Verdict(
        minutes=plan.minutes,
        streams=plan.streams,
        adapters=plan.adapters,
        answers=judged.calls,
        distinct=judged.distinct,
        hung_up=sum(n for what, n in seen.happened.items() if what.startswith("hung up")),
        wrong=len(judged.wrong),
        near_ties=judged.near_ties,
        drift=judged.drift,
        failed=len(seen.failed),
        held=len(seen.held),
        memory_growth=_worst(seen.growth, seen.last_memory),
        log_errors=len(seen.log_errors),
        failures=counters.failures if counters else 0,
        quarantined=counters.quarantined if counters else 0,
        preemptions=seen.preemptions,
        evictions=counters.evictions if counters else 0,
        blocks_loaded=counters.blocks_loaded if counters else 0,
        blocks_stored=counters.blocks_stored if counters else 0,
        rests=seen.happened.get("rest", 0),
        never_happened=never_happened(plan, seen),
        left_behind=list(seen.left_behind),
    )


def never_happened(plan: Plan, seen: Evidence) -> list[str]:
    """What the soak is there for and did not see: without it an error there would pass."""
    counters = seen.page.counters if seen.page is not None else None
    happened = {
        **seen.happened,
        "preemptions": seen.preemptions,
        "evictions": counters.evictions if counters else 0,
        "loads from the host": counters.tokens_hit_host if counters else 0,
        "hits on the device": counters.tokens_hit_device if counters else 0,
    }
    return [what for what in _wanted(plan) if not happened.get(what)]


def _wanted(plan: Plan) -> Iterable[str]:
    yield from (*KINDS, "streamed", "salted", "load off", "store off", "rest")
    yield from ("hung up, whole", "hung up, streamed")
    yield from ("preemptions", "evictions", "loads from the host", "hits on the device")
    if plan.adapters:
        yield "adapter"
    resets = dict.fromkeys(
        name
        for round_ in plan.rounds
        for name in (
            f"reset of {round_.amid} amid" if round_.amid else "",
            f"reset of {round_.at_rest} at rest" if round_.at_rest else "",
            "reset of everything under running requests" if round_.drill else "",
            "drill" if round_.drill else "",
            "switched off" if round_.switched else "",
            "switched on" if round_.switched else "",
        )
        if name
    )
    yield from resets


def _worst(growth: Mapping[str, float], last: Mapping[str, int]) -> float:
    big = [role for role in growth if role == "all" or last.get(role, 0) >= _SMALL_BYTES]
    return max((growth[role] for role in big), default=0.0)
