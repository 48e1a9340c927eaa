"""What misses cost: the speed of prefill as it is, and the dearest causes of the last hour."""

from __future__ import annotations

from collections import deque

import msgspec

from kvmem.explain.misses.reasons import fix_of
from kvmem.explain.misses.runs import Run

__all__ = ["LEAST_STEP", "Cause", "Pace", "Sums"]

HOUR_S = 3600.0
BUCKET_S = 60.0
MOST_CAUSES = 64  # a minute; what is beyond is summed up by its reason alone
LEAST_STEP = 32  # tokens: smaller steps are decoding, and say nothing of prefill
SMOOTH = 0.2


class Cause(msgspec.Struct, frozen=True, omit_defaults=True):
    """A reason, and where it lies: summed over requests."""

    reason: str
    role: str = ""
    rule: str = ""
    by: str = ""
    tier: str = ""
    requests: int = 0
    tokens: int = 0
    ms: float = 0.0

    @property
    def fix(self) -> str:
        """What to do about it."""
        return fix_of(self.reason)


class Pace:
    """Seconds that a prompt's token takes to compute: measured between steps of some size."""

    def __init__(self) -> None:
        self.s_per_token = 0.0
        self._began_s: float | None = None
        self._tokens = 0

    @property
    def waits(self) -> bool:
        """Whether the end of a large step is to be seen."""
        return self._tokens >= LEAST_STEP

    def step(self, tokens: int, now_s: float) -> None:
        """A step with so many tokens goes out; small ones after small ones may be left out."""
        if self._began_s is not None and self._tokens >= LEAST_STEP:
            fresh = (now_s - self._began_s) / self._tokens
            old = self.s_per_token
            self.s_per_token = old + SMOOTH * (fresh - old) if old else fresh
        self._began_s, self._tokens = (now_s, tokens) if tokens else (None, 0)


_Key = tuple[str, str, str, str, str]


class Sums:
    """Misses by cause, a minute at a time, over the last hour.

    Thread safety: one thread adds; another may ask for the top beside it.
    """

    def __init__(self) -> None:
        self._minutes: deque[tuple[float, dict[_Key, list[float]]]] = deque()

    def add(self, run: Run, now_s: float, *, times: int = 1) -> None:
        """Counts a run; `times` -1 takes one back that was counted under another reason."""
        while self._minutes and now_s - self._minutes[0][0] > HOUR_S:
            self._minutes.popleft()
        if not self._minutes or now_s - self._minutes[-1][0] >= BUCKET_S:
            self._minutes.append((now_s, {}))
        minute = self._minutes[-1][1]
        key = (run.reason, run.role, run.rule, run.by, run.tier)
        if key not in minute and len(minute) >= MOST_CAUSES:
            key = (run.reason, "", "", "", "")
        row = minute.setdefault(key, [0, 0, 0.0])
        row[0] += times
        row[1] += times * run.tokens
        row[2] += times * run.ms

    def top(self, now_s: float, n: int = 10) -> list[Cause]:
        """The causes that cost most, dearest first: by milliseconds, then by tokens."""
        total: dict[_Key, list[float]] = {}
        # Copies, each made in one step: what is copied may grow meanwhile.
        for began_s, minute in self._minutes.copy():
            if now_s - began_s > HOUR_S:
                continue
            for key, row in minute.copy().items():
                into = total.setdefault(key, [0, 0, 0.0])
                for i, value in enumerate(row):
                    into[i] += value
        causes = [Cause(*key, int(requests), int(tokens), round(ms, 1))
                  for key, (requests, tokens, ms) in total.items() if requests > 0]  # fmt: skip
        return sorted(causes, key=lambda cause: (-cause.ms, -cause.tokens, cause.reason))[:n]
