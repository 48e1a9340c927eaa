"""Which blocks are stored, from the engine's tables, and what becomes of them.

A step that reserved slots is outstanding until the workers' acknowledgement of that step, or of a
later one, comes back: a step that is passed over was lost, and its slots are given back (I4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvmem import events
from kvmem.engines.vllm.seen import Outstanding, Seen
from kvmem.engines.vllm.wire import Orders, Store, StoreDone, Words

if TYPE_CHECKING:
    from kvmem.engines.vllm.scheduler import SchedulerHalf

__all__ = ["NULL_BLOCK", "Storing"]

# The engine's number for a block that is not there: out of a window, or a state that was not kept.
NULL_BLOCK = 0


class Storing:
    """The stores of a `SchedulerHalf`, in its thread."""

    def __init__(self, half: SchedulerHalf) -> None:
        self._half = half
        self._geometry = half.geometry
        self._cache = half.cache
        self._totals = half.totals
        self._bus = half.bus
        self.outstanding: dict[int, list[Outstanding]] = {}

    # -- a step goes out ---------------------------------------------------------------------

    def completes(self, seen: Seen, n_computed: int) -> bool:
        """Whether the step completes a block of some group, cheaply: most steps do not."""
        for group, stored in zip(self._geometry.groups, seen.stored, strict=True):
            if n_computed // group.shape.block_tokens > stored:
                return True
        return False

    def of_tables(
        self,
        orders: Orders,
        seen: Seen,
        tables: Sequence[Sequence[int]],
        n_computed: int | None,
    ) -> None:
        """Orders the stores of blocks that are complete and hashed, by the request's tables.

        Without `n_computed` the tables hold nothing else.
        """
        if self._is_off(seen):
            return
        for index, (group, table) in enumerate(zip(self._geometry.groups, tables, strict=True)):
            keys = seen.keys.of(index)
            stop = min(len(keys), len(table))
            if n_computed is not None:
                stop = min(stop, n_computed // group.shape.block_tokens)
            start, seen.stored[index] = seen.stored[index], max(seen.stored[index], stop)
            if stop <= start or group.from_offers:
                continue
            if group.shape.closed:
                blocks: Sequence[int] = range(start, stop)
            else:
                blocks = [i for i in range(start, stop) if table[i] != NULL_BLOCK]
            if blocks:
                self._store(orders, seen, index, table, blocks)

    def of_states(self, orders: Orders, seen: Seen, offers: Iterable[tuple[int, int, int]]) -> None:
        """Orders the stores of states that the engine says this step completes: (group, block,
        tokens). Where a request keeps which state, its table does not tell."""
        if self._is_off(seen):
            return
        for index, block_id, n_tokens in offers:
            at, rest = divmod(n_tokens, self._geometry.groups[index].shape.block_tokens)
            # A state inside a block is for the engine's own use: no prompt is resumed there.
            if rest == 0 and 0 < at <= len(seen.keys.of(index)):
                self._store(orders, seen, index, {at - 1: block_id}, [at - 1])

    def has_more(self, seen: Seen, tables: Sequence[Sequence[int]]) -> bool:
        """Whether blocks that are complete were not stored yet; notes where they are."""
        request, more = seen.request, False
        if self._is_off(seen):
            return False
        in_flight = getattr(request, "num_in_flight_tokens", 0)
        computed = min(request.num_computed_tokens - in_flight, request.num_tokens - 1)
        seen.device_blocks = []
        for index, (group, table) in enumerate(zip(self._geometry.groups, tables, strict=True)):
            complete = min(computed // group.shape.block_tokens, len(seen.keys.of(index)))
            complete = min(complete, len(table))
            seen.device_blocks.append(list(table[:complete]))
            more = more or (complete > seen.stored[index] and not group.from_offers)
        return more

    def _is_off(self, seen: Seen) -> bool:
        """Whether the live switch is against it; what is passed over is stored when it is not."""
        if self._half.switch.read().stores:
            return False
        seen.receipt.store_off = "switch"
        return True

    def _store(
        self,
        orders: Orders,
        seen: Seen,
        group: int,
        table: Sequence[int] | dict[int, int],
        blocks: Sequence[int],
    ) -> None:
        """Orders the stores of some blocks of a request, those that are not here yet."""
        request_id, keys = seen.request.request_id, seen.keys.of(group)
        room = self._cache.reserve(request_id, group, keys, blocks)
        stop = blocks[-1] + 1
        chosen = room.index.tolist()
        if chosen:  # first of all: what is reserved is given back whatever happens
            self.outstanding.setdefault(orders.sequence, []).append(
                Outstanding(
                    request_id=request_id,
                    group=group,
                    stop=stop,
                    slots=room.slots,
                    generations=room.generations,
                    keys=keys[:stop] if self._cache.has_disk else [],
                    blocks=chosen,
                    codec=self._geometry.groups[group].int8 if seen.approximate else 0,
                    epoch=room.epoch,
                )
            )
        seen.receipt.refused += room.refused
        self._totals.refused += room.refused
        if not chosen:
            self._cache.hold(request_id, group, keys, stop)
            return
        orders.stores.append(
            Store(
                request_id=request_id,
                group=group,
                block_ids=np.asarray([table[i] for i in chosen], np.int32),
                slots=room.slots,
                generations=room.generations,
                keys=b"".join(keys[i] for i in chosen),
            )
        )

    # -- a step comes back -------------------------------------------------------------------

    def acknowledged(self, done: StoreDone) -> None:
        """Publishes what a step wrote, and gives back what earlier ones did not report."""
        for sequence in [s for s in self.outstanding if s < done.sequence]:
            self._give_back(self.outstanding[sequence])
            del self.outstanding[sequence]
        # They stay outstanding until all is published: a failure half-way is given back later.
        self._stored(done, self.outstanding.get(done.sequence, []))
        self.outstanding.pop(done.sequence, None)

    def _stored(self, done: StoreDone, waiting: list[Outstanding]) -> None:
        if done.ranks < self._half.ranks:  # I4: some worker has not said that its share is written
            self._give_back(waiting)
            return
        share = done.seconds / max(1, sum(len(w.slots) for w in waiting))
        for wait, status, sums in zip(waiting, done.statuses, done.checksums, strict=True):
            self._publish(wait, status, sums, share * len(wait.slots))

    def _publish(self, wait: Outstanding, status: np.ndarray, sums: Words, seconds: float) -> None:
        if wait.epoch != self._cache.epoch:  # written where nobody looks any more
            return
        # A failed block cuts the chain: what was reserved on top of it goes with it (I2).
        good = status == 0
        if not good.all():
            self._cache.abandon(wait.slots[~good], wait.generations[~good])
        n = self._cache.publish(wait.slots[good], wait.generations[good], sums[good])
        if n:
            self._cache.demote(wait.group, wait.keys, wait.blocks, codec=wait.codec)
        self._totals.blocks_stored += n
        n_bytes = n * self._geometry.groups[wait.group].block_bytes * self._half.ranks
        self._totals.bytes_stored += n_bytes
        self._totals.store_s += seconds
        self._bus.emit(
            events.Stored(
                request_id=wait.request_id,
                blocks=n,
                bytes=n_bytes,
                seconds=seconds,
            )
        )
        seen = self._half.seen(wait.request_id)
        if seen is not None:
            seen.receipt.blocks_stored += n
            seen.receipt.store_ms += seconds * 1e3
            if not seen.finished:
                keys = seen.keys.of(wait.group)
                self._cache.hold(wait.request_id, wait.group, keys, wait.stop)

    def _give_back(self, lost: list[Outstanding]) -> None:
        for wait in lost:
            if wait.epoch == self._cache.epoch:
                self._cache.abandon(wait.slots, wait.generations)
