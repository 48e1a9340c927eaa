"""What one engine was last seen to be, and what a page is told of it.

Looking costs the engine some work, and this process some more. The figures are asked for every
`EVERY_S`; the tree so seldom that a look takes at most `SHARE` of the time, whatever its size.
Nothing grows without bounds (I7): sessions, their last turns, and the flows' history are the last.

Thread safety: one thread at a time.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal

import msgspec

from kvmem.dashboard.source import Source
from kvmem.dashboard.tree import Forest
from kvmem.telemetry.live import Cause, Session, Snapshot, Tier, Turn

__all__ = ["Lane", "Lanes", "Overview", "State"]

EVERY_S = 1.0
TREE_EVERY_S = 2.0
SHARE = 0.01
MOST_SESSIONS = 10_000
SESSIONS_AT_ONCE = 200  # asked for again: those used last
TURNS_A_SESSION = 64
MOST_TURNS = 50_000
HISTORY = 120  # looks at the tiers
MOST_EVENTS = 200
LANES = 100
# Events that tell of a decision, and what was asked for by a hint.
DECISIONS = (
    "cleared", "device_off", "evicted", "policy_off", "quarantined", "refused", "switched",
    "tier_off", "tier_on",
)  # fmt: skip
RECEIPTS = ("hint_refused", "receipt")

Sort = Literal["last", "computed", "missed_ms", "waited_s", "prompt", "session"]


class Flow(msgspec.Struct, frozen=True, array_like=True):
    """A tier over the time since the look before: its fill, and bytes a second in and out."""

    at_s: float
    bytes: int
    in_bytes_s: float
    out_bytes_s: float
    evicted_s: float


class TierNow(msgspec.Struct, frozen=True):
    """A tier and its last flows, oldest first."""

    tier: Tier
    flows: tuple[Flow, ...]


class TreeNow(msgspec.Struct, frozen=True):
    """How large the tree is, as it was seen `at_s`, and how often it is looked at now."""

    version: int
    prompts: int
    blocks: int
    at_s: float
    every_s: float


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """What every viewer is told every second."""

    engine: str
    at_s: float
    model: str
    pid: int
    running: int
    block_tokens: int
    block_bytes: int
    prefill_s_per_token: float
    n_sessions: int
    tokens: dict[str, float]
    tiers: tuple[TierNow, ...]
    causes: tuple[Cause, ...]
    decisions: tuple[dict[str, Any], ...]
    receipts: tuple[dict[str, Any], ...]
    off: dict[str, str]
    failures: int
    last_failure: str | None
    quarantined: int
    events_missed: int
    tree: TreeNow
    error: str = ""


class Lane(msgspec.Struct, frozen=True):
    """A session and its turns that touch the time asked for, oldest first."""

    session: Session
    turns: tuple[Turn, ...]


class Lanes(msgspec.Struct, frozen=True):
    """`n` sessions match, of which these are some."""

    from_s: float
    to_s: float
    n: int
    lanes: tuple[Lane, ...]


class State:
    """See the module.

    Args:
        source: the engine.
        clock: monotonic seconds.
    """

    def __init__(self, source: Source, clock: Callable[[], float] = time.monotonic) -> None:
        self.source = source
        self.forest = Forest()
        self.error = ""
        self._clock = clock
        self._now: Snapshot | None = None
        self._looked_s = self._tree_due_s = float("-inf")
        self._tree_every_s, self._tree_at_s, self._stamp = TREE_EVERY_S, 0.0, 0
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # used least lately first
        self._turns: dict[str, deque[Turn]] = {}
        self._n_turns = 0
        self._last_turn_s = 0.0
        self._flows: dict[str, deque[Flow]] = {}
        self._decisions: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._receipts: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._n_events = self._events_missed = 0
        self._overview: bytes = b""

    # -- looking -------------------------------------------------------------------------------

    def look(self) -> None:
        """Asks the engine, where it is time.

        Raises:
            KVMemError, FileNotFoundError: it does not answer; what was seen last stays.
        """
        now = self._clock()
        if now - self._looked_s < EVERY_S * 0.9:
            return
        self._looked_s = now
        first = self._now is None
        seen = self.source.snapshot(
            MOST_SESSIONS if first else SESSIONS_AT_ONCE, 0 if first else self._n_events
        )
        self._take(seen)
        if now >= self._tree_due_s:
            self._look_at_tree()

    def _take(self, seen: Snapshot) -> None:
        before, self._now = self._now, seen
        if before is not None and seen.pid != before.pid:
            self._forget()
            before = None
        for session in reversed(seen.sessions):
            self._sessions[session.session] = session
            self._sessions.move_to_end(session.session)
        for turn in seen.turns:
            if turn.ended_s > self._last_turn_s or before is None:
                self._keep_turn(turn)
        self._last_turn_s = max((turn.ended_s for turn in seen.turns), default=self._last_turn_s)
        while len(self._sessions) > MOST_SESSIONS or self._n_turns > MOST_TURNS:
            name, _ = self._sessions.popitem(last=False)
            self._n_turns -= len(self._turns.pop(name, ()))
        for tier in seen.tiers:
            self._flow(tier, before, seen)
        new = seen.n_events - self._n_events
        self._events_missed += max(0, new - len(seen.events)) if before is not None else 0
        self._n_events = seen.n_events
        for event in seen.events:
            if event.get("event") in DECISIONS:
                self._decisions.append(event)
            elif event.get("event") in RECEIPTS:
                self._receipts.append(event)

    def _forget(self) -> None:
        """Another process has the arena's name now."""
        self.forest = Forest()
        self._stamp, self._last_turn_s, self._n_turns = 0, 0.0, 0
        self._tree_due_s = float("-inf")
        for kept in (self._sessions, self._turns, self._flows, self._decisions, self._receipts):
            kept.clear()
        self._n_events = self._events_missed = 0

    def _keep_turn(self, turn: Turn) -> None:
        turns = self._turns.setdefault(turn.session, deque(maxlen=TURNS_A_SESSION))
        self._n_turns += len(turns) < TURNS_A_SESSION
        turns.append(turn)
        if turn.session not in self._sessions:  # more were used than are told at once
            self._sessions[turn.session] = Session(
                turn.session, first_s=turn.began_s, last_s=turn.ended_s
            )

    def _flow(self, tier: Tier, before: Snapshot | None, seen: Snapshot) -> None:
        old = before.tier(tier.name) if before is not None else None
        took_s = seen.at_s - before.at_s if before is not None else 0.0
        flows = self._flows.setdefault(tier.name, deque(maxlen=HISTORY))
        if old is None or took_s <= 0:
            flows.append(Flow(seen.at_s, tier.bytes, 0.0, 0.0, 0.0))
            return
        flows.append(
            Flow(
                round(seen.at_s, 2), tier.bytes, round((tier.in_bytes - old.in_bytes) / took_s, 1),
                round((tier.out_bytes - old.out_bytes) / took_s, 1),
                round((tier.evicted_blocks - old.evicted_blocks) / took_s, 2),
            )
        )  # fmt: skip

    def _look_at_tree(self) -> None:
        began_s, cost_s = time.thread_time(), 0.0
        while True:
            told = self.source.chains(self._stamp)
            cost_s += told.took_s
            self._stamp = told.stamp
            for chain in told.changed:
                self.forest.put(chain)
            if not told.more:
                break
        known = array("Q", told.known)
        if len(known) != len(self.forest.chains):
            self.forest.keep_only(known)
        host = dict(zip(known, array("i", told.host), strict=True))
        disk = dict(zip(known, array("i", told.disk), strict=True))
        if host != self.forest.host or disk != self.forest.disk:
            self.forest.host, self.forest.disk = host, disk
            self.forest.version += 1
        self._tree_at_s = time.time()
        cost_s = max(cost_s, time.thread_time() - began_s)
        self._tree_every_s = max(TREE_EVERY_S, cost_s / SHARE)
        self._tree_due_s = self._clock() + self._tree_every_s

    # -- telling -------------------------------------------------------------------------------

    def overview(self) -> Overview | None:
        """How it stands; None before the first look that was answered."""
        now = self._now
        if now is None:
            return None
        sources = ("device", "host", "disk", "far", "computed")
        return Overview(
            engine=self.source.name,
            at_s=now.at_s,
            model=now.model,
            pid=now.pid,
            running=now.running,
            block_tokens=now.block_tokens,
            block_bytes=now.block_bytes,
            prefill_s_per_token=now.prefill_s_per_token,
            n_sessions=now.n_sessions,
            tokens={s: now.total("kvmem_prompt_tokens_total", s) for s in sources},
            tiers=tuple(TierNow(t, tuple(self._flows.get(t.name, ()))) for t in now.tiers),
            causes=now.causes,
            decisions=tuple(islice(reversed(self._decisions), 30)),
            receipts=tuple(islice(reversed(self._receipts), 30)),
            off=now.off,
            failures=now.failures,
            last_failure=now.last_failure,
            quarantined=len(now.quarantine),
            events_missed=self._events_missed,
            tree=TreeNow(
                self.forest.version, len(self.forest.chains), self.forest.n_blocks,
                round(self._tree_at_s, 2), round(self._tree_every_s, 1),
            ),
            error=self.error,
        )  # fmt: skip

    def lanes(
        self, *, text: str = "", sort: Sort = "last", first: int = 0, most: int = 25,
        span_s: float = 300.0,
    ) -> Lanes:  # fmt: skip
        """Sessions whose name has `text` in it, from the `first` on, with their turns of the last
        `span_s` seconds of this engine's clock."""
        to_s = self._now.at_s if self._now is not None else 0.0
        found = [s for n, s in reversed(self._sessions.items()) if text in n.lower()]
        if sort == "session":
            found.sort(key=lambda one: one.session)
        elif sort != "last":
            found.sort(key=lambda one: -getattr(one, sort))
        from_s = to_s - span_s
        shown = found[first : first + min(most, LANES)]
        return Lanes(
            from_s,
            to_s,
            len(found),
            tuple(
                Lane(one, tuple(t for t in self._turns.get(one.session, ()) if t.ended_s > from_s))
                for one in shown
            ),
        )
