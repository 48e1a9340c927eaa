"""Moves between the host tier and the disk below it.

    host slots ── demote: copies, parents first ──▶ disk records
               ◀── promote: checked bytes, then published ──

Both tiers have an index of the same kind, and each is prefix-closed by itself (I2): blocks are
copied down when they are published above, so nothing has to be written when the host makes room,
and come up parents first. A `Mover` does the copying, in threads of its own; here is decided what
is copied, and what its outcome means. Nothing that a mover reads is visible before it was checked
(I4, I5).

Thread safety: one thread calls it, the one of the `Cache`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from kvmem import events
from kvmem._core import HostTier
from kvmem.types import NO_PARENT, GroupShape, Move, Moved, Recovered

__all__ = ["Mover", "Moves", "Promotion"]

Keys = list[Any]
# How long a request waits for the disk before it is answered with what the host has.
PATIENCE_S = 5.0
# How often room is made for a batch that did not get it: free room may lie in pieces that are too
# short, and blocks that go one after another mostly lie side by side.
ROOM_TRIES = 8
ROOM_BLOCKS = 2


class Mover(Protocol):
    """Who copies blocks between the arena's slots and the disk's records, beside the caller."""

    @property
    def n_records(self) -> int:
        """Blocks that the disk holds at most (I7)."""

    @property
    def room(self) -> int:
        """Blocks that there is room for: a codec makes them shorter by how much it finds out."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the disk that blocks have, of those in `disk_bytes`."""

    @property
    def disk_bytes(self) -> int:
        """The budget."""

    @property
    def on(self) -> bool:
        """Whether the disk can be used now."""

    def recovered(self) -> Recovered | None:
        """What an earlier run left there, told once; None for nothing."""

    def write(self, move: Move) -> bool:
        """Begins a copy to the disk; False where the queue is full."""

    def read(self, move: Move) -> bool:
        """Begins a copy from the disk; False where it can't."""

    def drop(self, record: int) -> None:
        """The record holds nothing any more."""

    def clear(self) -> None:
        """No record holds anything any more."""

    def poll(self) -> list[Moved]:
        """Moves that are over."""

    def too_slow(self, seconds: float) -> None:
        """A read took so long: it is to be off for a while."""

    def wait(self, seconds: float, n: int = 1) -> None:
        """Returns when n moves are over that `poll` has not told, or after so long."""


class Promotion:
    """What one request waits for: blocks on their way to the host, its own reads and others'."""

    __slots__ = ("begun_s", "host_stop", "leases", "reads", "took_s")

    def __init__(self, begun_s: float, host_stop: int) -> None:
        self.begun_s = begun_s
        self.host_stop = host_stop  # how far the host alone would have answered
        self.took_s: float | None = None  # once it is over
        self.reads: set[_Batch] = set()
        self.leases: list[int] = []


class _Batch:
    """Moves that are settled together, since each block hangs below the one before it."""

    __slots__ = ("down", "group", "keys", "lease", "moved", "moves", "tries", "waiting")

    def __init__(self, *, down: bool, group: int, keys: Keys, lease: int) -> None:
        self.down = down
        self.group = group
        self.keys = keys
        self.lease = lease  # on the tier that is read
        self.tries = 0
        self.moves: list[Move] = []
        self.moved: dict[int, Moved] = {}
        self.waiting: list[Promotion] = []

    @property
    def is_over(self) -> bool:
        return len(self.moved) == len(self.moves)


class Moves:
    """See the module.

    Args:
        host: the host tier's index.
        mover: who copies.
        groups: the model's KV-cache groups.
        bus: where events go.
        order: the disk's eviction order.
        on_evicted: is told of keys that left, from which tier, for whom ("" where nobody knows).
    """

    def __init__(
        self,
        host: HostTier,
        mover: Mover,
        groups: Sequence[GroupShape],
        bus: events.Bus,
        *,
        order: str,
        on_evicted: Callable[[bytes, str, str], None] | None = None,
    ) -> None:
        self.disk = HostTier(mover.n_records, order)
        self.n_records = mover.n_records
        self._on_evicted = on_evicted
        # Who knows better than the tiers' orders: cuts up to so many blocks from the disk, and says
        # whose records they were; makes room in the host for blocks of these keys.
        self.choose: Callable[[int], list[int]] | None = None
        self.make_room: Callable[[Keys, int, int], None] | None = None
        self._host = host
        self._mover = mover
        self._groups = tuple(groups)
        self._bus = bus
        self._tickets = itertools.count(1)
        self._batch_of: dict[int, _Batch] = {}
        self._down: deque[_Batch] = deque()  # in the order in which they began: parents first
        self._coming: dict[bytes, _Batch] = {}
        self._n_reads = 0  # under way
        self.totals = {
            "written": 0, "read": 0, "bytes_written": 0, "bytes_read": 0, "faults": 0,
            "refused": 0, "queued_s": 0.0, "io_s": 0.0, "check_s": 0.0,
        }  # fmt: skip
        self._evictions_told = 0
        self.totals["restored"] = self._restore()

    def _restore(self) -> int:
        """Blocks of an earlier run that answer again; those without their parents don't (I2)."""
        found = self._mover.recovered()
        if found is None:
            return 0
        lost = self.disk.restore(
            found.records, found.generations, found.checksums, found.keys, found.parents
        )
        for at in lost.tolist():
            self._mover.drop(int(found.records[at]))
        return len(found.records) - len(lost)

    # -- what is there -----------------------------------------------------------------------

    def match(self, keys: Keys | bytes, start: int) -> int:
        """Blocks of the longest prefix on the disk; keys may come one behind the other."""
        return self.disk.match(keys, start) if self._mover.on else 0

    def has(self, key: bytes) -> bool:
        """Whether the disk has a block that stands by itself."""
        return self._mover.on and self.disk.match([key]) == 1

    def fate(self, key: bytes, host: str) -> str:
        """What became of a block that the host has not: see `Cache.fate`; `host` is its word."""
        below = self.disk.why(key)
        if host == "pending":
            return "demoted" if bytes(key) in self._coming else host
        if below == "published":
            return "demoted" if self._mover.on else "tier_off"
        if below == "pending":
            return "demoted" if host == "evicted" else host
        if below == "abandoned" and host == "evicted":
            return below
        return below if host == "unknown" or below == "quarantined" else host

    @property
    def n_under_way(self) -> int:
        """Moves that are not over."""
        return len(self._batch_of) + len(self._down)

    # -- down --------------------------------------------------------------------------------

    def demote(self, group: int, keys: Keys, blocks: Sequence[int], codec: int = 0) -> None:
        """Copies to the disk what the host has of these blocks and the disk has not; of a chain,
        all up to the last of them, so that nothing of it is a hole."""
        if not self._mover.on or not len(blocks):
            return
        if self._groups[group].closed:
            stop = blocks[-1] + 1
            # So that room is not made of what the new blocks hang below.
            parents, start, *_ = self.disk.acquire(keys, 0, stop, use=False)
            self._demote(group, keys, start, stop, codec)
            if parents:
                self.disk.release(parents)
        else:
            for at in blocks:
                if not self.disk.match([keys[at]]):
                    self._demote(group, [keys[at]], 0, 1, codec)

    def _demote(self, group: int, keys: Keys, start: int, stop: int, codec: int) -> None:
        if stop <= start:
            return
        lease, stop, slots, generations = self._host.acquire(keys, start, stop, use=False)
        if not lease:
            return
        free = self._mover.room if self.choose is None else min(self._mover.room, self.disk.free())
        self._evict(stop - start - free)
        index, records, record_generations, reason = self.disk.reserve(keys, start, stop)
        if reason:
            self.totals["refused"] += stop - start - len(index)
        self._tell_evictions()
        batch = _Batch(down=True, group=group, keys=keys, lease=lease)
        begun = 0
        for i, record, record_generation in zip(
            index.tolist(), records.tolist(), record_generations.tolist(), strict=True
        ):
            move = Move(
                ticket=next(self._tickets),
                group=group,
                key=bytes(keys[i]),
                slot=int(slots[i - start]),
                slot_generation=int(generations[i - start]),
                record=record,
                record_generation=record_generation,
                parent=bytes(keys[i - 1]) if i else NO_PARENT,
                depth=i,
                codec=codec,
            )
            if not self._mover.write(move):
                break
            batch.moves.append(move)
            self._batch_of[move.ticket] = batch
            begun += 1
        if begun < len(index):  # the queue is full: what hangs below goes with it
            self.totals["refused"] += len(index) - begun
            self.disk.abandon(records[begun:], record_generations[begun:])
        if begun:
            self._down.append(batch)
        else:
            self._host.release(lease)

    def _evict(self, n: int) -> int:
        gone = self.choose(n) if self.choose is not None and n > 0 else []
        gone = gone + (self.disk.evict(n - len(gone)).tolist() if n > len(gone) else [])
        for record in gone:
            self._mover.drop(record)
        return len(gone)

    # -- up ----------------------------------------------------------------------------------

    def promote(self, promotion: Promotion, group: int, keys: Keys, first: int, stop: int) -> None:
        """Begins to read those of blocks [first, stop) that the host has not; `promotion` waits for
        them, and for those that others have begun to read."""
        for key in keys[first:stop]:
            under_way = self._coming.get(bytes(key))
            if under_way is not None:
                self._wait_for(promotion, under_way)
        if self._groups[group].closed:
            self._promote(promotion, group, keys, self._host.match(keys[:stop]), stop)
        else:
            for key in keys[first:stop]:
                if self._host.match([key]) == 0:
                    self._promote(promotion, group, [key], 0, 1)

    def _promote(self, promotion: Promotion, group: int, keys: Keys, start: int, stop: int) -> None:
        if stop <= start:
            return
        lease, stop, records, record_generations = self.disk.acquire(keys, start, stop)
        if not lease:
            return
        if self.make_room is not None:
            self.make_room(keys, start, stop - start)
        index, slots, generations, _ = self._host.reserve(keys, start, stop)
        batch = _Batch(down=False, group=group, keys=keys, lease=lease)
        begun = 0
        for i, slot, generation in zip(
            index.tolist(), slots.tolist(), generations.tolist(), strict=True
        ):
            move = Move(
                ticket=next(self._tickets),
                group=group,
                key=bytes(keys[i]),
                slot=slot,
                slot_generation=generation,
                record=int(records[i - start]),
                record_generation=int(record_generations[i - start]),
            )
            if not self._mover.read(move):
                break
            batch.moves.append(move)
            self._batch_of[move.ticket] = batch
            self._coming[move.key] = batch
            self._n_reads += 1
            begun += 1
        if begun < len(index):
            self._host.abandon(slots[begun:], generations[begun:])
        if begun:
            self._wait_for(promotion, batch)
        else:
            self.disk.release(lease)

    def _wait_for(self, promotion: Promotion, batch: _Batch) -> None:
        if batch not in promotion.reads:
            promotion.reads.add(batch)
            batch.waiting.append(promotion)

    def give_up(self, promotion: Promotion) -> None:
        """Nobody waits for it any more; the reads go on and serve others. A disk that did not
        answer in time is not asked for a while, or each next request would wait as long."""
        if promotion.reads and promotion.took_s is not None:
            self._mover.too_slow(promotion.took_s)
        for batch in promotion.reads:
            batch.waiting.remove(promotion)
        promotion.reads.clear()
        for lease in promotion.leases:
            self._host.release(lease)
        promotion.leases.clear()

    # -- what became of them -----------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Returns when as many moves are over as reads were under way, or after so long.

        Not after each of them: whoever waits would take the cores that the reads need.
        """
        if self._batch_of:
            self._mover.wait(seconds, max(1, self._n_reads))

    def poll(self) -> None:
        """Settles what is over."""
        for moved in self._mover.poll():
            batch = self._batch_of.pop(moved.ticket)
            self._n_reads -= not batch.down
            if moved.fault == "room" and self._try_again(batch, moved.ticket):
                continue
            batch.moved[moved.ticket] = moved
            for name in ("queued_s", "io_s", "check_s"):
                self.totals[name] += getattr(moved, name)
            if batch.is_over and not batch.down:
                self._read(batch)
        # A block that was written before its parent waits for it (I2).
        while self._down and self._down[0].is_over:
            self._written(self._down.popleft())

    def _try_again(self, batch: _Batch, ticket: int) -> bool:
        batch.tries += 1
        if batch.tries > ROOM_TRIES or not self._evict(ROOM_BLOCKS):
            return False
        (move,) = (move for move in batch.moves if move.ticket == ticket)
        if not self._mover.write(move):
            return False
        self._batch_of[ticket] = batch
        return True

    def _written(self, batch: _Batch) -> None:
        self._host.release(batch.lease)
        for move in batch.moves:
            moved = batch.moved[move.ticket]
            record = np.array([move.record], np.int32)
            generation = np.array([move.record_generation], np.uint64)
            if moved.fault:
                self._fault(move, moved)
                self.disk.abandon(record, generation)
            elif self.disk.publish(record, generation, np.array([moved.checksum], np.uint64)):
                self.totals["written"] += 1
                self.totals["bytes_written"] += moved.bytes
            else:  # its parent failed, or all was dropped meanwhile
                self._mover.drop(move.record)

    def _read(self, batch: _Batch) -> None:
        good = True
        for move in batch.moves:
            self._coming.pop(move.key, None)
            moved = batch.moved[move.ticket]
            slot = np.array([move.slot], np.int32)
            generation = np.array([move.slot_generation], np.uint64)
            good = good and not moved.fault
            if moved.fault:
                self._fault(move, moved)
            if good:
                self._host.publish(slot, generation, np.array([moved.checksum], np.uint64))
                self.totals["read"] += 1
                self.totals["bytes_read"] += moved.bytes
            else:  # I2: nothing below a block that failed
                self._host.abandon(slot, generation)
        self.disk.release(batch.lease)
        for promotion in batch.waiting:
            promotion.reads.discard(batch)
            lease, *_ = self._host.acquire(batch.keys, 0, len(batch.keys), use=False)
            if lease:  # until the request asks again
                promotion.leases.append(lease)
        batch.waiting.clear()

    def _fault(self, move: Move, moved: Moved) -> None:
        if moved.fault == "room":
            self.totals["refused"] += 1
            return
        self.totals["faults"] += 1
        if moved.fault != "record":
            return
        blocks = self.disk.quarantine(move.record, move.record_generation)  # I5
        self._mover.drop(move.record)
        self._bus.emit(
            events.Quarantined(key=move.key.hex(), blocks=blocks, reason="disk", tier="disk")
        )

    def distrust(self, key: bytes) -> int:
        """Takes a block out for good whose checksum holds and whose content is wrong, with all that
        hangs below it, now and after a restart; how many."""
        found = self.disk.find(key)
        if found is None:
            return 0
        record, generation = found
        blocks = self.disk.quarantine(record, generation)  # I5
        self._mover.drop(record)  # what hangs below it counts for nothing without it (I2)
        return blocks

    # -- the whole ---------------------------------------------------------------------------

    def drop(self) -> None:
        """Nothing on the disk answers any more, now or after a restart."""
        self.disk.clear()
        self._mover.clear()

    def stats(self) -> dict[str, Any]:
        """Counts of the disk's records and of the moves."""
        return {
            **self.disk.stats(),
            **self.totals,
            "on": self._mover.on,
            "used_bytes": self._mover.used_bytes,
            "disk_bytes": self._mover.disk_bytes,
            "under_way": self.n_under_way,
        }

    def _tell_evictions(self) -> None:
        evictions = int(self.disk.stats()["evictions"])
        if evictions > self._evictions_told:
            told = evictions - self._evictions_told
            self._bus.emit(events.Evicted(blocks=told, tier="disk", cause="demote"))
            self._evictions_told = evictions
            if self._on_evicted is not None:
                self._on_evicted(self.disk.take_evicted(), "disk", "")
