"""What is on the device between requests: brought before it is asked for, or first to be evicted.

    a wait is over ──▶ bring: free blocks of the engine's pool are taken, a load of what the host
                       has goes out with the next step; when all ranks have it, the blocks get
                       their hashes and are free again, the newest of all: the request finds them
    a session ends ──▶ leave: its own blocks are the next that the engine takes

Beside a request's own way this is all that touches vLLM's `BlockPool`, and parts of it are private
(`NEEDED`). Where one of them is missing or does something else, this is off, which is one event,
and loads begin when the request comes (I9). It never takes blocks that are in use, nor so many that
requests under way lack them, and holds them no longer than a load takes, so that a pool is whole
again without any clock (I7).

A block is given its hash after its load and its checks are over on all ranks (I4), and only if no
reset and no new weights came between (I5).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvmem import events
from kvmem.cache import Brought, Cache
from kvmem.engines.vllm.wire import Load, LoadDone, LoadPart

if TYPE_CHECKING:
    from kvmem.engines.vllm.scheduler import SchedulerHalf

__all__ = ["NEEDED", "Device", "is_early"]

log = logging.getLogger("kvmem")

T = TypeVar("T")

# Methods of vLLM's BlockPool and their parameters.
NEEDED = {
    "_insert_block_hash": ("block_hash_with_group_id", "block", "num_tokens"),
    "free_blocks": ("ordered_blocks",),
    "get_cached_block": ("block_hash", "kv_cache_group_ids"),
    "get_new_blocks": ("num_blocks",),
    "get_num_free_blocks": (),
    "touch": ("blocks",),
}
QUEUE_NEEDED = {"prepend_n": ("blocks",), "remove": ("block",)}  # of its free_block_queue
LOADING_SHARE = 0.5  # of the pool's blocks may be on their way at once
FREE_SHARE = 1 / 8  # so much of the pool stays free for requests
MOST_LOADS = 64
NAME = "kvmem#early-"


@dataclass(slots=True)
class _Loading:
    """Blocks [first, first + len(new)) of a chain on their way; `prefix` are those before, held."""

    load: Load
    lease: int
    prefix: list[Any]
    new: list[Any]
    keys: list[bytes]
    first: int
    epoch: tuple[int, bytes]
    sent: bool = False
    failed: bool = False
    ranks: set[int] = field(default_factory=set)  # that have told of its end


@dataclass(slots=True)
class Counts:
    """Since the engine started: blocks brought, those whose load failed or came too late, and
    those that were put first."""

    brought: int = 0
    discarded: int = 0
    left: int = 0
    refused: int = 0


class Device:
    """See the module. One thread calls it, the engine's scheduler."""

    def __init__(self, half: SchedulerHalf, why_off: str = "") -> None:
        self._half = half
        self._pool: Any = None
        self._make_key: Callable[[Any, int], Any] | None = None
        self._asked: dict[str, list[bytes]] = {}  # chains whose load goes out with the next step
        self._loading: dict[str, _Loading] = {}
        self._flights = half.flights
        self._serial = 0
        self._resets = 0
        self.off = why_off
        self.counts = Counts()

    def bind(self, pool: Any) -> None:
        """The engine's pool; off, with its event, where that is another one than is known here."""
        self._safely(lambda: self._bind(pool), None)

    def _bind(self, pool: Any) -> None:
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        lacks = [
            name
            for owner, needed in ((pool, NEEDED), (pool.free_block_queue, QUEUE_NEEDED))
            for name, parameters in needed.items()
            if _parameters_of(getattr(owner, name, None)) != parameters
        ]
        if lacks:
            raise TypeError(f"vLLM's BlockPool lacks {', '.join(lacks)}")
        self._make_key = make_block_hash_with_group_id
        if not pool.enable_caching:
            self.off = "the engine's prefix cache is off"
        elif pool.enable_kv_cache_events:
            self.off = "the engine tells others of its blocks, and would not tell of these"
        self._pool = pool

    @property
    def _cache(self) -> Cache:
        cache = self._half.cache
        assert isinstance(cache, Cache), "with a node this is off"
        return cache

    # -- for sessions ------------------------------------------------------------------------

    @property
    def why_not(self) -> str:
        """Why nothing can be brought now; empty where it can."""
        if self.off:
            return self.off
        if self._pool is None:
            return "the engine has not shown its blocks"
        if self._half.live.epoch:
            return "weights were changed live"
        return "loads are off" if "loads" in self._half.off() else ""

    def bring(self, chain: list[bytes]) -> Brought:
        """Begins to load what the device lacks of a chain, as far as the host has it; what the
        device has of it becomes the newest there."""
        if self.why_not:
            return Brought(0, 0)
        return self._safely(lambda: self._bring(chain), Brought(0, 0))

    def _bring(self, chain: list[bytes]) -> Brought:
        pool = self._pool
        here = self._cached(chain)
        coming = len(here)
        while coming < len(chain) and self._flights.is_coming(chain[coming]):
            coming += 1
        if coming > len(here):
            return Brought(coming - len(here), len(here))  # it is on its way
        pool.touch(here)
        pool.free_blocks(reversed(here))  # the newest now, the deepest before those above it
        room = self._room()
        there = self._cache.prefix(b"".join(chain))[0] - len(here)
        n = min(room, there)
        if n <= 0:
            self.counts.refused += there > 0
            return Brought(-1 if there > 0 else 0, len(here))
        self._serial += 1
        name, keys = f"{NAME}{self._serial}", chain[: len(here) + n]
        self._asked[name] = keys
        self._flights.begin(name, keys[len(here) :])
        return Brought(n, len(here))

    def _room(self) -> int:
        """Blocks that may be taken now, at most."""
        if self._half.proofs.wanted or len(self._loading) + len(self._asked) >= MOST_LOADS:
            return 0
        n_all = self._pool.num_gpu_blocks
        held = sum(len(one.new) for one in self._loading.values())
        free = self._pool.get_num_free_blocks() - int(FREE_SHARE * n_all)
        return min(int(LOADING_SHARE * n_all) - held, free)

    def _begin(self, name: str, chain: list[bytes]) -> None:
        """Takes blocks for what is to be loaded; none where there is no need or no room by now."""
        pool, cache = self._pool, self._cache
        here = self._cached(chain)
        first = len(here)
        pool.touch(here)  # they don't go while room is made for the rest
        lease, new = 0, []
        try:
            stop = min(len(chain), first + max(0, self._room()))
            lease, slots, generations = cache.lease_chain(chain, first, stop)
            keys = chain[first : first + len(slots)]
            if keys:
                new = pool.get_new_blocks(len(keys))
                part = LoadPart(
                    group=0,
                    block_ids=np.asarray([block.block_id for block in new], np.int32),
                    slots=slots,
                    generations=generations,
                    keys=b"".join(keys),
                    verify=self._half.pick_verified(len(new)),
                )
                load = Load(name, [part], early=True)
                self._flights.begin(name, keys)
                self._loading[name] = _Loading(load, lease, here, new, keys, first, self._epoch())
        finally:
            if name not in self._loading:
                self._flights.end(name)
                pool.free_blocks(reversed([*here, *new]))
                if lease:
                    cache.release_chain(lease)

    def leave(self, chain: list[bytes], own: int) -> int:
        """The last `own` blocks of a chain are the next that the engine takes, the deepest first;
        how many of them were free."""
        return 0 if self.why_not else self._safely(lambda: self._leave(chain, own), 0)

    def _leave(self, chain: list[bytes], own: int) -> int:
        here = self._cached(chain)[max(0, len(chain) - own) :]
        free = [block for block in reversed(here) if block.ref_cnt == 0]
        queue = self._pool.free_block_queue
        for block in free:
            queue.remove(block)
        queue.prepend_n(free)
        self.counts.left += len(free)
        return len(free)

    def _cached(self, chain: Sequence[bytes]) -> list[Any]:
        found = []
        for key in chain:
            block = self._pool.get_cached_block(key, [0])
            if block is None:
                break
            found.append(block[0])
        return found

    # -- steps -------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether the engine must step although no request asks it to."""
        return bool(self._loading or self._asked)

    def orders(self) -> list[Load]:
        """Loads that have not gone out yet, until `sent_out`. Their blocks are taken now and not
        before: a pool of which some are taken can't be reset."""
        if self.why_not:
            self._forget_asked()
        while self._asked:
            name, chain = self._asked.popitem()
            self._safely(partial(self._begin, name, chain), None)
        return [one.load for one in self._loading.values() if not one.sent]

    def awaited(self) -> list[str]:
        """Loads whose end was not heard on all ranks."""
        return list(self._loading)

    def sent_out(self) -> None:
        """The engine has the orders."""
        for one in self._loading.values():
            one.sent = True

    def break_new(self) -> None:
        """Orders that never went out are given up."""
        self._forget_asked()
        for name in [name for name, one in self._loading.items() if not one.sent]:
            self._end(name, failed=True)

    def reset(self) -> None:
        """What is on its way gets no hashes any more (I5)."""
        self._resets += 1
        self._forget_asked()

    def _forget_asked(self) -> None:
        while self._asked:
            self._flights.end(self._asked.popitem()[0])

    def acknowledged(self, loads: Sequence[LoadDone]) -> list[LoadDone]:
        """Takes in loads that are over on a rank; those of them that were not heard of before."""
        fresh = []
        for done in loads:
            one = self._loading.get(done.request_id)
            if one is None or done.rank in one.ranks:
                continue  # a request's, or told again
            fresh.append(done)
            one.ranks.add(done.rank)
            one.failed = one.failed or bool(done.bad) or done.blocks != len(one.new)
            if len(one.ranks) == self._half.ranks:
                self._end(done.request_id, failed=one.failed)
        return fresh

    def _end(self, name: str, *, failed: bool) -> None:
        one = self._loading.pop(name)
        self._flights.end(name)
        failed = failed or bool(self.off) or one.epoch != self._epoch()
        try:
            if failed:
                self.counts.discarded += len(one.new)
            else:
                self._safely(lambda: self._publish(one), None)
        finally:
            # Whatever happened, nobody writes into them any more: they go back.
            self._cache.release_chain(one.lease)
            self._pool.free_blocks(reversed([*one.prefix, *one.new]))

    def _publish(self, one: _Loading) -> None:
        assert self._make_key is not None
        block_tokens = self._half.geometry.block_tokens
        for i, (key, block) in enumerate(zip(one.keys, one.new, strict=True)):
            if self._pool.get_cached_block(key, [0]) is None:  # else a request was quicker
                self._pool._insert_block_hash(
                    self._make_key(key, 0), block, num_tokens=(one.first + i + 1) * block_tokens
                )
                self.counts.brought += 1

    def _epoch(self) -> tuple[int, bytes]:
        return self._resets, self._half.live.epoch

    # -- inside ------------------------------------------------------------------------------

    def _safely(self, do: Callable[[], T], otherwise: T) -> T:
        try:
            return do()
        except Exception as error:  # I9: advice only: a request loads what it finds missing
            log.exception("kvmem: bringing blocks to the device failed, and is off")
            if not self.off:
                self.off = f"{type(error).__name__}: {error}"
                self._half.bus.emit(events.DeviceOff(error=self.off))
            return otherwise

    def stats(self) -> dict[str, Any]:
        """Blocks brought, discarded and put first, and why this is off."""
        counts = self.counts
        return {
            "brought": counts.brought,
            "discarded": counts.discarded,
            "left": counts.left,
            "refused": counts.refused,
            "under_way": sum(len(one.new) for one in list(self._loading.values())),
            "off": self.off,
        }


def is_early(name: str) -> bool:
    """Whether a load is one of those that belong to no request."""
    return name.startswith(NAME)


def _parameters_of(method: Any) -> tuple[str, ...] | None:
    return tuple(inspect.signature(method).parameters) if callable(method) else None
