"""Counts what goes over a bus: the series of the catalogue's counters, sessions, the last requests.

The subscriber only appends to a bounded queue, since it runs in the thread that emits, which may be
the engine's scheduler. `drain` does the counting, in whichever thread has time: those that read
call it, and so may a thread behind the scheduler. What the queue has no room for is counted as
dropped and not otherwise (I7).
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from kvmem import events
from kvmem.telemetry.live import Histogram, Sample, Session, Turn
from kvmem.telemetry.metrics import MOST_SERIES, OTHER, metric

__all__ = ["Changes", "Meter"]

MOST_WAITING = 8192
MOST_SESSIONS = 10_000
MOST_TURNS = 256
MOST_EVENTS = 256
MOST_OBSERVED = 1024  # that no `Deltas` has taken yet
MOST_TURNS_MISSED = 4096  # requests whose session is remembered for what is told of them later
ID_CHARS = 96  # of a session's or a request's name: they are a client's to choose

Labels = tuple[str, ...]


class Changes(NamedTuple):
    """By series how much more; observations with their metric, and how many of those were lost."""

    counters: dict[tuple[str, Labels], float]
    observed: list[tuple[str, float]]
    lost: int


class Meter:
    """See the module. Thread safety: all methods may be called from any thread.

    Args:
        bus: whose events are counted.
        most_sessions: that are remembered, those used last (I7).
        most_waiting: events that are not counted yet.
    """

    def __init__(
        self,
        bus: events.Bus,
        *,
        most_sessions: int = MOST_SESSIONS,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._waiting: deque[events.Event] = deque()
        self._most_waiting = most_waiting
        self._most_sessions = most_sessions
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], list[float]] = {}
        self._n_series: dict[str, int] = {}
        self._observed: deque[tuple[str, float]] = deque(maxlen=MOST_OBSERVED)
        self._n_observed = 0
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._session_of: OrderedDict[str, str] = OrderedDict()
        self._turns: deque[Turn] = deque(maxlen=MOST_TURNS)
        self._events: deque[events.Event] = deque(maxlen=MOST_EVENTS)
        self._changes: dict[tuple[str, Labels], float] = {}  # since `take_changes`
        self.n_events = 0
        self.dropped = 0
        self.close = bus.subscribe(self._take)

    def _take(self, event: events.Event) -> None:
        if len(self._waiting) >= self._most_waiting:
            self.dropped += 1
            return
        self._waiting.append(event)

    # -- counting ----------------------------------------------------------------------------

    @property
    def waits(self) -> int:
        """Events that are not counted yet."""
        return len(self._waiting)

    @property
    def n_sessions(self) -> int:
        """Sessions that are remembered."""
        return len(self._sessions)

    def drain(self) -> None:
        """Counts what waits."""
        with self._lock:
            self._drain()

    def _drain(self) -> None:
        while self._waiting:
            event = self._waiting.popleft()
            count = _COUNT.get(type(event))
            if count is not None:
                count(self, event)
            self.n_events += 1
            self._events.append(event)

    def _add(self, name: str, labels: Labels, by: float = 1.0) -> None:
        """Adds to a counter's series; one too many counts as "other"."""
        at, values, changes = (name, labels), self._values, self._changes
        if at not in values:
            at = self._admit(name, labels)
            values.setdefault(at, 0.0)
        values[at] += by
        changes[at] = changes.get(at, 0.0) + by

    def _admit(self, name: str, labels: Labels) -> tuple[str, Labels]:
        n = self._n_series.get(name, 0)
        if n >= MOST_SERIES - 1:
            return name, (OTHER,) * len(labels)
        self._n_series[name] = n + 1
        return name, labels

    def count(self, name: str, labels: Labels, by: float = 1.0) -> None:
        """Counts what is no event."""
        with self._lock:
            self._add(name, labels, by)

    def _observe(self, name: str, value: float) -> None:
        bounds = metric(name).buckets
        row = self._histograms.setdefault((name, ()), [0.0] * (len(bounds) + 2))
        at = next((i for i, bound in enumerate(bounds) if value <= bound), len(bounds))
        row[at] += 1
        row[-1] += value
        self._observed.append((name, value))
        self._n_observed += 1

    # -- events ------------------------------------------------------------------------------

    def _answered(self, one: events.Answered) -> None:
        self._add("kvmem_requests_total", ())
        for source in ("device", "host", "disk", "far", "computed"):
            n = getattr(one, source)
            if n:
                self._add("kvmem_prompt_tokens_total", (source,), n)
        if one.disk_s:
            self._observe("kvmem_disk_wait_seconds", one.disk_s)
        if one.far_s:
            self._observe("kvmem_far_wait_seconds", one.far_s)
        name = one.session[:ID_CHARS]
        turn = Turn(
            one.request_id[:ID_CHARS], name, one.began_s, one.ended_s, one.prompt, one.device,
            one.host, one.disk, one.computed, one.disk_s, one.load_s, one.store_s, one.far,
            one.far_s,
        )  # fmt: skip
        self._turns.append(turn)
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = Session(name, first_s=one.began_s)
            if len(self._sessions) > self._most_sessions:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(name)
        session.requests += 1
        session.prompt += one.prompt
        session.device += one.device
        session.host += one.host
        session.disk += one.disk
        session.far += one.far
        session.computed += one.computed
        session.waited_s += one.disk_s + one.far_s + one.load_s
        session.last_s = one.ended_s
        self._session_of[one.request_id] = name
        if len(self._session_of) > MOST_TURNS_MISSED:
            self._session_of.popitem(last=False)

    def _missed(self, one: events.Missed) -> None:
        session = self._sessions.get(self._session_of.get(one.request_id, ""))
        if one.was:
            self._add("kvmem_renamed_tokens_total", (one.was, one.reason), one.tokens)
            if session is not None:
                session.missed[one.was] = session.missed.get(one.was, 0) - one.tokens
                session.missed[one.reason] = session.missed.get(one.reason, 0) + one.tokens
            return
        self._add("kvmem_missed_tokens_total", (one.reason,), one.tokens)
        self._add("kvmem_missed_seconds_total", (one.reason,), one.ms / 1e3)
        if session is not None:
            session.missed[one.reason] = session.missed.get(one.reason, 0) + one.tokens
            session.missed_ms += one.ms

    def _stored(self, one: events.Stored) -> None:
        if one.blocks:
            self._add("kvmem_moved_blocks_total", ("host", "in"), one.blocks)
            self._add("kvmem_moved_bytes_total", ("host", "in"), one.bytes)
            self._observe("kvmem_store_seconds", one.seconds)

    def _loaded(self, one: events.Loaded) -> None:
        self._add("kvmem_moved_blocks_total", (one.tier, "out"), one.blocks)
        self._add("kvmem_moved_bytes_total", (one.tier, "out"), one.bytes)
        self._observe("kvmem_load_seconds", one.seconds)

    def _evicted(self, one: events.Evicted) -> None:
        self._add("kvmem_evicted_blocks_total", (one.tier, one.cause), one.blocks)

    def _quarantined(self, one: events.Quarantined) -> None:
        self._add("kvmem_quarantined_blocks_total", (one.tier, one.reason), one.blocks)

    def _refused(self, one: events.Refused) -> None:
        self._add("kvmem_refused_blocks_total", (one.reason,), one.blocks)

    def _cleared(self, one: events.Cleared) -> None:
        self._add("kvmem_cleared_blocks_total", (one.reason,), one.blocks)

    def _shadowed(self, one: events.Shadowed) -> None:
        outcomes = {"equal": one.equal, "bad": one.bad, "close": one.blocks - one.equal - one.bad}
        for outcome, n in outcomes.items():
            if n:
                self._add("kvmem_shadowed_blocks_total", (outcome,), n)

    def _proof(self, one: events.Proof) -> None:
        self._add("kvmem_proofs_total", (one.tier, "failed" if one.error else "passed"))

    def _tier_off(self, one: events.TierOff) -> None:
        self._add("kvmem_tier_changes_total", (one.tier, "off"))

    def _tier_on(self, one: events.TierOn) -> None:
        self._add("kvmem_tier_changes_total", (one.tier, "on"))

    def _failure(self, one: events.Failure) -> None:
        self._add("kvmem_failures_total", (one.where,))

    # -- reading -----------------------------------------------------------------------------

    def samples(self) -> list[Sample]:
        """Every series that was ever counted."""
        with self._lock:
            self._drain()
            told = [Sample(name, labels, value) for (name, labels), value in self._values.items()]
            for (name, labels), row in self._histograms.items():
                counts = tuple(int(n) for n in row[:-1])
                told.append(Sample(name, labels, Histogram(counts, row[-1])))
        return told

    def disk_waits(self) -> tuple[float, int]:
        """Seconds that requests waited for the disk, and the tokens that they got from there."""
        with self._lock:
            self._drain()
            row = self._histograms.get(("kvmem_disk_wait_seconds", ()))
            tokens = self._values.get(("kvmem_prompt_tokens_total", ("disk",)), 0.0)
            return (row[-1] if row else 0.0), int(tokens)

    def take_changes(self) -> Changes:
        """What was counted since this was asked last, for one who adds it up."""
        with self._lock:
            self._drain()
            counters, self._changes = self._changes, {}
            observed = list(self._observed)
            lost = self._n_observed - len(observed)
            self._observed.clear()
            self._n_observed = 0
        return Changes(counters, observed, lost)

    def sessions(self, most: int) -> tuple[list[Session], int]:
        """The sessions used last, the latest first, and how many are remembered."""
        with self._lock:
            self._drain()
            last = list(islice(reversed(self._sessions.values()), most))
            copied = [msgspec.structs.replace(one, missed=dict(one.missed)) for one in last]
            return copied, len(self._sessions)

    def session(self, name: str) -> tuple[Session | None, list[Turn]]:
        """One session and those of the last requests that are its own."""
        with self._lock:
            self._drain()
            found = self._sessions.get(name)
            if found is not None:
                found = msgspec.structs.replace(found, missed=dict(found.missed))
            return found, [turn for turn in self._turns if turn.session == name]

    def turns(self) -> list[Turn]:
        """The last requests that are over, oldest first."""
        with self._lock:
            self._drain()
            return list(self._turns)

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """The last events as JSON has them, oldest first: those after the first `since`."""
        with self._lock:
            self._drain()
            new = min(len(self._events), max(0, self.n_events - since))
            told = list(self._events)[len(self._events) - new :]
        return [msgspec.to_builtins(event) for event in told]


_COUNT: dict[type[events.Event], Callable[[Meter, Any], None]] = {
    events.Answered: Meter._answered,
    events.Missed: Meter._missed,
    events.Stored: Meter._stored,
    events.Loaded: Meter._loaded,
    events.Evicted: Meter._evicted,
    events.Quarantined: Meter._quarantined,
    events.Refused: Meter._refused,
    events.Cleared: Meter._cleared,
    events.Shadowed: Meter._shadowed,
    events.Proof: Meter._proof,
    events.TierOff: Meter._tier_off,
    events.TierOn: Meter._tier_on,
    events.Failure: Meter._failure,
}
