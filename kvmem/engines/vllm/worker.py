"""The worker's half: copies between the engine's device blocks and the arena, nothing else.

Loads run on one thread of its own, from before a step's forward on; stores run after the forward,
in the worker's thread, so that a block is complete when it is read and unchanged until it is
copied. It maps the arena that the orders name; while it can't, every load fails into a recompute
and every store is given back (I9).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvmem._core import SlotCopier
from kvmem.config import Config
from kvmem.engines.vllm import support
from kvmem.engines.vllm.adapters import Loads
from kvmem.engines.vllm.wire import MAP_FAILED, Acks, Load, LoadDone, Orders, StoreDone
from kvmem.errors import EngineError, KVMemError, UnsupportedEngine
from kvmem.store.arena import Arena

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["WorkerHalf"]

NOT_COPIED = 255  # status of a block that the copier was never asked for
IDLE_WAIT_S = 0.02


@dataclass(slots=True)
class _Device:
    """Where the engine keeps each layer: base address, bytes between blocks, bytes of a block."""

    bases: list[int] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)


class WorkerHalf:
    """See the module. One thread calls it, the worker's; loads run on one more."""

    def __init__(
        self, config: Config, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> None:
        support.check_engine(vllm_config)
        self.config = config
        self.geometry = support.geometry_of(vllm_config, kv_cache_config)
        self._device = _Device()
        self._tensors: list[torch.Tensor] = []
        self._arena: Arena | None = None
        # One for each direction: a load that is under way must not take a store's threads, since
        # the engine's step waits for stores.
        self._loader: SlotCopier | None = None
        self._storer: SlotCopier | None = None
        self._asked = 0
        self._ask_again = 1
        self._begun = 0
        self._loads: dict[Future[LoadDone], Load] = {}
        self._received: set[str] = set()
        self._sent: set[str] = set()
        self.bad_blocks: set[int] = set()
        self._acks = Acks()
        self._adapters = Loads(vllm_config) if vllm_config.lora_config is not None else None
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="kvmem-load", initializer=_use_all_cores
        )
        # Its thread starts now or the engine does not: started by a submit that then fails, it
        # would run the load after the engine was told that there is none.
        self._pool.submit(int).result()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Notes where each layer's blocks lie; the tensors stay the engine's.

        Raises:
            UnsupportedEngine: blocks of a layer are not whole ranges of memory.
        """
        device = _Device()
        for name in self.geometry.layers:
            tensor = kv_caches[name]
            base, stride = _block_range(name, tensor, self.geometry)
            device.bases.append(base)
            device.strides.append(stride)
            device.pieces.append(self.geometry.layer_bytes)
            self._tensors.append(tensor)
        self._device = device

    # -- loads -------------------------------------------------------------------------------

    def begin(self, orders: Orders) -> None:
        """Starts the step's loads, once, however often it is asked."""
        if orders.sequence <= self._begun:
            return
        self._begun = orders.sequence
        self._refuse(orders.broken)
        if orders.loads and not self._map(orders.arena):
            self.fail_loads(orders)
            return
        for load in orders.loads:
            self._loads[self._pool.submit(self._load, load)] = load

    def fail_loads(self, orders: Orders) -> None:
        """Loads of the step that were not begun are not made: the engine computes those blocks."""
        self._begun = orders.sequence
        self._refuse(orders.broken)
        begun = {load.request_id for load in self._loads.values()} | self._received
        for load in orders.loads:
            if load.request_id not in begun:  # a load is answered once
                self._refuse([(load.request_id, load.block_ids.tolist())])
                self._acks.loads.append(_nothing_of(load))

    def _refuse(self, loads: list[tuple[str, list[int]]]) -> None:
        for request_id, block_ids in loads:
            self._received.add(request_id)
            self.bad_blocks.update(block_ids)

    def _load(self, load: Load) -> LoadDone:
        copier = self._loader
        if copier is None:
            raise EngineError("kvmem: a load began without an arena")
        begin = time.perf_counter()
        status = copier.load(load.block_ids, load.slots, load.generations, load.keys, load.verify)
        n_bytes = int((status == 0).sum()) * self.geometry.block_bytes
        if self.config.throttle_gb_s:
            owed = n_bytes / (self.config.throttle_gb_s * 1e9) - (time.perf_counter() - begin)
            self._closing.wait(max(0.0, owed))
        seconds = time.perf_counter() - begin
        return LoadDone(load.request_id, len(status), n_bytes, seconds, _bad(load, status))

    def results(self, orders: Orders | None) -> tuple[set[str], set[str]]:
        """Requests whose kept blocks are copied, and requests whose load is over, well or not.

        In a step without a forward there is nothing else to do than to wait for a load, and the
        engine would ask again at once.
        """
        if self._loads and orders is not None and not orders.scheduled_tokens:
            wait(self._loads, timeout=IDLE_WAIT_S, return_when="FIRST_COMPLETED")
        for future in [f for f in self._loads if f.done()]:
            load = self._loads[future]
            error = future.exception()
            if error is None:
                done = future.result()
            else:
                self._fail("load", error)
                done = _nothing_of(load)
            bad = {key for _, _, key, _ in done.bad}
            if bad:
                self.bad_blocks.update(
                    block
                    for block, key in zip(load.block_ids.tolist(), _keys(load), strict=True)
                    if key in bad
                )
            self._acks.loads.append(done)
            self._received.add(load.request_id)
            del self._loads[future]
        return set(self._sent), set(self._received)

    def surrender(self) -> tuple[set[str], set[str]]:
        """Every load under way ends as failed (after a failure in `results`).

        It waits for the copies to end, since they write into blocks that the engine takes back.
        """
        wait(self._loads)
        for load in self._loads.values():
            self._refuse([(load.request_id, load.block_ids.tolist())])
            self._acks.loads.append(_nothing_of(load))
        self._loads.clear()
        return set(self._sent), set(self._received)

    def told_results(self) -> None:
        """The engine has the results."""
        self._sent.clear()
        self._received.clear()

    def failed_blocks(self) -> set[int]:
        """Device blocks that a load did not fill, until `told_failed_blocks`."""
        return set(self.bad_blocks)

    def told_failed_blocks(self) -> None:
        """The engine has the failed blocks."""
        self.bad_blocks.clear()

    # -- stores ------------------------------------------------------------------------------

    def store(self, orders: Orders) -> None:
        """Copies the blocks that this step completed, and lets go of finished requests."""
        self._sent.update(orders.finished)
        if not orders.stores:
            if orders.confirm:
                self._acks.stores.append(StoreDone(orders.sequence, [], [], 0.0))
            return
        copier = self._storer if self._map(orders.arena) else None
        if copier is None:
            self.fail_stores(orders)
            return
        begin = time.perf_counter()
        status, checksums = copier.store(
            np.concatenate([s.block_ids for s in orders.stores]),
            np.concatenate([s.slots for s in orders.stores]),
            np.concatenate([s.generations for s in orders.stores]),
            b"".join(s.keys for s in orders.stores),
        )
        cuts = np.cumsum([len(s.slots) for s in orders.stores])[:-1]
        self._acks.stores.append(
            StoreDone(
                orders.sequence,
                np.split(status, cuts),
                np.split(checksums, cuts),
                time.perf_counter() - begin,
            )
        )

    def fail_stores(self, orders: Orders) -> None:
        """The step's stores are not made: their slots go back, and the engine its blocks."""
        self._sent.update(orders.finished)
        if not orders.stores or any(s.sequence == orders.sequence for s in self._acks.stores):
            return
        self._acks.stores.append(
            StoreDone(
                orders.sequence,
                [np.full(len(s.slots), NOT_COPIED, np.uint8) for s in orders.stores],
                [np.zeros(len(s.slots), np.uint64) for s in orders.stores],
                0.0,
            )
        )

    # -- the whole ---------------------------------------------------------------------------

    def acks(self) -> Acks | None:
        """What was done since last asked, or None."""
        acks = self._acks
        held = self._adapters.news() if self._adapters is not None else None
        if held is not None:
            acks.adapters.append(held)
        if not (acks.stores or acks.loads or acks.failures or acks.adapters):
            return None
        self._acks = Acks()
        return acks

    def failed(self, where: str, error: str) -> None:
        """Tells the scheduler's half of a failure here."""
        self._acks.failures.append((where, error))

    def close(self) -> None:
        """Waits for the load under way and unmaps the arena."""
        if self._adapters is not None:
            self._adapters.close()
        self._closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._loader = self._storer = None
        self._tensors.clear()
        if self._arena is not None:
            self._arena.close(unlink=False)
            self._arena = None

    def _map(self, path: str) -> bool:
        """Whether the arena is mapped; after a failure it is tried again ever more rarely."""
        if self._arena is not None:
            return True
        self._asked += 1
        if self._asked < self._ask_again:
            return False
        try:
            arena = Arena.open(Path(path))
            with _all_cores():  # the copiers' threads are born here and keep this
                self._loader, self._storer = self._copier(arena), self._copier(arena)
        except (KVMemError, OSError, ValueError) as error:
            self._ask_again = 2 * self._asked
            self._loader = self._storer = None
            self.failed(MAP_FAILED, f"{type(error).__name__}: {error}")
            return False
        self._arena = arena
        return True

    def _copier(self, arena: Arena) -> SlotCopier:
        threads = self.config.copy_threads or min(4, len(os.sched_getaffinity(0)))
        copier = SlotCopier(np.frombuffer(arena.buffer, np.uint8), threads)
        copier.register_layers(
            np.asarray(self._device.bases, np.uint64),
            np.asarray(self._device.strides, np.uint64),
            np.asarray(self._device.pieces, np.uint64),
            self.geometry.n_device_blocks,
        )
        return copier

    def _fail(self, where: str, error: BaseException) -> None:
        self.failed(f"worker.{where}", f"{type(error).__name__}: {error}")


def _keys(load: Load) -> list[bytes]:
    return [load.keys[i : i + 32] for i in range(0, len(load.keys), 32)]


def _nothing_of(load: Load) -> LoadDone:
    return LoadDone(load.request_id, len(load.block_ids), 0, 0.0, _bad(load))


def _bad(load: Load, status: np.ndarray | None = None) -> list[tuple[int, int, bytes, int]]:
    """(slot, generation, key, status) of the blocks of a load that failed; all without `status`."""
    codes = status.tolist() if status is not None else [NOT_COPIED] * len(load.slots)
    rows = zip(load.slots.tolist(), load.generations.tolist(), _keys(load), codes, strict=True)
    return [row for row in rows if row[3] != 0]


def _block_range(name: str, tensor: torch.Tensor, geometry: support.Geometry) -> tuple[int, int]:
    """Address of the layer's block 0 and the bytes from block to block.

    The tensor is [n_blocks * k, ...] where a block of the manager is k blocks of the kernel; its
    bytes must be one dense range, since they are moved as they are, in the kernel's own packing.
    """
    if tensor.device.type != "cpu":
        raise UnsupportedEngine(
            f"kvmem's vLLM connector does not serve KV on {tensor.device} yet",
            next_step="Use vLLM's CPU build, or start without kvmem's --kv-transfer-config.",
        )
    item, n_first = tensor.element_size(), tensor.shape[0]
    per_block, rest = divmod(n_first, geometry.n_device_blocks)
    inner_dense = 1 + sum(
        (n - 1) * s for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )
    inner_bytes = item * tensor[0].numel()
    stride = tensor.stride(0) * item
    whole = per_block >= 1 and rest == 0 and inner_dense * item == inner_bytes
    if per_block > 1:
        whole = whole and stride == inner_bytes
    if not whole or inner_bytes * per_block != geometry.layer_bytes:
        raise UnsupportedEngine(
            f"kvmem's vLLM connector does not serve the KV layout of {name}: shape "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}, {geometry.n_device_blocks} blocks "
            f"of {geometry.layer_bytes} bytes",
            next_step="Start without kvmem's --kv-transfer-config.",
        )
    return tensor.data_ptr(), stride * per_block


def _engine_cores() -> set[int]:
    """The cores that any thread of this process may use (the engine pins each of its own)."""
    cores: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # the thread ended while we looked
            cores |= os.sched_getaffinity(int(task.name))
    return cores


def _use_all_cores() -> None:
    os.sched_setaffinity(0, _engine_cores())


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """This thread, and those born in it, may run on all of the engine's cores meanwhile."""
    mine = os.sched_getaffinity(0)
    _use_all_cores()
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
