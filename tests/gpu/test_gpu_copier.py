"""Blocks of a real GPU: what is loaded is what was stored, beside whatever the GPU is doing.

Skipped without a GPU; `benchmarks/gpu.sh` runs them on a machine that has one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xxhash

from kvmem import _core
from kvmem.store.scratch import Scratch

torch = pytest.importorskip("torch")
_cuda: Any = pytest.importorskip("kvmem._cuda")
pytestmark = pytest.mark.skipif(_cuda.n_devices() == 0, reason="no GPU on this machine")

METHODS = ["dma", "direct", "staged"]
OK, IDENTITY, GENERATION, CHECKSUM, RANGE, DEVICE = range(6)
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "uint8"]


class Bench:
    """Layers on the GPU as an engine has them, an arena, and the copier between."""

    def __init__(
        self, tensors: list[Any], n_blocks: int, n_slots: int, method: str = "auto", rank: int = 0
    ) -> None:
        self.tensors, self.n_blocks = tensors, n_blocks
        items = [t.element_size() for t in tensors]
        self.pieces = np.array(
            [t[0].numel() * item for t, item in zip(tensors, items, strict=True)], np.uint64
        )
        self.strides = np.array(
            [t.stride(0) * item for t, item in zip(tensors, items, strict=True)], np.uint64
        )
        self.bases = np.array([t.data_ptr() for t in tensors], np.uint64)
        self.scratch = Scratch(n_slots, int(self.pieces.sum()), rank + 1, bytes(32))
        self.rank = rank
        self.copier = _cuda.GpuCopier(self.scratch.buffer, 0, rank, method)
        self.copier.register_layers(self.bases, self.strides, self.pieces, n_blocks)

    def bytes_of(self, block: int) -> bytes:
        """As torch indexes the block, not by the copier's addresses."""
        rows = [t[block].contiguous().view(torch.uint8).cpu() for t in self.tensors]
        return b"".join(row.numpy().tobytes() for row in rows)

    def everything(self) -> list[Any]:
        return [t.contiguous().view(torch.uint8).cpu() for t in self.tensors]

    def store(self, blocks: Any, slots: Any, generation: int = 1, after: int = 0) -> Any:
        n = len(blocks)
        return self.copier.store(
            np.asarray(blocks, np.int32), np.asarray(slots, np.int32),
            np.full(n, generation, np.uint64), keys(n), 0, after,
        )  # fmt: skip

    def load(self, blocks: Any, slots: Any, generation: int = 1, after: int = 0) -> Any:
        n = len(blocks)
        return self.copier.load(
            np.asarray(blocks, np.int32), np.asarray(slots, np.int32),
            np.full(n, generation, np.uint64), keys(n), np.ones(n, np.uint8), 0, after,
        )  # fmt: skip


def keys(n: int) -> bytes:
    return b"".join(bytes([i % 256]) * 32 for i in range(n))


def noise(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """Random bits of that type, on the GPU."""
    kind = getattr(torch, dtype)
    draw = torch.Generator(device="cuda").manual_seed(seed)
    width = torch.empty(0, dtype=kind).element_size()
    raw = torch.randint(
        0, 256, (*shape[:-1], shape[-1] * width), dtype=torch.uint8, device="cuda", generator=draw
    )
    return raw.view(kind)


def layouts() -> Iterator[tuple[str, int, list[Any]]]:
    """Name, blocks, and tensors of the layouts that vLLM has on GPUs."""
    n = 40
    for dtype in DTYPES:
        yield f"KV packed, {dtype}", n, [noise((n, 2, 16, 8, 128), dtype, i) for i in range(3)]
        apart = [noise((2, n, 16, 2, 64), dtype, i) for i in range(3)]
        yield f"KV apart, {dtype}", n, [half for layer in apart for half in (layer[0], layer[1])]
        whole = noise((n, 5, 2, 16, 2, 64), dtype, 7)
        yield f"a block across layers, {dtype}", n, [whole[:, i] for i in range(5)]
    yield "MLA", n, [noise((n, 64, 576), "bfloat16", i) for i in range(3)]
    yield "MLA in fp8", n, [noise((n, 64, 656), "uint8", i) for i in range(3)]
    yield "odd", n, [noise((n, 7, 13), "bfloat16", i) for i in range(3)]


LAYOUTS = [(name, n) for name, n, _ in (layouts() if _cuda.n_devices() else ())]


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[name for name, _ in LAYOUTS])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_every_layout_comes_back_by_every_method(index: int, method: str) -> None:
    name, n, tensors = list(layouts())[index]
    if name == "odd" and method in ("direct", "staged"):
        with pytest.raises(ValueError, match="whole 1,024 bytes"):
            Bench(tensors, n, 30, method)
        return
    bench = Bench(tensors, n, 30, method)
    draw = np.random.default_rng(index)
    for generation in (1, 2, 3):
        count = int(draw.integers(1, 30))
        sources, targets = draw.permutation(n)[:count], draw.permutation(n)[:count]
        slots = draw.permutation(30)[:count]
        wanted = [bench.bytes_of(block) for block in sources]
        status, checksums = bench.store(sources, slots, generation)
        assert status.tolist() == [OK] * count, bench.copier.error
        assert checksums.tolist() == [xxhash.xxh3_64_intdigest(data) for data in wanted]
        for slot, data in zip(slots, wanted, strict=True):
            assert bench.scratch.share(slot, 0)[: len(data)].tobytes() == data
        before = bench.everything()
        for tensor in bench.tensors:  # poison what is to be written
            tensor.view(torch.uint8)[torch.from_numpy(targets).cuda()] = 0xA5
        assert bench.load(targets, slots, generation).tolist() == [OK] * count
        for target, data in zip(targets, wanted, strict=True):
            assert bench.bytes_of(target) == data
        beside = np.setdiff1d(np.arange(n), targets)
        for then, now in zip(before, bench.everything(), strict=True):
            assert torch.equal(then[beside], now[beside])


@pytest.mark.parametrize("method", METHODS)
def test_a_store_waits_for_the_step_that_writes_the_blocks(method: str) -> None:
    tensors = [torch.zeros(64, 1 << 16, dtype=torch.uint8, device="cuda") for _ in range(4)]
    bench = Bench(tensors, 64, 64, method)
    engine = torch.cuda.Stream()
    big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    blocks = np.arange(64)
    for round_ in range(1, 6):
        with torch.cuda.stream(engine):
            torch.cuda._sleep(50_000_000)  # cycles: the step is under way for 25 ms and more
            _ = big @ big
            for tensor in tensors:
                tensor.fill_(round_)
        status, _ = bench.store(blocks, blocks, round_, engine.cuda_stream)
        assert not status.any()
        for slot in blocks:
            assert (bench.scratch.share(slot, 0) == round_).all()
    # The detector: told to wait for another stream, it stores what was there before.
    idle = torch.cuda.Stream()
    with torch.cuda.stream(engine):
        torch.cuda._sleep(200_000_000)
        for tensor in tensors:
            tensor.fill_(99)
    status, _ = bench.store(blocks, blocks, 10, idle.cuda_stream)
    assert not status.any()
    assert (bench.scratch.share(0, 0) == 5).all()
    engine.synchronize()


@pytest.mark.parametrize("method", METHODS)
def test_a_load_waits_for_the_step_that_reads_the_blocks(method: str) -> None:
    tensors = [torch.full((64, 1 << 16), 7, dtype=torch.uint8, device="cuda") for _ in range(4)]
    bench = Bench(tensors, 64, 64, method)
    blocks = np.arange(64)
    assert not bench.store(blocks, blocks)[0].any()
    for tensor in tensors:
        tensor.fill_(3)
    engine = torch.cuda.Stream()
    engine.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(engine):
        torch.cuda._sleep(50_000_000)
        read = [tensor.clone() for tensor in tensors]
    assert not bench.load(blocks, blocks, 1, engine.cuda_stream).any()
    engine.synchronize()
    assert all(bool((copy == 3).all()) for copy in read)
    assert all(bool((tensor == 7).all()) for tensor in tensors)


def test_copies_and_a_model_s_kernels_do_not_disturb_one_another() -> None:
    tensors = [noise((512, 1 << 15), "uint8", i) for i in range(4)]
    for method in METHODS:
        bench = Bench(tensors, 512, 512, method)
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        alone = a @ a
        stop = threading.Event()
        wrong: list[str] = []

        def copy(bench: Bench = bench, stop: threading.Event = stop, wrong: Any = wrong) -> None:
            draw, generation = np.random.default_rng(3), 0
            while not stop.is_set():
                generation += 1
                blocks, slots = draw.permutation(512)[:300], draw.permutation(512)[:300]
                wanted = [tensor[torch.from_numpy(blocks).cuda()] for tensor in bench.tensors]
                if bench.store(blocks, slots, generation)[0].any():
                    wrong.append("a store")
                if bench.load(blocks, slots, generation).any():
                    wrong.append("a load")
                now = [tensor[torch.from_numpy(blocks).cuda()] for tensor in bench.tensors]
                if not all(torch.equal(x, y) for x, y in zip(wanted, now, strict=True)):
                    wrong.append("bytes")

        thread = threading.Thread(target=copy)
        stream = torch.cuda.Stream()
        thread.start()
        try:
            with torch.cuda.stream(stream):
                products = [a @ a for _ in range(200)]
            stream.synchronize()
        finally:
            stop.set()
            thread.join()
        assert wrong == []
        assert all(torch.equal(product, alone) for product in products)


@pytest.mark.parametrize("method", METHODS)
def test_one_flipped_bit_is_seen(method: str) -> None:
    bench = Bench([noise((20, 2, 16, 8, 128), "bfloat16", i) for i in range(4)], 20, 20, method)
    blocks = np.arange(20)
    assert not bench.store(blocks, blocks)[0].any()
    draw = np.random.default_rng(5)
    n_bytes = int(bench.pieces.sum())
    at = [0, 1023, 1024, n_bytes - 65, n_bytes - 64, n_bytes - 1]
    for slot in range(20):
        offset = at[slot] if slot < len(at) else int(draw.integers(n_bytes))
        if slot % 2 == 0 or slot < len(at):
            bench.scratch.share(slot, 0)[offset] ^= np.uint8(1 << int(draw.integers(8)))
    status = bench.load(blocks, blocks)
    damaged = [slot % 2 == 0 or slot < len(at) for slot in range(20)]
    assert status.tolist() == [CHECKSUM if bad else OK for bad in damaged]


def test_the_cpu_s_copier_and_the_gpu_s_read_each_other_s_slots() -> None:
    bench = Bench([noise((8, 2, 16, 2, 64), "bfloat16", i) for i in range(3)], 8, 8)
    n_bytes = int(bench.pieces.sum())
    host = np.zeros((8, n_bytes), np.uint8)
    cpu = _core.SlotCopier(bench.scratch.buffer, 1)
    width = np.array([n_bytes], np.uint64)
    cpu.register_layers(np.array([host.ctypes.data], np.uint64), width, width, 8)
    ids, one = np.arange(8, dtype=np.int32), np.ones(8, np.uint8)
    wanted = [bench.bytes_of(block) for block in ids]
    status, checksums = bench.store(ids, ids)
    assert not status.any()
    first = np.full(8, 1, np.uint64)
    assert not cpu.load(ids, ids, first, keys(8), one).any()
    assert [row.tobytes() for row in host] == wanted
    host[:] = np.random.default_rng(9).integers(0, 256, host.shape, np.uint8)
    second = np.full(8, 2, np.uint64)
    status, sums = cpu.store(ids, ids, second, keys(8))
    assert not status.any()
    assert sums.tolist() != checksums.tolist()
    assert not bench.load(ids, ids, 2).any()
    assert [bench.bytes_of(block) for block in ids] == [row.tobytes() for row in host]


def test_a_rank_touches_its_own_shares_only() -> None:
    bench = Bench([noise((8, 4096), "uint8", 1)], 8, 8, rank=1)
    for slot in range(8):
        bench.scratch.share(slot, 0)[:] = 0x11
    ids = np.arange(8)
    assert not bench.store(ids, ids)[0].any()
    assert all((bench.scratch.share(slot, 0) == 0x11).all() for slot in range(8))
    assert bench.scratch.share(3, 1).tobytes() == bench.bytes_of(3)


def test_host_memory_and_other_devices_are_refused() -> None:
    scratch = Scratch(4, 4096, 1, bytes(32))
    copier = _cuda.GpuCopier(scratch.buffer, 0)
    host = np.zeros((8, 4096), np.uint8)
    width = np.array([4096], np.uint64)
    with pytest.raises(ValueError, match="not on CUDA device 0"):
        copier.register_layers(np.array([host.ctypes.data], np.uint64), width, width, 8)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        _cuda.GpuCopier(scratch.buffer, 99)


def test_the_proof_at_start_holds_for_each_layout() -> None:
    from kvmem.engines.proving import N_SLOTS, prove

    for name, n, tensors in layouts():
        if "apart" in name:
            continue  # the proof takes tensors whose first dimension is blocks; halves are
        bench = Bench(tensors, n, N_SLOTS)
        assert prove([tensors], n, bench.copier) == "", name


def test_measuring_tells_each_method_and_sets_the_best() -> None:
    bench = Bench([noise((64, 1 << 15), "uint8", i) for i in range(8)], 64, 8)
    found = bench.copier.measure()
    assert set(found) == {"store", "load"}
    assert all(set(its) == set(METHODS) for its in found.values())
    assert all(seconds > 0 for its in found.values() for seconds in its.values())
    assert set(bench.copier.methods()) <= set(METHODS)
