"""Whose blocks the host holds: how many now, and for how long, by tenant (a salt's digest).

A block is charged to the tenant of the request that reserved its slot, from then until the slot
is another's or the block has gone. That a block was evicted nobody tells by slot, so a walk over
the slots, some at a time, takes such off: figures lag behind by one walk at most.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from kvmem.node.wire import PackedKeys

__all__ = ["MOST_TENANTS", "Tenants"]

MOST_TENANTS = 4096  # after so many, the rest share one line
CHAINS = 64  # a tenant's last prompts, from which its own room is made
CHAIN_BLOCKS = 1 << 16  # of them together
OTHERS = b"others"
NOBODY = -1


class _Tenant:
    __slots__ = ("at_s", "blocks", "byte_s", "chains", "n_chained", "refused", "stored")

    def __init__(self, now: float) -> None:
        self.blocks = 0
        self.byte_s = 0.0
        self.at_s = now
        self.stored = 0
        self.refused = 0
        self.chains: deque[PackedKeys] = deque()  # the one used least lately first
        self.n_chained = 0


class Tenants:
    """See the module.

    Args:
        n_slots: of the arena.
        block_bytes: of a slot, all ranks together.
        share: of the slots that one tenant may have.
    """

    def __init__(self, n_slots: int, block_bytes: int, share: float) -> None:
        self._owner = np.full(n_slots, NOBODY, np.int32)
        self._generation = np.zeros(n_slots, np.uint64)
        self._block_bytes = block_bytes
        self.most = max(1, int(n_slots * share))
        self._limited = share < 1.0
        self._number: OrderedDict[bytes, int] = OrderedDict()
        self._tenants: list[_Tenant] = []
        self._walk_at = 0

    def room(self, tenant: bytes, now: float) -> int:
        """Blocks that the tenant may still reserve."""
        if not self._limited:
            return len(self._owner)
        return max(0, self.most - self._tenant(tenant, now)[1].blocks)

    def make_room(
        self, tenant: bytes, n: int, shed: Callable[[PackedKeys, int], np.ndarray], now: float
    ) -> int:
        """Has the tenant's own oldest prompts shed blocks until n fit; how many do then."""
        one = self._tenant(tenant, now)[1]
        while self._limited and one.chains and self.most - one.blocks < n:
            keys = one.chains.popleft()
            one.n_chained -= len(keys)
            self.discharge(shed(keys, n - (self.most - one.blocks)), now)
        return self.room(tenant, now)

    def charge(self, tenant: bytes, slots: np.ndarray, generations: np.ndarray, now: float) -> None:
        """The slots are reserved for a request of this tenant."""
        self.discharge(slots, now)
        number, one = self._tenant(tenant, now)
        self._owner[slots] = number
        self._generation[slots] = generations
        self._settle(one, now)
        one.blocks += len(slots)
        one.stored += len(slots)

    def discharge(self, slots: np.ndarray, now: float) -> None:
        """The slots hold nothing of anybody's any more."""
        owners = self._owner[slots]
        for number in np.unique(owners).tolist():
            if number != NOBODY:
                one = self._tenants[number]
                self._settle(one, now)
                one.blocks -= int((owners == number).sum())
        self._owner[slots] = NOBODY

    def refused(self, tenant: bytes, n: int, now: float) -> None:
        """So many blocks found no room within the tenant's share."""
        self._tenant(tenant, now)[1].refused += n

    def over(self, tenant: bytes, keys: PackedKeys, now: float) -> None:
        """A request's prompt: where the tenant needs room, the oldest of such goes first."""
        if not self._limited or not len(keys):
            return
        one = self._tenant(tenant, now)[1]
        one.chains.append(keys)
        one.n_chained += len(keys)
        while len(one.chains) > CHAINS or (one.n_chained > CHAIN_BLOCKS and len(one.chains) > 1):
            one.n_chained -= len(one.chains.popleft())

    def walk(
        self,
        published: Callable[[int, int], tuple[Any, Any, Any]],
        held: np.ndarray,
        n: int,
        now: float,
    ) -> None:
        """Looks at the next n slots: what is neither published nor in `held` (a flag a slot: it is
        reserved) has gone."""  # fmt: skip
        first = self._walk_at
        stop = min(len(self._owner), first + n)
        slots, generations, _ = published(first, stop - first)
        there = held[first:stop].copy()
        same = self._generation[slots] == generations
        there[slots[same] - first] = True
        gone = np.flatnonzero(~there & (self._owner[first:stop] != NOBODY)) + first
        if len(gone):
            self.discharge(gone, now)
        self._walk_at = stop if stop < len(self._owner) else 0

    def told(self, now: float) -> dict[str, dict[str, Any]]:
        """Each tenant's figures, by its digest in hex; the empty one has no salt."""
        found = {}
        for name, number in self._number.items():
            one = self._tenants[number]
            self._settle(one, now)
            found[name.hex() if name != OTHERS else "others"] = {
                "blocks": one.blocks,
                "bytes": one.blocks * self._block_bytes,
                "most_blocks": self.most,
                "byte_s": one.byte_s,
                "stored_blocks": one.stored,
                "refused_blocks": one.refused,
            }
        return found

    def _settle(self, one: _Tenant, now: float) -> None:
        one.byte_s += one.blocks * self._block_bytes * max(0.0, now - one.at_s)
        one.at_s = now

    def _tenant(self, name: bytes, now: float) -> tuple[int, _Tenant]:
        number = self._number.get(name)
        if number is None:
            if len(self._tenants) >= MOST_TENANTS and name != OTHERS:
                return self._tenant(OTHERS, now)
            number = self._number[name] = len(self._tenants)
            self._tenants.append(_Tenant(now))
        return number, self._tenants[number]
