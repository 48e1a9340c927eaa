"""Moves between the host tier and a far store that many hosts share.

    host slots ── demote: copies of what was published ──▶ far store
               ◀── bring up: asked for, fetched, checked, then published ──

A far store has no index here. Which blocks it has is asked in batches, beyond what host and disk
have, and remembered with bounds in number and time, since other hosts write to it and it forgets
when it likes. So it may have holes: a prompt is answered up to the first (I2). Nothing of it is
promised before it is in the host tier and was checked (I4, I5). A request waits for it only where
fetching is predicted to be faster than computing, and no longer than computing would take.

Thread safety: one thread calls it, the one of the `Cache`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from kvmem import events
from kvmem._core import HostTier
from kvmem.types import NO_PARENT, GroupShape, Move, Moved, Probed

__all__ = ["Carrier", "FarMoves"]

Keys = list[Any]
Match = Callable[..., int]
# How long a request waits at most, and where it is not known how long it takes to compute.
PATIENCE_S = 5.0
UNKNOWN_S = 1.0
# What is remembered of the store: how many blocks, and for how long.
KNOWN = 1 << 16
PRESENT_S, ABSENT_S = 60.0, 5.0
PROBE_KEYS = 4096  # of one request and group
BACK = 256  # blocks before the stored ones that are looked at, for those that were left out
BAD = 1024  # blocks that came back wrong, and are stored anew when they are stored


class Carrier(Protocol):
    """Who asks the store and copies, beside the caller; see `kvmem.store.far.Far`."""

    label: str

    @property
    def on(self) -> bool:
        """Whether the store can be used now."""

    @property
    def version(self) -> int:
        """Rises when what was answered of the store is void."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block there, at most."""

    def seconds_for(self, n_bytes: int) -> float | None:
        """How long fetching so many bytes takes; None before it was measured."""

    def probe(self, ticket: int, group: int, keys: Sequence[bytes]) -> bool:
        """Begins to ask which of them are there; False where the queue is full."""

    def read(self, move: Move) -> bool:
        """Begins a copy from the store; False where the queue is full."""

    def write(self, move: Move, *, force: bool = False) -> bool:
        """Begins a copy to the store; False where the queue or the store is full."""

    def poll(self) -> list[Moved | Probed]:
        """What is over."""

    def wait(self, seconds: float, n: int = 1) -> None:
        """Returns when n are over that `poll` has not told, or after so long."""

    def too_slow(self, seconds: float) -> None:
        """A fetch took so long: it is to be off for a while."""

    def forget(self) -> None:
        """Nothing that is there answers any more."""


class _Wait:
    """What one request waits for."""

    __slots__ = (
        "asked", "begun_s", "fetches", "host_stop", "leases", "patience_s", "probes", "took_s",
    )  # fmt: skip

    def __init__(self, begun_s: float, host_stop: int, patience_s: float) -> None:
        self.begun_s = begun_s
        self.host_stop = host_stop  # how far host and disk would have answered
        self.patience_s = patience_s
        self.probes: set[int] = set()
        self.fetches: set[_Fetch] = set()
        self.leases: list[int] = []
        self.asked = False  # for blocks
        self.took_s: float | None = None  # once it is over


class _Fetch:
    """Blocks that are settled together, since each hangs below the one before it."""

    __slots__ = ("keys", "moved", "moves", "waiting")

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.moves: list[Move] = []
        self.moved: dict[int, Moved] = {}
        self.waiting: list[_Wait] = []


class _Store:
    """Blocks on their way down under one lease."""

    __slots__ = ("lease", "left")

    def __init__(self, lease: int) -> None:
        self.lease = lease
        self.left = 0


class FarMoves:
    """See the module.

    Args:
        host: the host tier's index.
        carrier: who copies.
        groups: the model's KV-cache groups.
        bus: where events go.
        clock: seconds.
    """

    def __init__(
        self,
        host: HostTier,
        carrier: Carrier,
        groups: Sequence[GroupShape],
        bus: events.Bus,
        clock: Callable[[], float],
    ) -> None:
        # How long a token takes to compute, as the engine measures it; 0 before that.
        self.s_per_token = 0.0
        self._host = host
        self._carrier = carrier
        self._groups = tuple(groups)
        self._bus = bus
        self._clock = clock
        self._tickets = itertools.count(1)
        self._waits: dict[str, _Wait] = {}
        self._probed: dict[int, tuple[_Wait, list[bytes]]] = {}
        self._fetch_of: dict[int, _Fetch] = {}
        self._coming: dict[bytes, _Fetch] = {}
        self._stores: dict[int, tuple[_Store, bytes]] = {}
        self._going: set[bytes] = set()
        self._known: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()
        self._version = carrier.version
        self._bad: OrderedDict[bytes, None] = OrderedDict()
        self.totals = {
            "asked": 0, "found": 0, "read": 0, "written": 0, "bytes_read": 0, "bytes_written": 0,
            "faults": 0, "gone": 0, "refused": 0, "slower": 0, "late": 0, "io_s": 0.0,
        }  # fmt: skip

    # -- what is there -----------------------------------------------------------------------

    def match(self, keys: Keys, start: int) -> int:
        """Blocks of the longest prefix that the host has, and beyond it the store as far as is
        remembered."""
        n = self._host.match(keys, start)
        while n < len(keys) and self._has(bytes(keys[n])):
            n += 1
        return n

    def has(self, key: bytes) -> bool:
        """Whether the store has a block, as far as is remembered."""
        return self._has(bytes(key))

    def _has(self, key: bytes) -> bool:
        return bool(self._recall(key))

    def _recall(self, key: bytes) -> bool | None:
        found = self._known.get(key)
        if found is None:
            return None
        present, until_s = found
        if until_s < self._clock():
            del self._known[key]
            return None
        return present

    def _remember(self, key: bytes, present: bool) -> None:
        until_s = self._clock() + (PRESENT_S if present else ABSENT_S)
        self._known[key] = (present, until_s)
        self._known.move_to_end(key)
        if len(self._known) > KNOWN:  # I7
            self._known.popitem(last=False)

    # -- up ----------------------------------------------------------------------------------

    def coming(
        self, request_id: str, chains: Sequence[Keys], start: int, limit: int, match: Match
    ) -> bool:
        """Whether more of the prompt is on its way, and worth the wait; `match` is the cache's."""
        self.poll()
        wait = self._waits.get(request_id)
        if wait is None:
            wait = self._ask(chains, start, match(chains, start, limit), limit)
            if wait is None:
                return False
            self._waits[request_id] = wait
        if wait.took_s is not None:  # once only
            return False
        waited_s = self._clock() - wait.begun_s
        if waited_s <= wait.patience_s:
            if wait.probes:
                return True
            if not wait.asked:
                wait.asked = True
                self._fetch(wait, chains, start, match(chains, start, limit, self), limit)
            if wait.fetches:
                return True
        elif wait.probes or wait.fetches:
            self.totals["late"] += 1
            if waited_s > PATIENCE_S:
                self._carrier.too_slow(waited_s)
        wait.took_s = waited_s
        return False

    def told(self, request_id: str, start: int, stop: int) -> tuple[int, float, int | None]:
        """Of an answer up to `stop`: tokens that came from far, the wait for them in seconds, and
        how far the tiers before it reach (None where it was not asked). What was held for the
        request until now its own leases hold."""
        wait = self._waits.get(request_id)
        if wait is None or wait.took_s is None:
            return 0, 0.0, None
        self._let_go(wait)
        return max(0, stop - max(start, wait.host_stop)), wait.took_s, wait.host_stop

    def release(self, request_id: str) -> None:
        """The request is over; what is under way for it goes on and serves others."""
        wait = self._waits.pop(request_id, None)
        if wait is not None:
            self._let_go(wait)

    def _let_go(self, wait: _Wait) -> None:
        for fetch in wait.fetches:
            fetch.waiting.remove(wait)
        wait.fetches.clear()
        for ticket in wait.probes:
            self._probed[ticket] = (_NOBODY, self._probed[ticket][1])
        wait.probes.clear()
        for lease in wait.leases:
            self._host.release(lease)
        wait.leases.clear()

    def _ask(self, chains: Sequence[Keys], start: int, near: int, limit: int) -> _Wait | None:
        """Asks for what neither host nor disk have, where that can be worth it."""
        if near >= limit or not self._carrier.on:
            return None
        self._renew()
        compute_s = (limit - near) * self.s_per_token
        fetch_s = self._carrier.seconds_for(0)
        if compute_s and fetch_s is not None and fetch_s >= compute_s:
            self.totals["slower"] += 1
            return None
        wait = _Wait(self._clock(), near, min(PATIENCE_S, compute_s or UNKNOWN_S))
        some = False
        for group, (shape, keys) in enumerate(zip(self._groups, chains, strict=True)):
            # The blocks that a window reads may lie before what the chains have.
            first = (near if shape.closed else start) // shape.block_tokens
            stop = min(limit // shape.block_tokens, first + PROBE_KEYS)
            wanted = [bytes(key) for key in keys[first:stop]]
            if shape.closed and wanted and self._recall(wanted[0]) is False:
                return None  # nothing after it is of use
            some = some or bool(wanted)
            unknown = [key for key in wanted if self._recall(key) is None]
            if unknown:
                ticket = next(self._tickets)
                if self._carrier.probe(ticket, group, unknown):
                    self._probed[ticket] = (wait, unknown)
                    wait.probes.add(ticket)
                    self.totals["asked"] += len(unknown)
        return wait if some else None

    def _fetch(
        self, wait: _Wait, chains: Sequence[Keys], start: int, stop: int, limit: int
    ) -> None:
        """Begins to fetch what the store has, up to `stop`."""
        near = wait.host_stop
        if stop <= near or not self._carrier.on:
            return
        n_bytes = 0
        for shape in self._groups:
            first = max(near // shape.block_tokens, shape.first_needed(stop))
            n_bytes += (stop // shape.block_tokens - first) * self._carrier.block_bytes
        compute_s = (stop - near) * self.s_per_token
        fetch_s = self._carrier.seconds_for(n_bytes)
        if compute_s and fetch_s is not None and fetch_s >= compute_s:
            self.totals["slower"] += 1
            return
        for group, (shape, keys) in enumerate(zip(self._groups, chains, strict=True)):
            end = stop // shape.block_tokens
            first = max(start // shape.block_tokens, shape.first_needed(stop))
            for key in keys[first:end]:
                under_way = self._coming.get(bytes(key))
                if under_way is not None:
                    self._wait_for(wait, under_way)
            if shape.closed:
                self._begin(wait, group, keys, self._host.match(keys[:end]), end)
            else:
                for key in keys[first:end]:
                    if self._host.match([key]) == 0:
                        self._begin(wait, group, [key], 0, 1)

    def _begin(self, wait: _Wait, group: int, keys: Keys, first: int, stop: int) -> None:
        if stop <= first:
            return
        index, slots, generations, _ = self._host.reserve(keys, first, stop)
        fetch = _Fetch(keys[:stop])
        begun = 0
        for i, slot, generation in zip(
            index.tolist(), slots.tolist(), generations.tolist(), strict=True
        ):
            move = Move(
                ticket=next(self._tickets), group=group, key=bytes(keys[i]), slot=slot,
                slot_generation=generation, record=0, record_generation=0,
                parent=bytes(keys[i - 1]) if i else NO_PARENT,
            )  # fmt: skip
            if not self._carrier.read(move):
                break
            fetch.moves.append(move)
            self._fetch_of[move.ticket] = fetch
            self._coming[move.key] = fetch
            begun += 1
        if begun < len(index):
            self._host.abandon(slots[begun:], generations[begun:])
        if begun:
            self._wait_for(wait, fetch)

    def _wait_for(self, wait: _Wait, fetch: _Fetch) -> None:
        if fetch not in wait.fetches:
            wait.fetches.add(fetch)
            fetch.waiting.append(wait)

    # -- down --------------------------------------------------------------------------------

    def demote(self, group: int, keys: Keys, blocks: Sequence[int]) -> None:
        """Copies to the store what the host has of these blocks, as far as it is not known to be
        there; of a chain also those right before them that were left out."""
        if not len(blocks) or not self._carrier.on:
            return
        self._renew()
        if self._groups[group].closed:
            first = blocks[0]
            least = max(0, first - BACK)
            while first > least and self._is_wanted(bytes(keys[first - 1])):
                first -= 1
            self._demote(group, keys, first, blocks[-1] + 1)
        else:
            for at in blocks:
                self._demote(group, [keys[at]], 0, 1)

    def _is_wanted(self, key: bytes) -> bool:
        return key not in self._going and (key in self._bad or not self._has(key))

    def _demote(self, group: int, keys: Keys, first: int, stop: int) -> None:
        lease, stop, slots, generations = self._host.acquire(keys, first, stop, use=False)
        if not lease:
            return
        store = _Store(lease)
        for i, slot, generation in zip(
            range(first, stop), slots.tolist(), generations.tolist(), strict=True
        ):
            key = bytes(keys[i])
            if not self._is_wanted(key):
                continue
            move = Move(
                ticket=next(self._tickets), group=group, key=key, slot=slot,
                slot_generation=generation, record=0, record_generation=0,
                parent=bytes(keys[i - 1]) if i else NO_PARENT,
            )  # fmt: skip
            if not self._carrier.write(move, force=key in self._bad):
                # Queue or store are full. What hangs below would be of no use.
                self.totals["refused"] += stop - i
                break
            self._stores[move.ticket] = (store, key)
            self._going.add(key)
            store.left += 1
        if not store.left:
            self._host.release(lease)

    # -- what became of them -----------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a request does."""
        return any(wait.probes or wait.fetches for wait in self._waits.values())

    @property
    def n_under_way(self) -> int:
        """Questions and copies that are not over."""
        return len(self._probed) + len(self._fetch_of) + len(self._stores)

    def wait(self, seconds: float) -> None:
        """Returns when something is over, or after so long."""
        self._carrier.wait(seconds, 1)

    def poll(self) -> None:
        """Settles what is over."""
        over = self._carrier.poll()
        self._renew()
        for one in over:
            if isinstance(one, Probed):
                self._answered(one)
                continue
            self.totals["io_s"] += one.io_s
            if one.ticket in self._stores:
                self._stored(one)
                continue
            fetch = self._fetch_of.pop(one.ticket)
            fetch.moved[one.ticket] = one
            if len(fetch.moved) == len(fetch.moves):
                self._fetched(fetch)

    def _renew(self) -> None:
        """What is remembered of a store that was emptied, or was off, is void."""
        if self._version != self._carrier.version:
            self._version = self._carrier.version
            self._known.clear()

    def _answered(self, probed: Probed) -> None:
        wait, keys = self._probed.pop(probed.ticket)
        wait.probes.discard(probed.ticket)
        if probed.version != self._version:
            return
        for key, found in zip(keys, probed.found, strict=True):
            self.totals["found"] += found
            self._remember(key, found and key not in self._bad)

    def _stored(self, moved: Moved) -> None:
        store, key = self._stores.pop(moved.ticket)
        self._going.discard(key)
        store.left -= 1
        if not store.left:
            self._host.release(store.lease)
        if not moved.fault:
            self._bad.pop(key, None)
            self._remember(key, True)
            self.totals["written"] += moved.bytes > 0
            self.totals["bytes_written"] += moved.bytes
        else:
            self.totals["refused" if moved.fault in ("room", "gone") else "faults"] += 1

    def _fetched(self, fetch: _Fetch) -> None:
        good = True
        for move in fetch.moves:
            self._coming.pop(move.key, None)
            moved = fetch.moved[move.ticket]
            slot = np.array([move.slot], np.int32)
            generation = np.array([move.slot_generation], np.uint64)
            if moved.fault:
                self._fault(move, moved)
            good = good and not moved.fault
            if good:
                self._host.publish(slot, generation, np.array([moved.checksum], np.uint64))
                self.totals["read"] += 1
                self.totals["bytes_read"] += moved.bytes
            else:  # I2: nothing below a block that failed
                self._host.abandon(slot, generation)
        for wait in fetch.waiting:
            wait.fetches.discard(fetch)
            lease, *_ = self._host.acquire(fetch.keys, 0, len(fetch.keys), use=False)
            if lease:  # until the request asks again
                wait.leases.append(lease)
        fetch.waiting.clear()

    def _fault(self, move: Move, moved: Moved) -> None:
        self.totals["gone" if moved.fault == "gone" else "faults"] += 1
        if moved.fault in ("gone", "record"):
            self._remember(move.key, False)
        if moved.fault == "record":  # I5: answered by nobody here until it is stored anew
            self._bad[move.key] = None
            if len(self._bad) > BAD:
                self._bad.popitem(last=False)
            self._bus.emit(
                events.Quarantined(key=move.key.hex(), blocks=1, reason="far", tier="far")
            )

    def forget(self) -> None:
        """Nothing that the store has answers any more."""
        self._carrier.forget()
        self._renew()
        self._bad.clear()

    def stats(self) -> dict[str, Any]:
        """Counts, and what is under way."""
        return {
            **self.totals,
            "on": self._carrier.on,
            "label": self._carrier.label,
            "known": len(self._known),
            "under_way": self.n_under_way,
        }


_NOBODY = _Wait(0.0, 0, 0.0)
