"""The scheduler's half: owns the `Cache`, decides what is loaded and stored.

One thread calls it, the engine's scheduler. Nothing is copied here. Per request it keeps a
`_Seen`; per step that reserved slots an `_Outstanding`, until the worker's acknowledgement of
that step, or of a later one, comes back: a step that is passed over was lost, and its slots are
given back (I4).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kvmem import events
from kvmem.cache import Cache, Grant
from kvmem.config import Config
from kvmem.engines.vllm import support
from kvmem.engines.vllm.namespace import namespace_of
from kvmem.engines.vllm.receipt import Receipt, Wishes
from kvmem.engines.vllm.tables import BlockTables
from kvmem.engines.vllm.wire import MAP_FAILED, Acks, Ids, Load, LoadDone, Orders, Store, Words
from kvmem.errors import CapacityError
from kvmem.store.arena import Arena, sweep
from kvmem.store.layout import slots_within

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["SchedulerHalf"]

VERIFY_PERIOD = 1 << 16
RECENT = 32
STATS_EVERY_S = 0.25
REQUEST_ID_CHARS = 96
FAILURE_CHARS = 400


@dataclass(slots=True)
class _Seen:
    """A request that the engine told us of.

    [0, stored)  leading blocks that were published, reserved or refused: not looked at again
    `device_blocks` are the blocks of the load under way, or those the engine keeps at the end.
    `stale`: computed before a reset, so nothing of it is stored.
    """

    request: Request
    wishes: Wishes
    receipt: Receipt
    stored: int = 0
    grant: Grant | None = None
    loading: bool = False
    device_blocks: list[int] = field(default_factory=list)
    finished: bool = False
    stale: bool = False
    load_failed: bool = False

    def fail_load(self, good_blocks: int = 0) -> None:
        """One failed load is enough: asked again, the request computes (or it would never end)."""
        self.load_failed = True
        self.receipt.load_failed(self.request, good_blocks)
        self.stored = 0


@dataclass(slots=True)
class _Outstanding:
    """Slots reserved by one request in one step, not yet acknowledged."""

    request_id: str
    stop: int
    slots: Ids
    generations: Words


class SchedulerHalf:
    """See the module. `close()` unmaps and unlinks the arena.

    Raises:
        ConfigError, CapacityError, UnsupportedEngine, ArenaInUse: before any request is served.
    """

    def __init__(
        self, config: Config, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> None:
        support.check_engine(vllm_config)
        self.config = config
        self.geometry = support.geometry_of(vllm_config, kv_cache_config)
        self.namespace = namespace_of(
            config,
            vllm_config,
            kv_cache_config,
            block_tokens=self.geometry.block_tokens,
            block_bytes=self.geometry.block_bytes,
        )
        n_slots = slots_within(config.host_bytes, self.geometry.block_bytes)
        if n_slots < 1:
            raise CapacityError(
                f"kvmem's host_gb of {config.host_gb} holds no block of "
                f"{self.geometry.block_bytes:,} bytes ({self.geometry.block_tokens} tokens)",
                next_step=f"Set host_gb to at least {self.geometry.block_bytes / 2**30:.3f}, "
                "or a smaller --block-size.",
                setting="host_gb",
            )
        self.bus = events.Bus()
        self.reclaimed = sweep()
        transfer = vllm_config.kv_transfer_config
        engine_id = "".join(c for c in str(transfer and transfer.engine_id) if c.isalnum())
        self.arena = Arena.create(
            config.arena or f"{engine_id[:40]}-{os.getpid()}",
            n_slots=n_slots,
            slot_bytes=self.geometry.block_bytes,
            namespace=self.namespace.digest,
            group=0,
            label=str(vllm_config.model_config.model),
        )
        self.cache = Cache(n_slots, eviction=config.eviction, bus=self.bus)
        self.model = str(
            vllm_config.model_config.served_model_name or vllm_config.model_config.model
        )
        self.failures = 0
        self.last_failure: str | None = None
        self.totals = Totals()
        self._device_pool: BlockPool | None = None
        # Whether the worker's half has the arena mapped, as far as its last word tells.
        self._worker_maps = True
        # A streamed response has no room for its receipt: the last few stand on the stats page.
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._seen: dict[str, _Seen] = {}
        self._tables = BlockTables()
        self._sequence = 0
        self._outstanding: dict[int, list[_Outstanding]] = {}
        self._new_loads: list[str] = []
        self._to_finish: list[str] = []
        self._broken: dict[str, list[int]] = {}
        self._verify_credit = 0
        self._was_reset = False
        self._stats_written = 0.0
        self._stats_due = True
        self.write_stats()

    def bind(self, device_pool: BlockPool) -> None:
        """The engine's own block pool, to see what a reset left in it."""
        self._device_pool = device_pool

    # -- a request arrives -------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Reads the request's own wishes."""
        wishes = Wishes.read(request.kv_transfer_params, self.config)
        self._seen[request.request_id] = _Seen(request, wishes, Receipt(error=wishes.error))
        self.totals.requests += 1

    def match(self, request: Request, n_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that kvmem can add beyond the engine's own prefix hit, and that it will load
        them between steps.

        Called again and again for a waiting request, and the answer may be thrown away: asking
        changes nothing but what the request's one lease holds.
        """
        seen = self._seen.get(request.request_id)
        if seen is None:  # its on_new_request failed (I9)
            return 0, False
        tokens = self.geometry.block_tokens
        start = n_computed_tokens // tokens
        limit = min((request.num_tokens - 1) // tokens, len(request.block_hashes))
        # The engine starts it from zero. After a reset that left blocks on the device, a hit there
        # may be on blocks from before it, whatever is stored under their keys by now: nothing on
        # top of a hit is stored until a reset has emptied the device too.
        seen.stale = self._was_reset and start > 0
        skips = getattr(request, "skip_reading_prefix_cache", False)
        seen.stored = 0
        off = not seen.wishes.load or not self._worker_maps or skips
        if off or seen.load_failed:
            seen.grant = None
            reason = "load_failed" if seen.load_failed else "load_off"
            seen.receipt.matched(request, start, None, reason, tokens)
            return 0, False
        grant = self.cache.acquire(
            request.request_id, request.block_hashes, start=start, limit=max(limit, start)
        )
        seen.grant = grant
        seen.receipt.matched(request, start, grant, grant.missing, tokens)
        n_blocks = grant.n_blocks - start
        return (n_blocks * tokens, True) if n_blocks > 0 else (0, False)

    def unmatched(self, request: Request) -> None:
        """A lookup failed, so the engine's own hit may be older than a reset: as `match` says,
        nothing on top of such blocks is stored."""
        seen = self._seen.get(request.request_id)
        if seen is not None:
            seen.stale = seen.stale or self._was_reset

    def allocated(self, request: Request, blocks: KVCacheBlocks, n_external_tokens: int) -> None:
        """Device blocks exist for what `match` promised: the load goes out with this step."""
        seen = self._seen.get(request.request_id)
        if seen is None or n_external_tokens == 0 or seen.grant is None:
            return
        grant = seen.grant
        n_blocks = n_external_tokens // self.geometry.block_tokens
        block_ids = blocks.get_block_ids()[0]
        seen.device_blocks = list(block_ids[grant.start : grant.start + n_blocks])
        seen.loading = True
        self._new_loads.append(request.request_id)

    def break_load(self, request: Request, blocks: KVCacheBlocks, n_external_tokens: int) -> None:
        """The engine was promised a load that can't be made: it is told so with the next step,
        and computes the blocks instead."""
        if n_external_tokens:
            # Only the blocks to be loaded: those before them are the engine's own hit, and other
            # requests may be running on them.
            n_blocks = n_external_tokens // self.geometry.block_tokens
            seen = self._seen.get(request.request_id)
            block_ids = list(blocks.get_block_ids()[0])
            start = len(block_ids) - n_blocks
            if seen is not None and seen.grant is not None:
                start = seen.grant.start
            self._break(request.request_id, block_ids[start : start + n_blocks])

    def _break(self, request_id: str, block_ids: list[int]) -> None:
        if request_id in self._new_loads:  # it must be answered once: loaded or broken
            self._new_loads.remove(request_id)
        self._broken[request_id] = block_ids
        seen = self._seen.get(request_id)
        if seen is not None:
            seen.loading = True
            seen.fail_load()

    # -- a step goes out ---------------------------------------------------------------------

    def orders(self, output: SchedulerOutput) -> Orders:
        """This step's copies: loads that were allocated, blocks that this step completes."""
        orders = self.bare_orders(output)
        for request_id in orders.finished:
            seen = self._seen.get(request_id)
            if seen is not None and not seen.stale:
                self._store(orders, request_id, seen, seen.device_blocks, len(seen.device_blocks))
        for request_id in self._new_loads:
            seen = self._seen.get(request_id)
            if seen is not None and seen.grant is not None:
                orders.loads.append(self._load(request_id, seen, seen.grant))
        for request_id, n_tokens in output.num_scheduled_tokens.items():
            seen = self._seen.get(request_id)
            if seen is None:
                continue
            seen.loading = False  # it is computing, so its load is over, whatever was reported
            if seen.stale or not seen.wishes.store:
                continue
            request = seen.request
            complete = (request.num_computed_tokens + n_tokens) // self.geometry.block_tokens
            complete = min(complete, len(request.block_hashes))
            if complete <= seen.stored:
                continue
            block_ids = self._tables.of(request_id)
            if block_ids is not None:
                self._store(orders, request_id, seen, block_ids[0], complete)
        return orders

    def bare_orders(self, output: SchedulerOutput) -> Orders:
        """Orders that copy nothing, but say which loads are broken and which requests are over.

        Until `sent_out` they can be made again without loss.
        """
        self._sequence += 1
        self._tables.take(output)
        return Orders(
            sequence=self._sequence,
            arena=str(self.arena.path),
            scheduled_tokens=output.total_num_scheduled_tokens,
            finished=list(self._to_finish),
            broken=list(self._broken.items()),
            # A lost step may have taken all the room there is: then no store would follow it.
            confirm=bool(self._outstanding),
        )

    def sent_out(self) -> list[str]:
        """The engine has the orders: nothing of them is said twice.

        The answer are the finished requests that went with them, which can be forgotten.
        """
        finished, self._to_finish = self._to_finish, []
        self._broken, self._new_loads = {}, []
        return finished

    def forget(self, request_ids: Iterable[str]) -> None:
        """Lets go of all that is kept for requests that are over."""
        for request_id in request_ids:
            if request_id in self._to_finish:
                self._to_finish.remove(request_id)
            self._seen.pop(request_id, None)
            self.cache.release(request_id)

    def break_new_loads(self) -> None:
        """Loads that never went out are broken instead (after a failure in `orders`)."""
        for request_id in list(self._new_loads):
            seen = self._seen.get(request_id)
            if seen is not None:
                self._break(request_id, seen.device_blocks)

    def _load(self, request_id: str, seen: _Seen, grant: Grant) -> Load:
        n_blocks = len(seen.device_blocks)
        keys = b"".join(seen.request.block_hashes[grant.start : grant.start + n_blocks])
        seen.stored = grant.start + n_blocks
        return Load(
            request_id=request_id,
            block_ids=np.asarray(seen.device_blocks, np.int32),
            slots=grant.slots[:n_blocks],
            generations=grant.generations[:n_blocks],
            keys=keys,
            verify=self._pick_verified(n_blocks),
        )

    def _pick_verified(self, n_blocks: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Which blocks are checked against their checksum: an exact share, evenly spread."""
        share = round(self.config.verify_share * VERIFY_PERIOD)
        credit = self._verify_credit + share * np.arange(1, n_blocks + 1)
        self._verify_credit = int(credit[-1]) % VERIFY_PERIOD if n_blocks else self._verify_credit
        return (credit // VERIFY_PERIOD > (credit - share) // VERIFY_PERIOD).astype(np.uint8)

    def _store(
        self, orders: Orders, request_id: str, seen: _Seen, block_ids: list[int], stop: int
    ) -> None:
        keys = seen.request.block_hashes
        start = self.cache.match(keys[:stop])
        seen.stored = stop
        if start >= stop:
            self.cache.hold(request_id, keys, stop)
            return
        room = self.cache.reserve(request_id, keys, start=start, stop=stop)
        if len(room.index):  # first of all: what is reserved is given back whatever happens
            self._outstanding.setdefault(orders.sequence, []).append(
                _Outstanding(request_id, stop, room.slots, room.generations)
            )
        seen.receipt.refused += room.refused
        self.totals.refused += room.refused
        if not len(room.index):
            return
        chosen = room.index.tolist()
        orders.stores.append(
            Store(
                request_id=request_id,
                block_ids=np.asarray([block_ids[i] for i in chosen], np.int32),
                slots=room.slots,
                generations=room.generations,
                keys=b"".join(keys[i] for i in chosen),
            )
        )

    # -- a step comes back -------------------------------------------------------------------

    def acknowledged(self, acks: Acks | None) -> None:
        """Publishes what was written and quarantines what failed."""
        for where, error in acks.failures if acks is not None else ():
            self.failed(where, error)
            if where == MAP_FAILED:
                self._worker_maps = False
        for done in acks.stores if acks is not None else ():
            for sequence in [s for s in self._outstanding if s < done.sequence]:
                self._give_back(self._outstanding[sequence])
                del self._outstanding[sequence]
            if any((status == 0).any() for status in done.statuses):
                self._worker_maps = True
            # They stay outstanding until all is published: a failure half-way is given back later.
            waiting = self._outstanding.get(done.sequence, [])
            share = done.seconds / max(1, sum(len(w.slots) for w in waiting))
            for wait, status, sums in zip(waiting, done.statuses, done.checksums, strict=True):
                self._publish(wait, status, sums, share * len(wait.slots))
            self._outstanding.pop(done.sequence, None)
        for loaded in acks.loads if acks is not None else ():
            self._loaded(loaded)

    def received(self, request_ids: Iterable[str]) -> None:
        """Loads that are over, well or not."""
        for request_id in request_ids:
            seen = self._seen.get(request_id)
            if seen is not None:
                seen.loading = False
        self.let_go(request_ids)

    def let_go(self, request_ids: Iterable[str]) -> None:
        """Forgets those of them that have ended; their loads held them."""
        for request_id in request_ids:
            seen = self._seen.get(request_id)
            if seen is not None and seen.finished:
                self.forget((request_id,))

    def _publish(self, wait: _Outstanding, status: np.ndarray, sums: Words, seconds: float) -> None:
        # A failed block cuts the chain: what was reserved on top of it goes with it (I2).
        good = status == 0
        if not good.all():
            self.cache.abandon(wait.slots[~good], wait.generations[~good])
        n = self.cache.publish(wait.slots[good], wait.generations[good], sums[good])
        self.totals.blocks_stored += n
        self.totals.bytes_stored += n * self.geometry.block_bytes
        self.totals.store_s += seconds
        self.bus.emit(
            events.Stored(
                request_id=wait.request_id,
                blocks=n,
                bytes=n * self.geometry.block_bytes,
                seconds=seconds,
            )
        )
        seen = self._seen.get(wait.request_id)
        if seen is not None:
            seen.receipt.blocks_stored += n
            seen.receipt.store_ms += seconds * 1e3
            if not seen.finished:
                self.cache.hold(wait.request_id, seen.request.block_hashes, wait.stop)

    def _give_back(self, lost: list[_Outstanding]) -> None:
        for wait in lost:
            self.cache.abandon(wait.slots, wait.generations)

    def _loaded(self, done: LoadDone) -> None:
        for slot, generation, key, status in done.bad:
            if status in QUARANTINED:
                self.totals.quarantined += self.cache.quarantine(
                    slot, generation, key=key, reason=QUARANTINED[status]
                )
        n = done.blocks - len(done.bad)
        self.totals.blocks_loaded += n
        self.totals.bytes_loaded += done.bytes
        self.totals.load_s += done.seconds
        self.bus.emit(
            events.Loaded(
                request_id=done.request_id, blocks=n, bytes=done.bytes, seconds=done.seconds
            )
        )
        seen = self._seen.get(done.request_id)
        if seen is not None:
            seen.receipt.load_ms += done.seconds * 1e3
            if done.bad:
                slots = seen.grant.slots.tolist() if seen.grant is not None else []
                # The engine keeps what lies before the first block that failed.
                bad_slot = done.bad[0][0]
                seen.fail_load(slots.index(bad_slot) if bad_slot in slots else 0)

    # -- a request ends ----------------------------------------------------------------------

    def finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any]]:
        """Whether the engine must keep the request's blocks for one more copy, and the receipt.

        With asynchronous scheduling the last blocks may be complete but not yet stored, since
        their tokens were not known when they were computed.
        """
        seen = self._seen.get(request.request_id)
        if seen is None:
            return False, {}
        seen.finished = True
        receipt = seen.receipt.finish(request, self.geometry.block_tokens)
        self.totals.add(seen.receipt)
        # The id is a client's to choose, and the page has an end.
        request_id = request.request_id[:REQUEST_ID_CHARS]
        self._recent.append({"request_id": request_id, **receipt["tokens"]})
        in_flight = getattr(request, "num_in_flight_tokens", 0)
        computed = min(request.num_computed_tokens - in_flight, request.num_tokens - 1)
        complete = min(computed // self.geometry.block_tokens, len(request.block_hashes))
        aborted = str(request.get_finished_reason()) in ("abort", "error")
        keep = (
            not (aborted or seen.loading or seen.stale)
            and seen.wishes.store
            and complete > seen.stored
            and complete <= len(block_ids)
        )
        if keep:
            seen.device_blocks = list(block_ids[:complete])
            self._to_finish.append(request.request_id)
        elif not seen.loading:
            self.forget((request.request_id,))
        self._stats_due = True
        return keep, {"kvmem": receipt}

    # -- the whole ---------------------------------------------------------------------------

    def reset(self) -> bool:
        """Nothing answers any more, and requests under way store nothing of what they have.

        Slots that the worker may still be writing stay reserved until it reports them (I3).
        """
        self.cache.drop("reset")
        for seen in self._seen.values():
            seen.stale = True
        # The engine resets its own cache first, which fails while a block is in use. Blocks that
        # it kept, and those that requests go on to fill, are older than this reset.
        pool = self._device_pool  # None where the engine gives none
        self._was_reset = pool is None or bool(
            len(pool.cached_block_hash_to_block)
            or pool.get_num_free_blocks() + 1 < pool.num_gpu_blocks  # one is never free
        )
        self._stats_due = True
        return True

    def failed(self, where: str, error: str) -> None:
        """Counts a failure inside kvmem; the request went on without it (I9)."""
        self.failures += 1
        self.last_failure = f"{where}: {error}"[:FAILURE_CHARS]
        self.bus.emit(events.Failure(where=where, error=error))
        self._stats_due = True

    def write_stats(self) -> None:
        """Puts the counters where `kvmem stats` reads them, at most four times a second."""
        now = time.monotonic()
        if not self._stats_due and now - self._stats_written < STATS_EVERY_S:
            return
        self._stats_written, self._stats_due = now, False
        tier = self.cache.stats()
        page = {
            "model": self.model,
            "pid": os.getpid(),
            "updated_s": time.time(),
            "host": {
                "slots": tier["n_slots"],
                "used": tier["published"],
                "leased": tier["leases"],
                "bytes": tier["published"] * self.geometry.block_bytes,
                "slot_bytes": self.geometry.block_bytes,
            },
            "counters": {
                **self.totals.as_dict(),
                "evictions": tier["evictions"],
                "failures": self.failures,
            },
            "last_failure": self.last_failure,
            "recent": list(self._recent),
        }
        self.arena.write_stats(msgspec.msgpack.encode(page))

    def close(self) -> None:
        """Unmaps the arena and removes its file."""
        try:
            self.write_stats()
        finally:
            self.arena.close(unlink=True)


# What a load can say against a block itself; other statuses are of the copy, not of the block.
QUARANTINED = {1: "identity", 2: "generation", 3: "checksum"}


@dataclass(slots=True)
class Totals:
    """Counters since the engine started."""

    requests: int = 0
    prompt_tokens: int = 0
    tokens_hit_device: int = 0
    tokens_hit_host: int = 0
    tokens_computed: int = 0
    blocks_stored: int = 0
    blocks_loaded: int = 0
    bytes_stored: int = 0
    bytes_loaded: int = 0
    load_s: float = 0.0
    store_s: float = 0.0
    refused: int = 0
    quarantined: int = 0

    def add(self, receipt: Receipt) -> None:
        """Adds a finished request."""
        self.prompt_tokens += receipt.prompt
        self.tokens_hit_device += receipt.device
        self.tokens_hit_host += receipt.host
        self.tokens_computed += receipt.computed

    def as_dict(self) -> dict[str, Any]:
        """The counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}
