"""How fast does one thread move pieces of KV between scattered places?

    python -m benchmarks.bench_copy [--short]

Random pieces of a pool far larger than any cache go to a prefaulted buffer: by kvmem's kernel, by
one glibc memcpy a piece in the same native loop, and by `torch.index_select`. The three take turns
in one run on the same pieces, so what a noisy machine does to one it does to all. One thread's
copies are timed by its CPU time, which counts the waits for memory and not its neighbours'
turns; two threads' by the wall.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks._report import Row, finish, paired, table
from kvmem import _core
from kvmem.store.layout import HEADER_BYTES, Header

__all__ = ["gather_gb_s"]

_Bytes = npt.NDArray[np.uint8]
_PIECE_BYTES = (64 << 10, 96 << 10, 360 << 10, 2 << 20)
_LAYERS = 30  # of the verified copies, 12 KiB each: the demo's model at 32 tokens a block
_LAYER_BYTES = 12 << 10
_CHUNK_BYTES = 2 << 20
_KEY = bytes(32)


def gather_gb_s(piece_bytes: int, *, repetitions: int = 9) -> float:
    """What one thread gathers: 1e9 bytes a second, the median; 256 MiB of 1 GiB each time."""
    gather = _Gather(piece_bytes, _memory(1 << 30), _memory(256 << 20))
    seconds = paired({"kvmem": gather.arm("auto")}, repetitions, clock=time.thread_time)["kvmem"]
    return gather.moved_bytes / statistics.median(seconds) / 1e9


class _Gather:
    """Random pieces of a pool and where they go; `draw` takes other pieces."""

    def __init__(self, piece_bytes: int, pool: _Bytes, out: _Bytes) -> None:
        self.pool = pool[: pool.size // piece_bytes * piece_bytes].reshape(-1, piece_bytes)
        self.out = out[: out.size // piece_bytes * piece_bytes].reshape(-1, piece_bytes)
        self.moved_bytes = self.out.nbytes
        self._rng = np.random.default_rng(piece_bytes)
        self.draw()

    def draw(self) -> None:
        self.ids = self._rng.permutation(len(self.pool))[: len(self.out)].astype(np.int32)

    def arm(self, path: str, threads: int = 1) -> Callable[[], None]:
        return lambda: _core.gather(self.pool, self.ids, self.out, threads, path)

    def scatter_arm(self, path: str) -> Callable[[], None]:
        return lambda: _core.scatter(self.out, self.ids, self.pool, 1, path)

    def torch_arm(self) -> Callable[[], None]:
        import torch

        pool, out = torch.from_numpy(self.pool), torch.from_numpy(self.out)
        return lambda: torch.index_select(pool, 0, torch.from_numpy(self.ids), out=out)

    def check(self, arm: Callable[[], None]) -> None:
        """Raises RuntimeError when the arm does not gather: a fast copy of nothing is none."""
        self.out[:] = 0
        arm()
        for row, id_ in enumerate(self.ids):
            if not np.array_equal(self.out[row], self.pool[id_]):
                raise RuntimeError(f"piece {id_} was not copied")


def _memory(n_bytes: int, *, huge: bool = True) -> _Bytes:
    """Written memory, different every 64 KiB and more."""
    mapping = mmap.mmap(-1, n_bytes)
    mapping.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, _CHUNK_BYTES, np.uint8)
    for i, at in enumerate(range(0, n_bytes, _CHUNK_BYTES)):
        chunk = memory[at : at + _CHUNK_BYTES]
        np.add(noise[: chunk.size], np.uint8(i % 251), out=chunk)
    return memory


class _Slots:
    """Blocks of `_LAYERS` layers in an arena and on a device, all stored."""

    def __init__(self, *, pool_bytes: int, moved_bytes: int) -> None:
        self.block_bytes = _LAYERS * _LAYER_BYTES
        n_slots, self.n = pool_bytes // self.block_bytes, moved_bytes // self.block_bytes
        header = Header(
            n_slots=n_slots,
            slot_bytes=self.block_bytes,
            namespace=bytes(32),
            ranks=1,
            uid=os.getuid(),
            owner_pid=os.getpid(),
            owner_start=0,
        )
        self.arena = mmap.mmap(-1, header.total_bytes)
        self.arena.madvise(mmap.MADV_HUGEPAGE)
        self.arena[:HEADER_BYTES] = header.encode()
        self.device = _memory(_LAYERS * self.n * _LAYER_BYTES)
        self.copier = _core.SlotCopier(self.arena, 1)
        layer = self.device.ctypes.data + np.arange(_LAYERS) * self.n * _LAYER_BYTES
        lengths = np.full(_LAYERS, _LAYER_BYTES, np.uint64)
        self.copier.register_layers(layer.astype(np.uint64), lengths, lengths, self.n)
        self.generation = 1
        self._blocks = np.arange(self.n, dtype=np.int32)
        for first in range(0, n_slots, self.n):
            self._store(np.arange(first, min(first + self.n, n_slots), dtype=np.int32))
        self.slots = np.random.default_rng(1).permutation(n_slots)[: self.n].astype(np.int32)

    def _store(self, slots: npt.NDArray[np.int32]) -> None:
        n = len(slots)
        generations = np.full(n, self.generation, np.uint64)
        status, _ = self.copier.store(self._blocks[:n], slots, generations, _KEY * n)
        if status.any():
            raise RuntimeError(f"blocks were not stored: {np.unique(status)}")

    def store_arm(self) -> Callable[[], None]:
        def store() -> None:
            self.generation += 1
            self._store(self.slots)

        return store

    def load_arm(self, *, verify: bool) -> Callable[[], None]:
        flags = np.full(self.n, verify, np.uint8)

        def load() -> None:
            generations = np.full(self.n, self.generation, np.uint64)
            status = self.copier.load(self._blocks, self.slots, generations, _KEY * self.n, flags)
            if status.any():
                raise RuntimeError(f"blocks were not loaded: {np.unique(status)}")

        return load


def _gather_rows(gather: _Gather, name: str, repetitions: int) -> Iterator[tuple[str, Row]]:
    arms = {
        "kvmem": gather.arm("auto"),
        "memcpy": gather.arm("plain"),
        "torch": gather.torch_arm(),
    }
    for arm in arms.values():
        gather.check(arm)
    samples = _rounds(gather, arms, repetitions)
    for theirs in ("memcpy", "torch"):
        row = Row.of(f"{name} vs {theirs}", samples, ours="kvmem", theirs=theirs, unit="ms")
        yield theirs, row


def _rounds(
    gather: _Gather,
    arms: dict[str, Callable[[], None]],
    repetitions: int,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, list[float]]:
    """`paired`, with other pieces in every round."""
    samples: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for round_ in range(repetitions):
        gather.draw()
        turned = names[round_ % len(names) :] + names[: round_ % len(names)]
        one = paired(
            {name: arms[name] for name in turned}, 1, clock=clock, warm_up=0 if round_ else 1
        )
        for name, seconds in one.items():
            samples[name].extend(seconds)
    return samples


def _speeds(
    gather: _Gather,
    arms: dict[str, Callable[[], None]],
    repetitions: int,
    clock: Callable[[], float] = time.thread_time,
) -> str:
    samples = _rounds(gather, arms, repetitions, clock)
    return _speed_line(samples, gather.moved_bytes)


def _speed_line(samples: dict[str, list[float]], n_bytes: int) -> str:
    return ", ".join(
        f"{name} {n_bytes / statistics.median(s) / 1e9:.1f} GB/s"
        f" ({n_bytes / max(s) / 1e9:.1f}..{n_bytes / min(s) / 1e9:.1f})"
        for name, s in samples.items()
    )


def _threshold() -> str:
    """From which size on glibc's memcpy uses non-temporal stores here, in its own words."""
    for loader in Path("/lib64").glob("ld-linux*.so.*"):
        told = subprocess.run(
            [str(loader), "--list-tunables"], capture_output=True, text=True, check=False
        ).stdout
        for line in told.splitlines():
            if "x86_non_temporal_threshold" in line:
                return line.strip()
    return "not told by this glibc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="less than a minute")
    short: bool = parser.parse_args().short
    pool_bytes = (2 if short else 4) << 30
    moved_bytes = (128 if short else 512) << 20
    repetitions = 7 if short else 15
    import torch

    torch.set_num_threads(1)
    begin = time.monotonic()
    print(f"kernels: {_core.cpu_path()}; glibc: {_threshold()}")
    print(f"{pool_bytes >> 30} GiB pool, {moved_bytes >> 20} MiB a call, one thread, huge pages")
    rows: list[Row] = []
    ratios: dict[str, list[float]] = {"memcpy": [], "torch": []}
    gb_s: list[float] = []
    notes: list[str] = []
    pool, out = _memory(pool_bytes), _memory(moved_bytes)
    for piece_bytes in _PIECE_BYTES:
        gather = _Gather(piece_bytes, pool, out)
        for theirs, row in _gather_rows(gather, f"{piece_bytes >> 10} KiB", repetitions):
            rows.append(row)
            ratios[theirs].append(row.ratio)
        gb_s.append(gather.moved_bytes / rows[-1].ours / 1e6)
        if piece_bytes == 96 << 10:
            notes += _other_copies(gather, repetitions)
    del gather, pool, out
    small = _Gather(96 << 10, _memory(pool_bytes, huge=False), _memory(moved_bytes, huge=False))
    arms = {"kvmem": small.arm("auto"), "memcpy": small.arm("plain")}
    notes.append(f"96 KiB on 4 KiB pages: {_speeds(small, arms, repetitions)}")
    del small, arms
    slots = _Slots(pool_bytes=pool_bytes // 2, moved_bytes=moved_bytes)
    loads = {
        "loads": slots.load_arm(verify=False),
        "verified loads": slots.load_arm(verify=True),
        "hashed stores": slots.store_arm(),
    }
    samples = paired(loads, repetitions, clock=time.thread_time)
    n_bytes = slots.n * slots.block_bytes
    notes.append(f"slots of {_LAYERS} pieces of 12 KiB: {_speed_line(samples, n_bytes)}")
    print(table(rows))
    print("\n".join(notes))
    print(f"{time.monotonic() - begin:.0f} s")
    finish(
        {
            "gather_vs_memcpy": min(ratios["memcpy"]),
            "gather_vs_torch_index_select": min(ratios["torch"]),
            "gather_gb_s": min(gb_s),
            "verified_load_gb_s": n_bytes / statistics.median(samples["verified loads"]) / 1e9,
        }
    )


def _other_copies(gather: _Gather, repetitions: int) -> list[str]:
    scatter = {"kvmem": gather.scatter_arm("auto"), "memcpy": gather.scatter_arm("plain")}
    both = {"kvmem": gather.arm("auto", 2), "memcpy": gather.arm("plain", 2)}
    return [
        f"96 KiB scattered: {_speeds(gather, scatter, repetitions)}",
        f"96 KiB, two threads: {_speeds(gather, both, repetitions, time.perf_counter)}",
    ]


if __name__ == "__main__":
    main()
