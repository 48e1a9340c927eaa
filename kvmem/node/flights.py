"""One engine computes a prefix, the others wait for it: bounded, and without a lock.

A request that found only the beginning of its prompt is about to compute the rest: a flight, known
by the next key that it will publish. A request of another engine whose own next key is that one is
told to ask again, as long as the flight gets on.

    nobody waits in a circle: who waits has no flight
    nobody waits for ever:    STALL_S without a block, MOST_S in all
"""

from __future__ import annotations

from collections.abc import Hashable

from kvmem.node.wire import PackedKeys

__all__ = ["MOST_S", "STALL_S", "Flights"]

STALL_S = 2.0
MOST_S = 60.0
MOST_FLIGHTS = 1 << 16


class _Flight:
    __slots__ = ("at", "engine", "keys", "moved_s", "until")

    def __init__(self, engine: int, keys: PackedKeys, at: int, until: int, now: float) -> None:
        self.engine = engine
        self.keys = keys
        self.at = at  # the block that is published next
        self.until = until
        self.moved_s = now


class Flights:
    """What is being computed, by whom."""

    def __init__(self) -> None:
        self._of: dict[Hashable, _Flight] = {}
        self._by_key: dict[bytes, _Flight] = {}
        self._waiting: dict[Hashable, float] = {}  # since when
        self.waited = 0  # requests that were told to wait
        self.given_up = 0  # and found that it took too long

    def __len__(self) -> int:
        return len(self._of)

    def must_wait(self, request: Hashable, engine: int, key: bytes, now: float) -> bool:
        """Whether somebody else is about to publish this block."""
        flight = self._by_key.get(key)
        if flight is None or flight.engine == engine:
            self._waiting.pop(request, None)
            return False
        since = self._waiting.get(request)
        if since is None:
            since = self._waiting[request] = now
            self.waited += 1
        if now - flight.moved_s < STALL_S and now - since < MOST_S:
            return True
        self.given_up += 1
        self._waiting.pop(request, None)
        if now - flight.moved_s >= STALL_S:  # the next ones need not wait as long to find out
            self._forget(flight)
        return False

    def begin(
        self, request: Hashable, engine: int, keys: PackedKeys, at: int, until: int, now: float
    ) -> None:
        """A request is about to compute blocks [at, until)."""
        self.end(request)
        if at >= until or len(self._of) >= MOST_FLIGHTS:
            return
        flight = self._of[request] = _Flight(engine, keys, at, until, now)
        self._by_key.setdefault(keys[at], flight)

    def moved(self, request: Hashable, at: int, now: float) -> None:
        """The request's blocks up to `at` are published."""
        flight = self._of.get(request)
        if flight is None or at <= flight.at:
            return
        self._forget(flight)
        if at >= flight.until:
            del self._of[request]
            return
        flight.at, flight.moved_s = at, now
        self._by_key.setdefault(flight.keys[at], flight)

    def end(self, request: Hashable) -> None:
        """The request is over, or begins anew."""
        self._waiting.pop(request, None)
        flight = self._of.pop(request, None)
        if flight is not None:
            self._forget(flight)

    def _forget(self, flight: _Flight) -> None:
        key = flight.keys[flight.at]
        if self._by_key.get(key) is flight:
            del self._by_key[key]
