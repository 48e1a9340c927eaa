"""How near to the bus do stores and loads of random blocks come on a GPU, and whom do they slow?

The ceiling is taken in the same rounds: one large `cudaMemcpyAsync` from and to pinned memory.
Every arm moves as many bytes; a store or load is `GpuCopier`'s whole call, checksums and identity
checks included. Each shape is moved by each method, and by the one that the copier chose for itself
when the layers were registered.

    python -m benchmarks.bench_gpu_copy [--short]

Needs a GPU, torch with CUDA, and kvmem built with nvcc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from benchmarks._report import finish, spread
from kvmem.store.scratch import Scratch

_KIB = 1 << 10


class Shape(msgspec.Struct, frozen=True):
    """Blocks of `n_layers` pieces; `key` is its name in the result, where it has an aim."""

    name: str
    piece_bytes: int
    n_layers: int
    key: str = ""


_SHAPES = (
    Shape("2 MiB blocks, contiguous", 2048 * _KIB, 1, "2mib_block"),
    Shape("64 KiB pieces, 32 layers", 64 * _KIB, 32, "64kib_pieces"),
    Shape("18 KiB pieces, 61 layers (MLA)", 18 * _KIB, 61),
    Shape("12 KiB pieces, 30 layers (SmolLM2)", 12 * _KIB, 30),
    Shape("4 KiB pieces, 32 layers", 4 * _KIB, 32, "4kib_pieces"),
    Shape("4 KiB blocks", 4 * _KIB, 1, "4kib_block"),
)
_METHODS = ("dma", "direct", "staged")


class Blocks:
    """Blocks of one shape on the GPU, an arena, random lists of both, and a copier."""

    def __init__(self, shape: Shape, moved_bytes: int, method: str, grid: int) -> None:
        import torch

        from kvmem import _cuda

        self.shape = shape
        block_bytes = shape.piece_bytes * shape.n_layers
        self.n = moved_bytes // block_bytes
        self.moved_bytes = self.n * block_bytes
        n_blocks = n_slots = self.n + self.n // 4 + 1
        draw = torch.Generator(device="cuda").manual_seed(1)
        self.layers = [
            torch.randint(
                0, 256, (n_blocks, shape.piece_bytes), dtype=torch.uint8, device="cuda",
                generator=draw,
            )
            for _ in range(shape.n_layers)
        ]  # fmt: skip
        self.scratch = Scratch(n_slots, block_bytes, 1, bytes(32))
        self.copier = _cuda.GpuCopier(self.scratch.buffer, 0, 0, method, grid)
        bases = np.array([layer.data_ptr() for layer in self.layers], np.uint64)
        lengths = np.full(shape.n_layers, shape.piece_bytes, np.uint64)
        self.copier.register_layers(bases, lengths, lengths, n_blocks)
        lists = np.random.default_rng(2)
        self.blocks = lists.permutation(n_blocks)[: self.n].astype(np.int32)
        self.slots = lists.permutation(n_slots)[: self.n].astype(np.int32)
        self.keys = bytes(32) * self.n
        self.generation = 0
        # Nothing is to be waited for: what is moved was computed long ago.
        self._idle = torch.cuda.Stream()

    def store(self) -> None:
        """All blocks to the arena; raises RuntimeError when one was not stored."""
        self.generation += 1
        generations = np.full(self.n, self.generation, np.uint64)
        status, _ = self.copier.store(
            self.blocks, self.slots, generations, self.keys, 0, self._idle.cuda_stream
        )
        if status.any():
            raise RuntimeError(f"blocks were not stored: {self.copier.error or np.unique(status)}")

    def load(self) -> None:
        """All blocks back, compared; raises RuntimeError when one was not loaded."""
        generations = np.full(self.n, self.generation, np.uint64)
        checked = np.ones(self.n, np.uint8)
        status = self.copier.load(
            self.blocks, self.slots, generations, self.keys, checked, 0, self._idle.cuda_stream
        )
        if status.any():
            raise RuntimeError(f"blocks were not loaded: {self.copier.error or np.unique(status)}")

    def check(self) -> None:
        """Raises RuntimeError when blocks don't come back: a fast copy of nothing is none."""
        import torch

        at = torch.from_numpy(self.blocks.astype(np.int64)).cuda()
        wanted = [layer[at] for layer in self.layers]
        torch.cuda.synchronize()
        self.store()
        for layer in self.layers:
            layer[at] = 0xA5
        torch.cuda.synchronize()
        self.load()
        if not all(torch.equal(layer[at], w) for layer, w in zip(self.layers, wanted, strict=True)):
            raise RuntimeError(f"{self.shape.name}: blocks came back as others")


class Ceiling:
    """One large copy, pinned memory to and from the GPU."""

    def __init__(self, n_bytes: int) -> None:
        import torch

        self._host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")

    def store(self) -> None:
        """Device to host."""
        self._copy(self._host, self._device)

    def load(self) -> None:
        """Host to device."""
        self._copy(self._device, self._host)

    def _copy(self, to: Any, source: Any) -> None:
        import torch

        to.copy_(source, non_blocking=True)
        torch.cuda.current_stream().synchronize()


def seconds(arm: Callable[[], None]) -> float:
    """Of one call; the GPU is idle before and after."""
    begin = time.perf_counter()
    arm()
    return time.perf_counter() - begin


def measure(
    shape: Shape, moved_bytes: int, grid: int, rounds: int, ceiling: Ceiling
) -> tuple[list[str], dict[str, Any]]:
    """Lines of the table, and each method's share of the ceiling by way."""
    found: dict[str, Any] = {"shape": shape.name}
    lines = []
    for method in ("auto", *_METHODS):
        blocks = Blocks(shape, moved_bytes, method, grid)
        blocks.check()
        chosen = blocks.copier.methods()
        shares: dict[str, list[float]] = {"store": [], "load": []}
        speeds: dict[str, list[float]] = {"store": [], "load": []}
        for _ in range(rounds):
            for way in ("store", "load"):
                best = seconds(getattr(ceiling, way))
                ours = seconds(getattr(blocks, way))
                best = (best + seconds(getattr(ceiling, way))) / 2  # before and after
                shares[way].append(best / ours)
                speeds[way].append(blocks.moved_bytes / ours / 1e9)
        its = {way: statistics.median(values) for way, values in shares.items()}
        found[method] = {**its, "methods": list(chosen)}
        cells = []
        for way in ("store", "load"):
            low, high = spread(shares[way])
            cells.append(
                f"{way} {statistics.median(speeds[way]):6.1f} GB/s"
                f" {its[way]:.3f} ({low:.3f}..{high:.3f})"
            )
        note = f" = {chosen[0]}/{chosen[1]}" if method == "auto" else ""
        lines.append(f"  {method + note:22} {'   '.join(cells)}")
        del blocks
    return lines, found


class Products:
    """A row of bf16 matrix products, back to back on torch's stream, about a tenth of a second."""

    def __init__(self, side: int) -> None:
        import torch

        self._a, self._b = (
            torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        self._out = torch.empty_like(self._a)
        self._n = 1
        self._n = max(1, round(0.1 / min(self.seconds() for _ in range(4))))
        self.seconds()

    def seconds(self) -> float:
        """Of one row, on the GPU's own clock."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._n):
            torch.mm(self._a, self._b, out=self._out)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def slowdown(blocks: Blocks, way: str, products: Products, windows: int) -> tuple[float, float]:
    """Share by which products get slower while copies go on, and the copies' GB/s meanwhile."""
    ratios, speeds = [], []
    for _ in range(windows):
        alone = products.seconds()
        stop, begun = threading.Event(), threading.Event()
        moved: list[float] = []

        def copy(stop: Any = stop, begun: Any = begun, moved: Any = moved) -> None:
            while not stop.is_set():
                moved.append(seconds(getattr(blocks, way)))
                begun.set()

        thread = threading.Thread(target=copy)
        thread.start()
        begun.wait()
        before = len(moved)
        beside = products.seconds()
        stop.set()
        thread.join()
        ratios.append(beside / ((alone + products.seconds()) / 2) - 1)
        speeds.append(blocks.moved_bytes / statistics.median(moved[before:]) / 1e9)
    return statistics.median(ratios), statistics.median(speeds)


def beside_products(
    moved_bytes: int, grid: int, windows: int
) -> tuple[list[str], dict[str, float]]:
    """Lines of the second table; the largest slowdown and the slowest copies of it."""
    lines, slowest, gb_s = [], 0.0, float("inf")
    for side in (8192, 4096):
        products = Products(side)
        for shape in _SHAPES:
            if not shape.key:
                continue
            blocks = Blocks(shape, moved_bytes, "auto", grid)
            blocks.store()
            for way in ("store", "load"):
                slower, speed = slowdown(blocks, way, products, windows)
                lines.append(
                    f"  {side:5}  {way:5} of {shape.name:28} {slower:+7.2%} at {speed:5.1f} GB/s"
                )
                slowest, gb_s = max(slowest, slower), min(gb_s, speed)
    return lines, {"matmul_slowdown": slowest, "beside_matmul_gb_s": gb_s}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="less than a minute")
    parser.add_argument("--products", action="store_true", help="only beside matrix products")
    parser.add_argument("--grid", type=int, default=16, help="thread blocks of a copy kernel")
    arguments = parser.parse_args()
    import torch

    from kvmem import _cuda

    if _cuda.n_devices() == 0:
        parser.exit(2, "bench_gpu_copy: no GPU on this machine\n")
    moved_bytes = (128 if arguments.short else 512) << 20
    rounds = 5 if arguments.short else 11
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, CUDA {torch.version.cuda}, torch {torch.__version__}")
    print(f"{moved_bytes >> 20} MiB a call, kernels of {arguments.grid} thread blocks")
    ceiling = Ceiling(moved_bytes)
    for way in ("store", "load", "store", "load"):
        taken = seconds(getattr(ceiling, way))
        print(f"one large cudaMemcpyAsync, {way}: {moved_bytes / taken / 1e9:.1f} GB/s")
    result: dict[str, Any] = {}
    raw = []
    for shape in () if arguments.products else _SHAPES:
        lines, found = measure(shape, moved_bytes, arguments.grid, rounds, ceiling)
        print(shape.name, *lines, sep="\n", flush=True)
        raw.append(found)
        if shape.key:
            for way in ("store", "load"):
                result[f"{way}_{shape.key}"] = found["auto"][way]
    lines, told = beside_products(moved_bytes, arguments.grid, 3 if arguments.short else 7)
    print("bf16 products, side by side with copies: slower by, at the copies' speed", *lines,
          sep="\n")  # fmt: skip
    result |= told
    print(json.dumps(raw))
    finish({"device": properties.name, **result})


if __name__ == "__main__":
    main()
