"""Shadow recompute: a share of hits is computed all the same, and compared with what is stored.

Checksums tell that bytes are those that were stored; only this tells that they were worth storing.
A request that is chosen is answered as a miss, with the engine's own prefix cache passed over too,
or nothing would be computed. As each of its blocks is complete the worker compares it with the
slot, which is leased until then. Bits are equal where the prompt was cut into chunks as before;
elsewhere they may differ by as much as that makes (see `NEAR`). More is a violation: the block and
all below it are quarantined, on the disk too, whose checksums hold as well, and the engine's own
prefix cache is emptied, which may have been loaded from them.

Of models with several KV-cache groups those of full attention are compared, which all others are
computed from.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmem import events
from kvmem.cache import Cache
from kvmem.engines.vllm.keys import Chains
from kvmem.engines.vllm.wire import Compare, Compared
from kvmem.store.scratch import Scratch
from kvmem.types import GroupShape

if TYPE_CHECKING:
    import torch

    from kvmem.engines.copiers import Copier
    from kvmem.node.client import NodeCache
    from kvmem.store.arena import Arena

__all__ = ["NEAR", "Comparer", "Shadows", "distance"]

# How far a layer's part of a block may be from the stored one: the length of their difference over
# that of the stored one. Measured with SmolLM2-135M: a prompt prefilled in the same chunks is at 0,
# in others at 0.013 in bfloat16 and below 0.001 in float32; the next block of the same text is at
# 0.97 or more in the layer where it is farthest.
NEAR = {1: 0.25, 2: 0.1, 4: 0.01, 8: 0.01}  # by bytes of a number
AT_A_TIME = 8  # slots of scratch memory


@dataclass(slots=True)
class _Shadow:
    """Blocks [0, len(slots)) of each group that a request would have been answered with."""

    tweak: bytes  # of the keys then: weights may change before it is computed
    slots: dict[int, np.ndarray]
    generations: dict[int, np.ndarray]
    done: dict[int, int]
    epoch: int = 0  # of the cache: in another one its slots are others'


class Shadows:
    """The scheduler's side: who is chosen, and what is to be compared in a step.

    Args:
        cache: whose blocks.
        groups: the model's KV-cache groups.
        share: of hits, 0 to 1.
        bus: where outcomes go.
    """

    def __init__(
        self, cache: Cache | NodeCache, groups: Sequence[GroupShape], share: float, bus: events.Bus
    ) -> None:
        self._cache = cache
        self._groups = tuple(groups)
        self._share = share
        self._bus = bus
        self._credit = 0.0
        self._of: dict[str, _Shadow] = {}

    def choose(self, request_id: str, keys: Chains, limit: int) -> bool:
        """Whether this request is to be computed and compared; it counts if it would hit.

        Args:
            request_id: whose.
            keys: the prompt's.
            limit: tokens that it could be answered with at most.
        """
        if not self._share:
            return False
        stop = self._cache.match(keys.all(), 0, limit)
        if not stop:
            return False
        self._credit += self._share
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        grant = self._cache.acquire(_lease(request_id), keys.all(), start=0, limit=stop)
        parts = [part for part in grant.parts if self._groups[part.group].closed]
        self._of[request_id] = _Shadow(
            keys.tweak,
            {part.group: part.slots for part in parts},
            {part.group: part.generations for part in parts},
            {part.group: 0 for part in parts},
            grant.epoch,
        )
        return True

    def orders(
        self, request_id: str, keys: Chains, tables: Sequence[Sequence[int]] | None, computed: int
    ) -> list[Compare]:
        """What is complete after a step that computes the request up to `computed` tokens."""
        shadow = self._of.get(request_id)
        if shadow is None or tables is None:
            return []
        if shadow.tweak != keys.tweak or shadow.epoch != self._cache.epoch:
            self.release(request_id)
            return []
        found = []
        for group, slots in shadow.slots.items():
            first = shadow.done[group]
            stop = min(len(slots), computed // self._groups[group].block_tokens)
            if stop <= first:
                continue
            shadow.done[group] = stop
            found.append(
                Compare(
                    request_id,
                    group,
                    np.asarray(tables[group][first:stop], np.int32),
                    slots[first:stop],
                    shadow.generations[group][first:stop],
                    b"".join(keys.of(group)[first:stop]),
                )
            )
        return found

    def told(self, compared: Compared) -> int:
        """Takes in an outcome: quarantines what differs (I5), says so; blocks quarantined."""
        gone = 0
        for slot, generation, key in compared.bad:
            gone += self._cache.distrust(slot, generation, key=key, reason="shadow")
        self._bus.emit(
            events.Shadowed(
                request_id=compared.request_id,
                blocks=compared.blocks,
                equal=compared.equal,
                bad=len(compared.bad),
                worst=compared.worst,
            )
        )
        return gone

    def release(self, request_id: str) -> None:
        """The request is over, or what it computes is of other weights."""
        if self._of.pop(request_id, None) is not None:
            self._cache.release(_lease(request_id))

    def clear(self) -> None:
        """Nothing stored so far is compared any more: it may be of other weights."""
        for request_id in list(self._of):
            self.release(request_id)


def _lease(request_id: str) -> str:
    return f"{request_id}#shadow"


class Comparer:
    """The worker's side.

    Args:
        scratch: private slots as large as the arena's.
        copier: over `scratch`, with the device's blocks registered.
        rank: whose shares.
        piece_bytes: of each group, bytes of each layer's piece of a block, in their order.
        item_bytes: of each group, bytes of a number.
    """

    def __init__(
        self,
        scratch: Scratch,
        copier: Copier,
        rank: int,
        piece_bytes: Sequence[Sequence[int]],
        items: Sequence[torch.dtype],
    ) -> None:
        self._scratch = scratch
        self._copier = copier
        self._rank = rank
        self._cuts = [np.cumsum([0, *pieces]).tolist() for pieces in piece_bytes]
        self._items = list(items)
        self._generation = 0

    def compare(self, arena: Arena, order: Compare) -> Compared:
        """Compares device blocks with the slots that hold the same keys."""
        equal, worst, bad = 0, 0.0, []
        for first in range(0, len(order.slots), AT_A_TIME):
            stop = min(len(order.slots), first + AT_A_TIME)
            n = stop - first
            self._generation += 1
            keys = order.keys[32 * first : 32 * stop]
            status, _ = self._copier.store(
                order.block_ids[first:stop],
                np.arange(n, dtype=np.int32),
                np.full(n, self._generation, np.uint64),
                keys,
                order.group,
            )
            for i in range(n):
                slot, generation = int(order.slots[first + i]), int(order.generations[first + i])
                far = self._distance(arena, order.group, i, slot) if status[i] == 0 else None
                if far is None:
                    continue
                equal += far == 0.0
                worst = max(worst, far)
                if far > NEAR[self._items[order.group].itemsize]:
                    bad.append((slot, generation, keys[32 * i : 32 * i + 32]))
        return Compared(order.request_id, self._rank, len(order.slots), equal, worst, bad)

    def _distance(self, arena: Arena, group: int, i: int, slot: int) -> float:
        cuts = self._cuts[group]
        header = arena.header
        at = arena.data_of(slot) + self._rank * header.slot_stride
        stored = np.frombuffer(arena.buffer, np.uint8)[at : at + cuts[-1]]
        fresh = self._scratch.share(i, self._rank)[: cuts[-1]]
        if np.array_equal(stored, fresh):
            return 0.0
        pairs = itertools.pairwise(cuts)
        item = self._items[group]
        return max(distance(stored[a:b], fresh[a:b], item) for a, b in pairs)


def distance(stored: np.ndarray, fresh: np.ndarray, item: torch.dtype) -> float:
    """The length of the difference over that of the stored numbers; infinite where one of them is
    no number and the other is."""
    import torch

    if np.array_equal(stored, fresh):
        return 0.0
    a, b = (torch.from_numpy(part.copy()).view(item).to(torch.float64) for part in (stored, fresh))
    far = float((a - b).norm() / a.norm().clamp_min(1e-30))
    return far if np.isfinite(far) else float("inf")
