"""The scheduler's half: owns the `Cache`, decides what is loaded and stored.

One thread calls it, the engine's scheduler. Nothing is copied here. Per request it keeps a
`Seen`; what it stores, and what became of that, is `storing`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmem import events
from kvmem.cache import Cache, Grant, Part
from kvmem.config import Config
from kvmem.engines.vllm import support
from kvmem.engines.vllm.arenas import check_node, make_arena, open_cache, open_tiers
from kvmem.engines.vllm.device import Device, is_early
from kvmem.engines.vllm.flights import Flights
from kvmem.engines.vllm.geometry import geometry_of
from kvmem.engines.vllm.hinting import Hinting, install, salt_of
from kvmem.engines.vllm.keys import Chains
from kvmem.engines.vllm.misses import Misses
from kvmem.engines.vllm.namespace import namespace_of
from kvmem.engines.vllm.page import Page
from kvmem.engines.vllm.proof import Proofs
from kvmem.engines.vllm.receipt import Receipt, Wishes
from kvmem.engines.vllm.seen import Seen
from kvmem.engines.vllm.shadow import Shadows
from kvmem.engines.vllm.storing import Storing
from kvmem.engines.vllm.tables import BlockTables
from kvmem.engines.vllm.telemetry import Telemetry, log_of
from kvmem.engines.vllm.weights import Live
from kvmem.engines.vllm.wire import (
    MAP_FAILED,
    Acks,
    Load,
    LoadDone,
    LoadPart,
    Orders,
)
from kvmem.node.client import NodeCache
from kvmem.store import Scrub
from kvmem.store.arena import sweep
from kvmem.store.switch import Switch, SwitchReader

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["SchedulerHalf"]

VERIFY_PERIOD = 1 << 16
IDLE_WAIT_S = 0.02
SKIPS = "skip_reading_prefix_cache"  # of a request: no prefix cache is read for it
# What a load can say against a block itself; other statuses are of the copy, not of the block.
QUARANTINED = {1: "identity", 2: "generation", 3: "checksum"}


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
        self.geometry = geometry_of(vllm_config, kv_cache_config)
        self.ranks = vllm_config.parallel_config.tensor_parallel_size
        self.namespace = namespace_of(config, vllm_config, kv_cache_config, self.geometry)
        self.bus = events.Bus()
        # Why there was no node, told by the client's own thread.
        self._troubles: deque[str] = deque(maxlen=16)
        check_node(config)
        event_log = log_of(config)
        self.reclaimed = sweep()
        self.arena = make_arena(config, vllm_config, self.geometry, self.namespace)
        self.disk, self.far = open_tiers(config, self.arena, self.namespace, self.bus)
        self._seen: dict[str, Seen] = {}
        self.cache = open_cache(
            config,
            self.arena,
            self.geometry,
            self.bus,
            (self.disk, self.far),
            {
                "tenant_of": self._tenant_of,
                "stores": self._may_store,
                "on_trouble": lambda error: self._troubles.append(error),
            },
        )
        model = vllm_config.model_config
        self.page = Page(
            self.arena,
            model=str(model.served_model_name or model.model),
            block_bytes=self.arena.slot_bytes * self.ranks,
            allowed={"loads": config.load, "stores": config.store},
        )
        self.totals = self.page.totals
        self.shadows = Shadows(self.cache, self.geometry.shapes, config.shadow_share, self.bus)
        self.proofs = Proofs(self.ranks, self.bus, time.monotonic)
        self.live = Live(self, vllm_config)
        self.misses = Misses(self, getattr(model, "tokenizer", None))
        self.telemetry = Telemetry(self, vllm_config, event_log)
        self.hinting = Hinting(self)
        install()
        self.flights = Flights(time.monotonic)
        self.device = Device(self, self._why_not_early(vllm_config))
        if self.cache.keeping is not None:
            self.cache.sessions.device = self.device
        self._device_pool: BlockPool | None = None
        # Whether the worker's half has the arena mapped, as far as its last word tells.
        self._worker_maps = True
        self._tables = BlockTables()
        self._sequence = 0
        self.storing = Storing(self)
        self._new_loads: list[str] = []
        self._to_finish: list[str] = []
        self._broken: dict[str, list[int]] = {}
        self._verify_credit = 0
        self._was_reset = False
        self.switch = SwitchReader(
            self.arena, on_damage=lambda told: self.failed("switch", told), on_change=self._switched
        )
        # Last: its thread must not outlive a start that was refused.
        rate = config.scrub_mb_s * 1e6
        own = self.cache if isinstance(self.cache, Cache) else None
        self.scrub = Scrub(self.arena, own.published, rate) if rate and own is not None else None
        self.write_stats()
        self.telemetry.open()

    def _tenant_of(self, request_id: str) -> bytes:
        """Who pays for a request's room in a node."""
        seen = self._seen.get(request_id.removesuffix("#shadow"))
        return salt_of(getattr(seen.request, "cache_salt", None)) if seen is not None else b""

    def _may_store(self, request_id: str) -> bool:
        """Whether what the request has to compute will be stored, as far as is known."""
        seen = self._seen.get(request_id)
        return seen is not None and seen.wishes.store and not seen.stale

    def _switched(self, now: Switch) -> None:
        self.bus.emit(events.Switched(loads=now.loads, stores=now.stores))
        self.page.touch()

    def _why_not_early(self, vllm_config: VllmConfig) -> str:
        """Why no blocks can be brought to the device before a request; empty where they can."""
        if len(self.geometry.groups) > 1 or not self.geometry.shapes[0].closed:
            return "the model's KV is not one chain of blocks"
        if isinstance(self.cache, NodeCache):
            return "a node's blocks are asked for when a request comes"
        if vllm_config.lora_config is not None:
            return "the engine's names for adapters do not tell their content"
        if self.config.approximate_salt is not None:
            return "some sessions may be answered approximately"
        return ""

    def bind(self, device_pool: BlockPool) -> None:
        """The engine's own block pool, to see what a reset left in it."""
        self._device_pool = device_pool
        if not self.device.off:
            self.device.bind(device_pool)

    def has_early_loads(self) -> bool:
        """Whether blocks are on their way to the device that no request waits for."""
        return self.device.is_busy

    def came_early(self, acks: Any) -> None:
        """Takes in how loads ended that belong to no request."""
        if isinstance(acks, Acks) and acks.loads:
            fresh = self.device.acknowledged(acks.loads)
            acks.loads = [one for one in acks.loads if not is_early(one.request_id)] + fresh

    @property
    def n_running(self) -> int:
        """Requests that are not over."""
        return len(self._seen)

    def off(self) -> dict[str, str]:
        """Which of "loads" and "stores" are off for all requests, and by whom."""
        now = self.switch.peek()
        found = {}
        for what, set_on in (("loads", self.config.load), ("stores", self.config.store)):
            if not set_on or not getattr(now, what):
                found[what] = "switch" if set_on else "setting"
        if self.proofs.failed:
            found.setdefault("loads", "proof")
        if not self._worker_maps:
            found.setdefault("loads", "worker")
        return found

    def seen(self, request_id: str) -> Seen | None:
        """What is kept of a request that is not over."""
        return self._seen.get(request_id)

    # -- a request arrives -------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Reads the request's own wishes."""
        wishes = Wishes.read(request.kv_transfer_params, self.config)
        keys = Chains(request.block_hashes, self.geometry.shapes, self.geometry.hash_tokens)
        stored = [0] * len(self.geometry.groups)
        receipt = Receipt(error=wishes.error, store_off=wishes.store_off)
        seen = Seen(request, wishes, receipt, keys, stored)
        # The engine hashes the salt into every key: these blocks are nobody else's (I10).
        seen.approximate = self.is_approximate(getattr(request, "cache_salt", None) or "")
        receipt.exact = not seen.approximate
        seen.began_s = time.time()
        self._seen[request.request_id] = seen
        self.totals.requests += 1
        self._maybe_shadow(request, seen)

    def is_approximate(self, salt: str) -> bool:
        """Whether requests with this salt may be answered approximately (I10)."""
        prefix = self.config.approximate_salt
        return prefix is not None and salt.startswith(prefix)

    def _maybe_shadow(self, request: Request, seen: Seen) -> None:
        """Has a share of the hits computed and compared: the engine's own are off for them, too."""
        if getattr(request, SKIPS, None) is not False:
            return  # it is off anyway, or this vLLM can't switch it off
        if seen.wishes.load_off or self._load_off(skips=False) or self.proofs.wanted:
            return
        if seen.approximate:
            return  # what it has stored may differ from what it would compute, and is labelled so
        if getattr(request, "lora_request", None) is not None:
            return  # of what content its adapter is is known when it is scheduled
        self.live.admit(seen, 0)
        limit = self._reach(request)
        if self.shadows.choose(request.request_id, seen.keys, limit):
            setattr(request, SKIPS, True)
            seen.shadowed = True

    def match(self, request: Request, n_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that kvmem can add beyond the engine's own prefix hit, and that it will load
        them between steps. None: ask again, the engine's own hit has to be looked up anew, more
        is on its way up from the disk, or nothing is proved yet.

        Called again and again for a waiting request, and the answer may be thrown away: asking
        changes nothing but what the request's leases hold.
        """
        seen = self._seen.get(request.request_id)
        if seen is None:  # its on_new_request failed (I9)
            return 0, False
        start = n_computed_tokens
        seen.stale = True  # until it is known what it will be computed with
        if not self.live.admit(seen, start):
            return None, False
        # The engine starts it from zero. After a reset that left blocks on the device, a hit there
        # may be on blocks from before it, whatever is stored under their keys by now: nothing on
        # top of a hit is stored until a reset has emptied the device too.
        seen.stale = self._was_reset and start > 0
        skips = getattr(request, SKIPS, False)
        seen.forget_stored()
        if seen.load_began == getattr(request, "num_preemptions", 0) and not seen.load_failed:
            seen.fail_load()  # it would not be here if it had what it was promised
        off = seen.wishes.load_off or self._load_off(skips, shadowed=seen.shadowed)
        if off or seen.load_failed:
            seen.grant = None
            reason = "load_failed" if seen.load_failed else "load_off"
            self.misses.looked_up(seen, start, start, self._reach(request), off=off, missing=reason)
            seen.receipt.matched(request, start, start, reason, off)
            self.hinting.matched(seen)
            return 0, False
        self._take_scrubbed()
        grant = self.cache.acquire(
            request.request_id,
            seen.keys.all(),
            start=start,
            limit=self._reach(request),
        )
        if grant.coming:
            seen.grant = None
            return None, False
        if grant.stop > start and self.proofs.wanted:
            self.proofs.wait()
            seen.grant = None
            return None, False
        if grant.stop > start and self._comes_by_another(seen, start):
            seen.grant = None
            return None, False
        seen.grant = grant
        reach = self._reach(request)
        self.misses.looked_up(seen, start, grant.stop, reach, off=None, missing=grant.missing)
        seen.receipt.matched(
            request, start, grant.stop, grant.missing,
            from_disk=grant.from_disk, from_far=grant.from_far,
        )  # fmt: skip
        seen.receipt.disk_ms, seen.receipt.far_ms = grant.disk_s * 1e3, grant.far_s * 1e3
        self.hinting.matched(seen)
        return (grant.stop - start, True) if grant.stop > start else (0, False)

    def _comes_by_another(self, seen: Seen, start: int) -> bool:
        """Whether what the device lacks of a prompt is being loaded already, so that the engine
        will have it itself soon."""
        if len(self.geometry.groups) > 1:
            return False
        key = seen.keys.of(0)[start // self.geometry.block_tokens]
        return self.flights.waits(seen.request.request_id, key)

    def _reach(self, request: Request) -> int:
        """Tokens of the prompt that can be answered at most."""
        hashed = len(request.block_hashes) * self.geometry.hash_tokens
        return min(request.num_tokens - 1, hashed)

    def _load_off(self, skips: bool, *, shadowed: bool = False) -> str | None:
        if shadowed:
            return "shadow"
        if not self.switch.read().loads:
            return "switch"
        if skips:
            return "request"
        if self.proofs.failed:
            return "proof"
        return None if self._worker_maps else "worker"

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
        if seen.grant.epoch != self.cache.epoch:  # its slots are another memory's (I3)
            self.break_load(request, blocks, n_external_tokens)
            return
        tables = blocks.get_block_ids()
        seen.load_blocks = [
            list(tables[part.group][part.first : part.first + len(part.slots)])
            for part in seen.grant.parts
        ]
        seen.loading = True
        seen.load_began = getattr(request, "num_preemptions", 0)
        self._new_loads.append(request.request_id)
        if len(seen.grant.parts) == 1:
            part, keys = seen.grant.parts[0], seen.keys.of(seen.grant.parts[0].group)
            self.flights.begin(request.request_id, keys[part.first : part.first + len(part.slots)])

    def break_load(self, request: Request, blocks: KVCacheBlocks, n_external_tokens: int) -> None:
        """The engine was promised a load that can't be made: it is told so with the next step,
        and computes the blocks instead."""
        if n_external_tokens:
            # Only the blocks to be loaded: those before them are the engine's own hit, and other
            # requests may be running on them.
            table = list(blocks.get_block_ids()[0])
            block_tokens = self.geometry.groups[0].shape.block_tokens
            seen = self._seen.get(request.request_id)
            start = len(table) - n_external_tokens // block_tokens
            if seen is not None and seen.grant is not None:
                start = seen.grant.start // block_tokens
            stop = start + n_external_tokens // block_tokens
            self._break(request.request_id, table[start:stop])

    def _break(self, request_id: str, block_ids: list[int]) -> None:
        if request_id in self._new_loads:  # it must be answered once: loaded or broken
            self._new_loads.remove(request_id)
        self._broken[request_id] = block_ids
        self.flights.end(request_id)
        seen = self._seen.get(request_id)
        if seen is not None:
            seen.loading = True
            seen.fail_load()

    # -- a step goes out ---------------------------------------------------------------------

    def orders(self, output: SchedulerOutput) -> Orders:
        """This step's copies: loads that were allocated, blocks that this step completes."""
        self.misses.step(output.total_num_scheduled_tokens)
        self._adopt()
        self.cache.computes(self.misses.explainer.pace.s_per_token)
        orders = self.bare_orders(output)
        self.wait_for_disk(output)
        for request_id in orders.finished:
            seen = self._seen.get(request_id)
            if seen is not None and not seen.stale:
                self.storing.of_tables(orders, seen, seen.device_blocks, None)
        for request_id in self._new_loads:
            seen = self._seen.get(request_id)
            if seen is not None and seen.grant is not None:
                orders.loads.append(self._load(request_id, seen, seen.grant))
        orders.loads += self.device.orders()
        for request_id, n_tokens in output.num_scheduled_tokens.items():
            seen = self._seen.get(request_id)
            if seen is None:
                continue
            seen.loading = False  # it is computing, so its load is over, whatever was reported
            n_computed = seen.request.num_computed_tokens + n_tokens
            if seen.shadowed and not seen.stale:
                tables = self._tables.of(request_id)
                orders.compares += self.shadows.orders(request_id, seen.keys, tables, n_computed)
            if seen.stale or not seen.wishes.store:
                continue
            if self.storing.completes(seen, n_computed):
                tables = self._tables.of(request_id)
                if tables is not None:
                    self.storing.of_tables(orders, seen, tables, n_computed)
        for request_id, offers in self._tables.offers().items():
            seen = self._seen.get(request_id)
            if seen is not None and not seen.stale and seen.wishes.store:
                self.storing.of_states(orders, seen, offers)
        return orders

    def _adopt(self) -> None:
        """A node that has come back is used from this step on. Loads that were promised in the
        memory of before are broken: what lies in their slots now is others' (I3)."""
        if isinstance(self.cache, NodeCache):
            while self._troubles:
                self.failed("node", self._troubles.popleft())
            self.cache.adopt()
        for request_id in list(self._new_loads):
            seen = self._seen.get(request_id)
            if seen is None or seen.grant is None or seen.grant.epoch == self.cache.epoch:
                continue
            self._break(request_id, [block for ids in seen.load_blocks for block in ids])

    def bare_orders(self, output: SchedulerOutput) -> Orders:
        """Orders that copy nothing, but say which loads are broken and which requests are over.

        Until `sent_out` they can be made again without loss.
        """
        self._sequence += 1
        self._tables.take(output)
        return Orders(
            sequence=self._sequence,
            arena=str(self.arena.path) if self.config.node is None else "",
            node=self.cache.attachment if isinstance(self.cache, NodeCache) else None,
            scheduled_tokens=output.total_num_scheduled_tokens,
            finished=list(self._to_finish),
            broken=list(self._broken.items()),
            # A lost step may have taken all the room there is: then no store would follow it.
            confirm=bool(self.storing.outstanding),
            prove=self.proofs.wanted,
            awaited=self.device.awaited(),
        )

    def wait_for_disk(self, output: SchedulerOutput) -> None:
        """In a step without a forward there is nothing else to do than to wait for the disk: the
        engine would ask again at once."""
        self._take_scrubbed()
        idle = not output.total_num_scheduled_tokens and self.cache.waits_for_disk
        self.cache.settle(IDLE_WAIT_S if idle else 0.0)

    def _take_scrubbed(self) -> None:
        """Quarantines what the scrub found, before anything more is promised (I5)."""
        if self.scrub is None:
            return
        for slot, generation, key in self.scrub.take():
            n = self.cache.quarantine(slot, generation, key=key, reason="scrub")
            self.totals.quarantined += n
        if self.scrub.error is not None:
            error, self.scrub.error = self.scrub.error, None
            self.failed("scrub", error)

    def sent_out(self) -> list[str]:
        """The engine has the orders: nothing of them is said twice.

        The answer are the finished requests that went with them, which can be forgotten.
        """
        self.device.sent_out()
        finished, self._to_finish = self._to_finish, []
        self._broken, self._new_loads = {}, []
        return finished

    def forget(self, request_ids: Iterable[str]) -> None:
        """Lets go of all that is kept for requests that are over."""
        for request_id in request_ids:
            if request_id in self._to_finish:
                self._to_finish.remove(request_id)
            self._seen.pop(request_id, None)
            self.flights.forget(request_id)
            self.shadows.release(request_id)
            self.cache.release(request_id)

    def break_new_loads(self) -> None:
        """Loads that never went out are broken instead (after a failure in `orders`)."""
        self.device.break_new()
        for request_id in list(self._new_loads):
            seen = self._seen.get(request_id)
            if seen is not None:
                self._break(request_id, [block for ids in seen.load_blocks for block in ids])

    def _load(self, request_id: str, seen: Seen, grant: Grant) -> Load:
        for index, shape in enumerate(self.geometry.shapes):
            seen.stored[index] = grant.stop // shape.block_tokens
        pairs = zip(grant.parts, seen.load_blocks, strict=True)
        return Load(request_id, [self._load_part(seen, part, ids) for part, ids in pairs])

    def _load_part(self, seen: Seen, part: Part, block_ids: list[int]) -> LoadPart:
        n_blocks = len(block_ids)
        keys = seen.keys.of(part.group)[part.first : part.first + n_blocks]
        return LoadPart(
            group=part.group,
            block_ids=np.asarray(block_ids, np.int32),
            slots=part.slots[:n_blocks],
            generations=part.generations[:n_blocks],
            keys=b"".join(keys),
            verify=self.pick_verified(n_blocks) | self._foreign(part, n_blocks),
        )

    def _foreign(self, part: Part, n_blocks: int) -> Any:
        """Which blocks another engine wrote: those are verified, whatever the share (I5)."""
        if not isinstance(self.cache, NodeCache):
            return np.uint8(0)
        return self.cache.foreign(part.slots[:n_blocks], part.generations[:n_blocks]).view(np.uint8)

    def pick_verified(self, n_blocks: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Which blocks are checked against their checksum: an exact share, evenly spread; all, once
        the scrub has seen this memory fail. What it found may have been promised before."""
        if self.scrub is not None and self.scrub.faults:
            return np.ones(n_blocks, np.uint8)
        share = round(self.config.verify_share * VERIFY_PERIOD)
        credit = self._verify_credit + share * np.arange(1, n_blocks + 1)
        self._verify_credit = int(credit[-1]) % VERIFY_PERIOD if n_blocks else self._verify_credit
        return (credit // VERIFY_PERIOD > (credit - share) // VERIFY_PERIOD).astype(np.uint8)

    # -- a step comes back -------------------------------------------------------------------

    def acknowledged(self, acks: Acks | None) -> None:
        """Publishes what was written and quarantines what failed."""
        for where, error in acks.failures if acks is not None else ():
            self.failed(where, error)
            if where == MAP_FAILED:
                self._worker_maps = False
        error = self.proofs.told(acks.proofs) if acks is not None else None
        if error is not None:
            self.failed("proof", f"loads are off: {error}")
        for compared in acks.compared if acks is not None else ():
            self.totals.shadowed += compared.blocks
            self.totals.quarantined += self.shadows.told(compared)
            if compared.bad:
                self.device.reset()
                if not self.live.empty_device():
                    self._was_reset = True  # nothing is stored on top of what it still has
                self.failed("shadow", f"{len(compared.bad)} blocks differ by {compared.worst:.3g}")
        # First: blocks of a step that loaded other weights than it was keyed for are not published.
        if acks is not None and acks.adapters:
            told = acks.adapters
            self.live.safely("adapters_told", lambda: self.live.adapters_told(told))
        for done in acks.stores if acks is not None else ():
            if any((status == 0).any() for status in done.statuses):
                self._worker_maps = True
            self.storing.acknowledged(done)
        for loaded in acks.loads if acks is not None else ():
            self._loaded(loaded)

    def refused(self, request_ids: Iterable[str]) -> None:
        """Loads that count as failed as a whole, whatever was said of their blocks. The engine asks
        again for such a request: it must not be promised the same load for ever."""
        for request_id in request_ids:
            seen = self._seen.get(request_id)
            if seen is not None and not seen.load_failed:
                seen.fail_load()

    def received(self, request_ids: Iterable[str]) -> None:
        """Loads that are over, well or not."""
        for request_id in request_ids:
            self.flights.end(request_id)
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

    def _loaded(self, done: LoadDone) -> None:
        seen = self._seen.get(done.request_id)
        now = seen is not None and seen.grant is not None and seen.grant.epoch == self.cache.epoch
        for slot, generation, key, status in done.bad:
            if status in QUARANTINED:
                if seen is not None:
                    seen.bad_load = True
                if not now and isinstance(self.cache, NodeCache):
                    continue  # of a memory that is no more
                self.totals.quarantined += self.cache.quarantine(
                    slot, generation, key=key, reason=QUARANTINED[status]
                )
        n = done.blocks - len(done.bad)
        self.totals.bytes_loaded += done.bytes
        if done.rank == 0:  # every rank loads its share of every block
            self.totals.blocks_loaded += n
            self.totals.load_s += done.seconds
        self.bus.emit(
            events.Loaded(
                request_id=done.request_id, blocks=n, bytes=done.bytes, seconds=done.seconds
            )
        )
        if seen is not None:
            seen.receipt.load_ms = max(seen.receipt.load_ms, done.seconds * 1e3)
            if done.bad:
                seen.fail_load(self._good_tokens(seen.grant, done))

    def _good_tokens(self, grant: Grant | None, done: LoadDone) -> int:
        """What the engine keeps of a load: with one group all before the first block that
        failed."""
        if grant is None or len(grant.parts) != 1 or len(self.geometry.groups) != 1:
            return 0
        bad = {row[0] for row in done.bad}
        slots = grant.parts[0].slots.tolist()
        first = next((i for i, slot in enumerate(slots) if slot in bad), 0)
        return first * self.geometry.block_tokens

    # -- a request ends ----------------------------------------------------------------------

    def finished(
        self, request: Request, tables: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any]]:
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
        self.page.finished(request.request_id, receipt["tokens"])
        self.telemetry.answered(seen)
        runs = self.misses.finished(seen)
        if runs is not None:
            receipt["misses"] = runs
        hinted = self.hinting.finished(seen)
        if hinted is not None:
            receipt["hints"] = hinted
        aborted = str(request.get_finished_reason()) in ("abort", "error")
        may = not (aborted or seen.loading or seen.stale) and seen.wishes.store
        keep = may and self.storing.has_more(seen, tables)
        if keep:
            self._to_finish.append(request.request_id)
        elif not seen.loading:
            self.forget((request.request_id,))
        return keep, {"kvmem": receipt}

    # -- the whole ---------------------------------------------------------------------------

    def reset(self) -> bool:
        """Nothing answers any more, and requests under way store nothing of what they have.

        Slots that the worker may still be writing stay reserved until it reports them (I3).
        """
        self.cache.drop("reset")
        self.device.reset()
        if isinstance(self.cache, NodeCache):
            # Others go on storing under the engine's own keys: what they computed was not reset.
            self.live.apart()
        self.shadows.clear()
        for seen in self._seen.values():
            seen.stale = True
        # The engine resets its own cache first, which fails while a block is in use. Blocks that
        # it kept, and those that requests go on to fill, are older than this reset.
        pool = self._device_pool  # None where the engine gives none
        self._was_reset = pool is None or bool(
            len(pool.cached_block_hash_to_block)
            or pool.get_num_free_blocks() + 1 < pool.num_gpu_blocks  # one is never free
        )
        self.page.touch()
        return True

    def failed(self, where: str, error: str) -> None:
        """Counts a failure inside kvmem; the request went on without it (I9)."""
        self.page.failed(where, error)
        self.bus.emit(events.Failure(where=where, error=error))

    def write_stats(self) -> None:
        """Puts the counters where `kvmem stats` reads them, at most four times a second."""
        scrubbed = self.scrub.stats() if self.scrub is not None else None
        self.page.write(self.cache.stats(), scrubbed, self.cache.quarantined(), self.misses.page)

    def take_stats(self) -> Any:
        """What changed of the figures since this was asked last, for vLLM's own metrics."""
        return self.telemetry.stats()

    def close(self) -> None:
        """Unmaps the arena and removes its file."""
        try:
            self.live.close()
            self.telemetry.close()
            self.write_stats()
            self.misses.close()
        finally:
            if self.scrub is not None:
                self.scrub.close()
            if isinstance(self.cache, NodeCache):
                self.cache.close()
            if self.disk is not None:
                self.disk.close()
            if self.far is not None:
                self.far.close()
            self.arena.close(unlink=True)
