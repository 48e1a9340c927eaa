"""Recorded calls as prompts on one clock: sessions that ran by themselves are laid side by side."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

from kvmem.errors import ConfigError
from kvmem.explain.replay.play import Prompt
from kvmem.explain.replay.traces import Recorded

__all__ = ["arrange", "as_recorded", "at_once", "poisson"]

Gap = Callable[[Recorded], float]


def arrange(calls: Sequence[Recorded], how: str, *, seed: int = 0) -> list[Prompt]:
    """By the name of an arrangement: recorded, poisson:N or round-robin:N.

    Raises:
        ConfigError: there is none of that name, or the log lacks the times for it.
    """
    name, _, number = how.partition(":")
    if name == "recorded" and not number:
        return as_recorded(calls)
    if name in ("poisson", "round-robin") and number.isdecimal() and int(number) > 0:
        if name == "poisson":
            return poisson(calls, int(number), seed=seed)
        return at_once(calls, int(number), lambda call: float(number))
    raise ConfigError(
        f"no arrangement {how!r}", next_step="Give recorded, poisson:N or round-robin:N."
    )


def as_recorded(calls: Sequence[Recorded]) -> list[Prompt]:
    """On the log's own clock.

    Raises:
        ConfigError: a call has no time.
    """
    return _prompts([(_time_of(call), call) for call in calls])


def poisson(calls: Sequence[Recorded], active: int, *, seed: int = 0) -> list[Prompt]:
    """Sessions with the times that they had, begun at random moments, in random order, such that
    so many are under way on average.

    Raises:
        ConfigError: a call has no time.
    """
    sessions = list(_sessions(calls).values())
    draw = random.Random(seed)
    draw.shuffle(sessions)
    lasting = [_time_of(one[-1]) - _time_of(one[0]) for one in sessions]
    mean_s = max(1e-9, sum(lasting) / len(lasting))
    found, begin_s = [], 0.0
    for session in sessions:
        begin_s += draw.expovariate(active / mean_s)
        first_s = _time_of(session[0])
        found += [(begin_s + _time_of(call) - first_s, call) for call in session]
    return _prompts(found)


def at_once(calls: Sequence[Recorded], n: int, gap: Gap) -> list[Prompt]:
    """So many sessions at once, a new one where one has ended; each call comes `gap(call)` seconds
    after the session's one before it. With the same gap for all they take turns."""
    waiting = list(_sessions(calls).values())
    waiting.reverse()
    found: list[tuple[float, Recorded]] = []
    running: list[tuple[float, int, list[Recorded]]] = []
    for turn in range(min(n, len(waiting))):
        heapq.heappush(running, (float(turn), turn, waiting.pop()[::-1]))
    while running:
        now_s, turn, left = heapq.heappop(running)
        found.append((now_s, left.pop()))
        if not left:
            if not waiting:
                continue
            left = waiting.pop()[::-1]
        heapq.heappush(running, (now_s + gap(left[-1]), turn, left))
    return _prompts(found)


def _sessions(calls: Sequence[Recorded]) -> dict[str, list[Recorded]]:
    sessions: dict[str, list[Recorded]] = {}
    for call in calls:
        sessions.setdefault(call.session, []).append(call)
    return sessions


def _time_of(call: Recorded) -> float:
    if call.at_s is None:
        raise ConfigError("a call of the log has no time", next_step="Use --arrange round-robin:N.")
    return call.at_s


def _prompts(found: list[tuple[float, Recorded]]) -> list[Prompt]:
    """In the order of time; a reply is over when its agent begins to wait."""
    found.sort(key=lambda pair: pair[0])
    replied: dict[int, float] = {}
    before: dict[str, int] = {}
    for i, (at_s, call) in enumerate(found):
        if call.agent and call.agent in before and call.waited_s is not None:
            replied[before[call.agent]] = at_s - call.waited_s
        before[call.agent] = i
    return [
        Prompt(at_s, call.keys, call.agent, call.kind, max(at_s, replied.get(i, at_s)))
        for i, (at_s, call) in enumerate(found)
    ]
