"""The worker's half: copies between its rank's device blocks and shares of the arena's slots.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvmem.config import Config
from kvmem.engines.copiers import Copier, Regions, copier_for
from kvmem.engines.proving import N_SLOTS, prove
from kvmem.engines.vllm import support
from kvmem.engines.vllm.adapters import Loads
from kvmem.engines.vllm.geometry import geometry_of
from kvmem.engines.vllm.proof import ProofDone
from kvmem.engines.vllm.shadow import AT_A_TIME, Comparer
from kvmem.engines.vllm.wire import (
    MAP_FAILED,
    Acks,
    Bad,
    Load,
    LoadDone,
    LoadPart,
    Orders,
    StoreDone,
)
from kvmem.errors import EngineError, KVMemError, UnsupportedEngine
from kvmem.node.attaching import Attachment, hello_of
from kvmem.node.link import Link
from kvmem.store.arena import Arena
from kvmem.store.scratch import Scratch

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["WorkerHalf"]

_NO_STATUS, _NO_WORDS = np.zeros(0, np.uint8), np.zeros(0, np.uint64)
NOT_COPIED = 255  # status of a block that the copier was never asked for
IDLE_WAIT_S = 0.02


class WorkerHalf:
    """See the module. One thread calls it, the worker's; loads run on one more."""

    def __init__(
        self, config: Config, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> None:
        support.check_engine(vllm_config)
        self.config = config
        self.geometry = geometry_of(vllm_config, kv_cache_config)
        self.rank = _rank_of(vllm_config)
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._items: list[torch.dtype] = []
        self._comparer: Comparer | None = None
        self._proof = "no device blocks were registered"
        self._devices: list[Regions] = []
        self._tensors: list[torch.Tensor | Sequence[torch.Tensor]] = []
        self._arena: Arena | None = None
        self._link: Link | None = None
        self._mapped: Attachment | str = ""  # what `_arena` was mapped by, or was to be
        # One for each direction: a load that is under way must not take a store's threads, since
        # the engine's step waits for stores.
        self._loader: Copier | None = None
        self._storer: Copier | None = None
        self._asked = 0
        self._ask_again = 1
        self._begun = 0
        self._loads: dict[Future[LoadDone], Load] = {}
        # Of loads that have not begun, by request: the copier of their step's memory, whatever is
        # mapped when their turn comes.
        self._bound: dict[str, Copier] = {}
        self._received: set[str] = set()
        self._early: dict[str, LoadDone] = {}  # that are over, until the other half has heard it
        self._sent: set[str] = set()
        # What the engine must compute after all: blocks where it has one group of them, whole
        # requests where the blocks' numbers mean nothing without their group.
        self._failed: set[str] = set()
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

    def register(self, kv_caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]]) -> None:
        """Notes where each layer's blocks lie; the tensors stay the engine's.

        A layer has one tensor, or, with states, several.

        Raises:
            UnsupportedEngine: blocks of a layer are not whole ranges of memory.
        """
        devices = []
        tensors_of: list[list[torch.Tensor]] = []
        for group in self.geometry.groups:
            device = Regions()
            tensors_of.append([])
            for name, n_bytes in zip(group.layers, group.pages, strict=True):
                tensors = kv_caches[name]
                found = _pieces(name, tensors, n_bytes, self.geometry.n_device_blocks)
                for base, stride, piece in found:
                    device.add(base, stride, piece)
                self._tensors.append(tensors)
                tensors_of[-1] += tensors if isinstance(tensors, Sequence) else [tensors]
            devices.append(device)
        self._devices = devices
        self._items = [tensors[0].dtype for tensors in tensors_of]
        self._on = tensors_of[0][0].device
        self._proof = self._prove(tensors_of)

    def _prove(self, tensors_of: list[list[torch.Tensor]]) -> str:
        """Whether blocks come back as they were; empty, or what went wrong."""
        try:
            slot_bytes = self.geometry.slot_bytes
            scratch = Scratch(N_SLOTS, slot_bytes, self._ranks, bytes(32))
            return prove(tensors_of, self.geometry.n_device_blocks, self._copier(scratch.buffer))
        except Exception as error:  # noqa: BLE001 the engine starts, without loads (I9)
            return f"{type(error).__name__}: {error}"

    # -- loads -------------------------------------------------------------------------------

    def begin(self, orders: Orders) -> None:
        """Starts the step's loads, once, however often it is asked."""
        if orders.sequence <= self._begun:
            return
        self._begun = orders.sequence
        self._refuse(orders.broken)
        self._tell_again(orders)
        if orders.prove:
            self._acks.proofs = [ProofDone(self.rank, self._proof)]
        if orders.loads and not self._map(orders):
            self.fail_loads(orders)
            return
        for load in orders.loads:
            if self._loader is not None:
                self._bound[load.request_id] = self._loader
            self._loads[self._pool.submit(self._load, load)] = load

    def fail_loads(self, orders: Orders) -> None:
        """Loads of the step that were not begun are not made: the engine computes those blocks."""
        self._begun = orders.sequence
        self._refuse(orders.broken)
        begun = {load.request_id for load in self._loads.values()} | self._received
        for load in orders.loads:
            if load.request_id not in begun | self._early.keys():  # a load is answered once
                self._give_up(load)

    def _give_up(self, load: Load) -> None:
        """A load that nothing came of; the engine hears of those that it knows of."""
        if load.early:
            self._early[load.request_id] = self._nothing_of(load)
            return
        self._refuse([(load.request_id, load.block_ids)])
        self._acks.loads.append(self._nothing_of(load))

    def _tell_again(self, orders: Orders) -> None:
        """Of early loads the end is told until it was heard: else their blocks would be kept."""
        known = self._early.keys() | {
            load.request_id for load in (*self._loads.values(), *orders.loads)
        }
        self._early = {name: self._early[name] for name in orders.awaited if name in self._early}
        for name in orders.awaited:
            if name not in known:  # its order did not come here
                self._early[name] = LoadDone(name, self.rank, 0, 0, 0.0)

    def _refuse(self, loads: Iterable[tuple[str, list[int]]]) -> None:
        for request_id, block_ids in loads:
            self._received.add(request_id)
            self._spoil(request_id, block_ids)

    def _spoil(self, request_id: str, block_ids: list[int]) -> None:
        """The engine must compute these blocks."""
        if len(self.geometry.groups) == 1:
            self.bad_blocks.update(block_ids)
        else:
            self._failed.add(request_id)

    def _load(self, load: Load) -> LoadDone:
        copier = self._bound.pop(load.request_id, self._loader)
        if copier is None:
            raise EngineError("kvmem: a load began without an arena")
        begin = time.perf_counter()
        n_bytes, bad = 0, []
        for part in load.parts:
            status = copier.load(
                part.block_ids, part.slots, part.generations, part.keys, part.verify, part.group
            )
            n_bytes += int((status == 0).sum()) * self._devices[part.group].block_bytes
            bad += _bad(part, status)
        if self.config.throttle_gb_s:
            owed = n_bytes / (self.config.throttle_gb_s * 1e9) - (time.perf_counter() - begin)
            self._closing.wait(max(0.0, owed))
        seconds = time.perf_counter() - begin
        return LoadDone(load.request_id, self.rank, len(load.block_ids), n_bytes, seconds, bad)

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
                done = self._nothing_of(load)
            if load.early:
                self._early[load.request_id] = done
            else:
                if done.bad:
                    self._spoil(load.request_id, _bad_blocks(load, done.bad))
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
            self._give_up(load)
        self._loads.clear()
        return set(self._sent), set(self._received)

    def told_results(self) -> None:
        """The engine has the results."""
        self._sent.clear()
        self._received.clear()
        self._failed.clear()

    def failed_requests(self) -> set[str]:
        """Requests among the received whose load failed, where the engine has several groups."""
        return set(self._failed)

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
        copier = self._storer if self._map(orders) else None
        if copier is None:
            self.fail_stores(orders)
            return
        begin = time.perf_counter()
        statuses: list[np.ndarray] = [_NO_STATUS] * len(orders.stores)
        checksums: list[np.ndarray] = [_NO_WORDS] * len(orders.stores)
        for group in sorted({s.group for s in orders.stores}):
            # One call for a group: the copier's threads share all of its blocks.
            at = [i for i, s in enumerate(orders.stores) if s.group == group]
            stores = [orders.stores[i] for i in at]
            status, sums = copier.store(
                np.concatenate([s.block_ids for s in stores]),
                np.concatenate([s.slots for s in stores]),
                np.concatenate([s.generations for s in stores]),
                b"".join(s.keys for s in stores),
                group,
            )
            cuts = np.cumsum([len(s.slots) for s in stores])[:-1]
            for i, one, its in zip(at, np.split(status, cuts), np.split(sums, cuts), strict=True):
                statuses[i], checksums[i] = one, its
        seconds = time.perf_counter() - begin
        self._acks.stores.append(StoreDone(orders.sequence, statuses, checksums, seconds))

    def compare(self, orders: Orders) -> None:
        """Compares blocks that this step computed with what is stored of them."""
        if not orders.compares or not self._map(orders):
            return
        arena = self._arena
        if arena is None:
            return
        if self._comparer is None:
            scratch = Scratch(AT_A_TIME, self.geometry.slot_bytes, self._ranks, bytes(32))
            pieces = [device.pieces for device in self._devices]
            copier = self._copier(scratch.buffer)
            self._comparer = Comparer(scratch, copier, self.rank, pieces, self._items)
        for order in orders.compares:
            self._acks.compared.append(self._comparer.compare(arena, order))

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
        acks.loads += self._early.values()
        told = (acks.stores, acks.loads, acks.failures, acks.adapters, acks.proofs, acks.compared)
        if not any(told):
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
        self._loader = self._storer = self._comparer = None
        self._bound.clear()
        self._tensors.clear()
        self._unmap()

    def _unmap(self) -> None:
        """Lets go of the arena. A node is told so, where nothing of this process can write there
        any more (I3): a load under way has its copier, and with that the memory."""
        arena, self._arena = self._arena, None
        link, self._link = self._link, None
        self._loader = self._storer = None
        if link is not None:
            link.close()
        elif arena is not None:
            arena.close(unlink=False)

    def _lost(self) -> None:
        """The node has gone: nothing keeps its memory, so that the next one has room. Its link's
        own thread says so; a copy under way keeps it to its end."""
        self._arena = self._loader = self._storer = None

    def _map(self, orders: Orders) -> bool:
        """Whether the arena that the orders are for is mapped; after a failure it is tried again
        ever more rarely."""
        wanted = orders.node if orders.node is not None else orders.arena
        if wanted != self._mapped:
            self._unmap()
            self._mapped, self._asked, self._ask_again = wanted, 0, 1
        if self._arena is not None:
            return True
        self._asked += 1
        if self._asked < self._ask_again:
            return False
        self._unmap()
        try:
            if orders.node is not None:
                self._link = self._attach(orders.node)
                arena = self._link.arena
            else:
                arena = Arena.open(Path(orders.arena))
            with _all_cores():  # the copiers' threads are born here and keep this
                buffer = np.frombuffer(arena.buffer, np.uint8)
                self._loader, self._storer = self._copier(buffer), self._copier(buffer)
        except (KVMemError, OSError, ValueError) as error:
            self._ask_again = 2 * self._asked
            self._loader = self._storer = None
            self.failed(MAP_FAILED, f"{type(error).__name__}: {error}")
            return False
        self._arena = arena
        return True

    def _attach(self, node: Attachment) -> Link:
        hello = hello_of(
            namespace=node.namespace,
            slot_bytes=self.geometry.slot_bytes,
            ranks=self._ranks,
            groups=self.geometry.shapes,
            label="",
        )
        hello = msgspec.structs.replace(hello, role="worker", token=node.token)
        return Link(Path(node.folder), hello, self._lost)

    def _copier(self, buffer: np.ndarray) -> Copier:
        return copier_for(
            self._on,
            buffer,
            self._devices,
            self.geometry.n_device_blocks,
            threads=self.config.copy_threads or min(4, len(os.sched_getaffinity(0))),
            rank=self.rank,
        )

    def _nothing_of(self, load: Load) -> LoadDone:
        bad = [row for part in load.parts for row in _bad(part)]
        return LoadDone(load.request_id, self.rank, len(load.block_ids), 0, 0.0, bad)

    def _fail(self, where: str, error: BaseException) -> None:
        self.failed(f"worker.{where}", f"{type(error).__name__}: {error}")


def _bad(part: LoadPart, status: np.ndarray | None = None) -> list[Bad]:
    """Those of a part's blocks that failed; all without `status`."""
    codes = status.tolist() if status is not None else [NOT_COPIED] * len(part.slots)
    keys = [part.keys[i : i + 32] for i in range(0, len(part.keys), 32)]
    rows = zip(part.slots.tolist(), part.generations.tolist(), keys, codes, strict=True)
    return [row for row in rows if row[3] != 0]


def _bad_blocks(load: Load, bad: list[Bad]) -> list[int]:
    slots = {row[0] for row in bad}
    return [
        block
        for part in load.parts
        for block, slot in zip(part.block_ids.tolist(), part.slots.tolist(), strict=True)
        if slot in slots
    ]


def _rank_of(vllm_config: VllmConfig) -> int:
    """Which share of every block is this worker's."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return 0
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _pieces(
    name: str,
    tensors: torch.Tensor | Sequence[torch.Tensor],
    n_bytes: int,
    n_device_blocks: int,
) -> list[tuple[int, int, int]]:
    """Address of block 0, bytes from block to block and bytes of a block, of each tensor of a
    layer; they make `n_bytes` a block.

    A tensor is [n_blocks * k, ...] where a block of the manager is k blocks of the kernel; its
    bytes must be one dense range, since they are moved as they are, in the kernel's own packing.

    Raises:
        UnsupportedEngine: they are not.
    """
    parts: Sequence[torch.Tensor] = tensors if isinstance(tensors, Sequence) else (tensors,)
    for tensor in parts:
        if tensor.device.type != "cpu":
            raise UnsupportedEngine(
                f"kvmem's vLLM connector does not serve KV on {tensor.device} yet",
                next_step="Use vLLM's CPU build, or start without kvmem's --kv-transfer-config.",
            )
    found = [piece for tensor in parts if (piece := _piece(tensor, n_device_blocks)) is not None]
    if len(found) < len(parts) or sum(piece for _, _, piece in found) != n_bytes:
        shapes = ", ".join(f"shape {tuple(t.shape)}, strides {t.stride()}" for t in parts)
        raise UnsupportedEngine(
            f"kvmem's vLLM connector does not serve the KV layout of {name}: {shapes}, "
            f"{n_device_blocks} blocks of {n_bytes} bytes",
            next_step="Start without kvmem's --kv-transfer-config.",
        )
    return found


def _piece(tensor: torch.Tensor, n_device_blocks: int) -> tuple[int, int, int] | None:
    item = tensor.element_size()
    per_block, rest = divmod(tensor.shape[0], n_device_blocks)
    inner_dense = 1 + sum(
        (n - 1) * s for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )
    inner_bytes = item * tensor[0].numel()
    stride = tensor.stride(0) * item
    whole = per_block >= 1 and rest == 0 and inner_dense * item == inner_bytes
    if not whole or (per_block > 1 and stride != inner_bytes):
        return None
    return tensor.data_ptr(), stride * per_block, inner_bytes * per_block


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
