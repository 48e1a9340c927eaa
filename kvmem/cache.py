"""One cache: the verbs that join the index, the store and the policy.

    acquire   how much of a prompt is here, held so that it stays
    reserve   room for blocks that are about to be computed
    publish   what was written and acknowledged becomes visible (I4)
    release   a request is over
    drop      everything leaves matching

A `Cache` serves one namespace and one KV-cache group. It never touches KV bytes: it hands out
slots, and who copies reads each slot's identity back (I1). Calls come from one thread, the
engine's scheduler; `stats()` may be called from any.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvmem import events
from kvmem._core import HostTier

__all__ = ["Cache", "Grant", "Reservation"]

Slots = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]
# Of 32 bytes each. The engine's own list is handed on as it is, and no list[BlockHash] is a
# list[bytes] to a type checker.
Keys = list[Any]


class Grant(msgspec.Struct, frozen=True):
    """What `acquire` answers: blocks `[start, n_blocks)` of the prompt lie in these slots.

    `slots` and `generations` are of length `n_blocks - start`; they stay valid until the
    request's `release`. `missing` says why block `n_blocks` is not here ("none" when the whole
    prompt is).
    """

    start: int
    n_blocks: int
    slots: Slots
    generations: Words
    missing: str


class Reservation(msgspec.Struct, frozen=True):
    """What `reserve` answers: `slots[i]` is for block `index[i]` of the prompt.

    Blocks that are here already are left out. `refused` blocks found no room.
    """

    index: Slots
    slots: Slots
    generations: Words
    refused: int


class Cache:
    """The host tier of one namespace behind kvmem's verbs.

    Args:
        n_slots: blocks the host tier holds (I7).
        eviction: "s3fifo" or "lru".
        bus: where events go.
    """

    def __init__(
        self, n_slots: int, *, eviction: str = "s3fifo", bus: events.Bus | None = None
    ) -> None:
        self.bus = bus if bus is not None else events.Bus()
        self._tier = HostTier(n_slots, eviction)
        # Requests that have used what is here, or stored it; 0 where nothing is leased to them.
        self._leases: dict[str, int] = {}
        self._evictions_told = 0

    def match(self, keys: Keys, start: int = 0) -> int:
        """Blocks of the longest published prefix of `keys`; `keys[:start]` are known to be here."""
        return self._tier.match(keys, start)

    def acquire(self, request_id: str, keys: Keys, *, start: int, limit: int) -> Grant:
        """The blocks `[start, n)` that are here, leased to `request_id` until `release`.

        Idempotent for a request: asked again, it answers for the state of now, holds one lease
        and counts as one use of the prefix. The prefix is validated again after it is held, so
        what is granted is here (I3).

        Args:
            request_id: who holds the lease.
            keys: the prompt's block keys, 32 bytes each.
            start: blocks the caller has already.
            limit: blocks the caller can use at most.
        """
        first = request_id not in self._leases
        lease, n_blocks, slots, generations = self._tier.acquire(keys, start, limit, use=first)
        held = self._leases.get(request_id, 0)
        if n_blocks or not first:
            self._leases[request_id] = lease
        if held:
            self._tier.release(held)
        missing = "none" if n_blocks >= limit else self.why(keys[n_blocks])
        return Grant(start, n_blocks, slots, generations, missing)

    def why(self, key: bytes) -> str:
        """Why a block is not here: new, pending, evicted, quarantined, cleared or abandoned."""
        reason = self._tier.why(key)
        return "new" if reason == "unknown" else reason

    def hold(self, request_id: str, keys: Keys, n_blocks: int) -> None:
        """Extends the request's lease to the deepest published block of `keys[:n_blocks]`.

        No use of them: what a request stores is used when another one asks for it.
        """
        lease = self._leases.get(request_id, 0)
        if lease:
            self._tier.extend(lease, keys, n_blocks)
        else:
            lease, *_ = self._tier.acquire(keys, 0, n_blocks, use=False)
            if lease:
                self._leases[request_id] = lease

    def reserve(self, request_id: str, keys: Keys, *, start: int, stop: int) -> Reservation:
        """Room for blocks `[start, stop)`, invisible until `publish`."""
        index, slots, generations, reason = self._tier.reserve(keys, start, stop)
        try:
            refused = 0
            if reason:
                reached = int(index[-1]) + 1 if len(index) else start
                refused = stop - reached
                self.bus.emit(events.Refused(request_id=request_id, blocks=refused, reason=reason))
            self._tell_evictions()
            return Reservation(index, slots, generations, refused)
        except BaseException:
            self._tier.abandon(slots, generations)
            raise

    def publish(self, slots: Slots, generations: Words, checksums: Words) -> int:
        """Makes acknowledged blocks visible, parents first; the answer is how many (I4)."""
        return self._tier.publish(slots, generations, checksums)

    def abandon(self, slots: Slots, generations: Words) -> int:
        """Gives reserved slots back unwritten, with what was reserved on top of them."""
        return self._tier.abandon(slots, generations)

    def quarantine(self, slot: int, generation: int, *, key: bytes, reason: str) -> int:
        """Takes a block that failed a check, and all its descendants, out of matching (I5)."""
        blocks = self._tier.quarantine(slot, generation)
        self.bus.emit(events.Quarantined(key=key.hex(), blocks=blocks, reason=reason))
        return blocks

    def release(self, request_id: str) -> None:
        """Ends the request's lease; a request without one is fine."""
        lease = self._leases.pop(request_id, 0)
        if lease:
            self._tier.release(lease)

    def drop(self, reason: str) -> int:
        """Nothing that was published or reserved so far answers any more; leases live on."""
        blocks = self._tier.clear()
        self.bus.emit(events.Cleared(blocks=blocks, reason=reason))
        return blocks

    def stats(self) -> dict[str, Any]:
        """Counts of slots, blocks, leases and evictions."""
        return self._tier.stats()

    def check_integrity(self) -> list[str]:
        """What is broken of I2, I3, I7 and the counts; empty when all holds."""
        return self._tier.check_integrity()

    def _tell_evictions(self) -> None:
        evictions = int(self._tier.stats()["evictions"])
        if evictions > self._evictions_told:
            self.bus.emit(events.Evicted(blocks=evictions - self._evictions_told))
            self._evictions_told = evictions
