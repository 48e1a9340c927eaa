"""What kvmem tells of itself: small immutable values on one bus.

A subscriber is called in the thread that emits; one that raises is dropped, and its failure is
the last thing it is told about. Events carry numbers and digests, never prompt text (I11).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import msgspec

__all__ = [
    "AnswerChanged",
    "Answered",
    "Bus",
    "Cleared",
    "Event",
    "Evicted",
    "Failure",
    "HintRefused",
    "Loaded",
    "Missed",
    "PolicyOff",
    "Quarantined",
    "Refused",
    "Stored",
    "Switched",
    "TierOff",
    "TierOn",
]

log = logging.getLogger("kvmem")


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Base of all events."""


class Stored(Event, frozen=True, kw_only=True, tag="stored"):
    """Blocks became visible in a tier."""

    request_id: str
    blocks: int
    bytes: int
    seconds: float


class Loaded(Event, frozen=True, kw_only=True, tag="loaded"):
    """Blocks were copied back to the device for a request."""

    request_id: str
    blocks: int
    bytes: int
    seconds: float
    tier: str = "host"


class Answered(Event, frozen=True, kw_only=True, tag="answered"):
    """A request is over: where its prompt's tokens came from, and what it waited for.

    `began_s` and `ended_s` are seconds since 1970; `disk_s` and `far_s` how long its blocks came up
    from the disk and a far store, `load_s` and `store_s` were copied to the device, and back.
    """

    request_id: str
    session: str
    prompt: int
    device: int
    host: int
    disk: int
    computed: int
    began_s: float
    ended_s: float
    disk_s: float
    load_s: float
    store_s: float
    far: int = 0
    far_s: float = 0.0


class Evicted(Event, frozen=True, kw_only=True, tag="evicted"):
    """Blocks left a tier to make room, for a request where one is known.

    `cause`: "store", for new blocks of a request; "promote", for blocks that come up from below;
    "demote", for blocks that come down from above.
    """

    blocks: int
    tier: str = "host"
    request_id: str = ""
    cause: str = "store"


class Missed(Event, frozen=True, kw_only=True, tag="missed"):
    """Tokens [first, first + tokens) of a prompt were computed, and why (docs/explain.md).

    Told when the request is over; once more under another reason where that was found out later:
    `was` is then what it was told as first. `ms` is an estimate. `message` counts from 0 behind the
    head.
    """

    request_id: str
    reason: str
    first: int
    tokens: int
    ms: float = 0.0
    role: str = ""
    message: int | None = None
    tier: str = ""
    was: str = ""


class Quarantined(Event, frozen=True, kw_only=True, tag="quarantined"):
    """A block failed a check; it and its descendants answer no prompt any more (I5)."""

    key: str
    blocks: int
    reason: str
    tier: str = "host"


class Refused(Event, frozen=True, kw_only=True, tag="refused"):
    """Blocks were not stored, and why."""

    request_id: str
    blocks: int
    reason: str


class Cleared(Event, frozen=True, kw_only=True, tag="cleared"):
    """Everything left matching, by a reset or a change of namespace."""

    blocks: int
    reason: str


class Switched(Event, frozen=True, kw_only=True, tag="switched"):
    """The live switch changed what is allowed from now on."""

    loads: bool
    stores: bool


class TierOff(Event, frozen=True, kw_only=True, tag="tier_off"):
    """A tier failed and is not used until it works again."""

    tier: str
    error: str


class TierOn(Event, frozen=True, kw_only=True, tag="tier_on"):
    """A tier that was off works again."""

    tier: str
    seconds: float


class PolicyOff(Event, frozen=True, kw_only=True, tag="policy_off"):
    """The order "agents" failed, or has nothing to go by here: from now on it is plain LRU."""

    error: str


class DeviceOff(Event, frozen=True, kw_only=True, tag="device_off"):
    """Nothing is brought to the device before a request any more: vLLM's blocks are kept in another
    way than is known here, or something failed."""

    error: str


class HintRefused(Event, frozen=True, kw_only=True, tag="hint_refused"):
    """An orchestrator's action was not, or not wholly, done: `status` of its receipt, and why.

    Of many in a short time only some are told; `untold` says how many were not since the last one.
    """

    do: str
    status: str
    reason: str
    untold: int = 0


class Shadowed(Event, frozen=True, kw_only=True, tag="shadowed"):
    """Blocks that were computed although they were stored: how many bits for bits, how many so far
    off that they were quarantined, and how far the worst of them was."""

    request_id: str
    blocks: int
    equal: int
    bad: int
    worst: float


class Proof(Event, frozen=True, kw_only=True, tag="proof"):
    """What was stored to try it out came back bit for bit, or `error`: then no prompt is answered
    from that tier."""

    tier: str
    error: str


class AnswerChanged(Event, frozen=True, kw_only=True, tag="answer_changed"):
    """A turn that was looked at again is answered otherwise with exact KV: from its answer's token
    `at` on, which exact KV prefers by so many nats; 0 where one of the answers only ends sooner."""

    session: str
    turn: int
    at: int
    nats: float


class Failure(Event, frozen=True, kw_only=True, tag="failure"):
    """Something inside kvmem raised; the request went on without it (I9)."""

    where: str
    error: str


class Bus:
    """Hands each event to every subscriber and keeps the last `keep` of them.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self, keep: int = 256) -> None:
        self._lock = threading.Lock()
        self._recent: deque[Event] = deque(maxlen=keep)
        self._subscribers: list[Callable[[Event], None]] = []

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Calls `subscriber` with every event from now on; the answer ends that."""
        with self._lock:
            self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            with self._lock:
                if subscriber in self._subscribers:
                    self._subscribers.remove(subscriber)

        return unsubscribe

    def emit(self, event: Event) -> None:
        """Tells every subscriber; never raises."""
        with self._lock:
            self._recent.append(event)
            subscribers = tuple(self._subscribers)
        for subscriber in subscribers:
            try:
                subscriber(event)
            except Exception:  # a subscriber's fault must not reach the engine (I9)
                log.exception("kvmem: a subscriber raised on %r and was dropped", event)
                with self._lock:
                    if subscriber in self._subscribers:
                        self._subscribers.remove(subscriber)

    def recent(self) -> tuple[Event, ...]:
        """The last events, oldest first."""
        with self._lock:
            return tuple(self._recent)
