"""How fast one thread gathers pieces of KV here: the ceiling that a load is held against.

As bench_copy measures it: random pieces of a pool into one buffer, both on huge pages and larger
than the last-level cache's share of one core, by the kernel that kvmem's copies use.
"""

from __future__ import annotations

import mmap
import statistics
import time

import numpy as np
import numpy.typing as npt

from kvmem import _core

__all__ = ["gather_bytes_s"]

_POOL_BYTES = 1 << 30
_MOVED_BYTES = 256 << 20
_SEED = 1


def gather_bytes_s(*, piece_bytes: int, repetitions: int = 9) -> float:
    """Bytes a second, the median of `repetitions`; each moves 256 MiB of a 1 GiB pool."""
    pool = _pages(_POOL_BYTES // piece_bytes, piece_bytes)
    out = _pages(_MOVED_BYTES // piece_bytes, piece_bytes)
    draw = np.random.default_rng(_SEED)
    speeds = []
    for _ in range(repetitions):
        ids = draw.permutation(len(pool))[: len(out)].astype(np.int32)
        begin = time.perf_counter()
        _core.gather(pool, ids, out)
        speeds.append(out.nbytes / (time.perf_counter() - begin))
    if not np.array_equal(out[-1], pool[ids[-1]]):
        raise RuntimeError("the gather did not copy")
    return statistics.median(speeds)


def _pages(n: int, piece_bytes: int) -> npt.NDArray[np.uint8]:
    """[n, piece_bytes] of written memory, on huge pages where the system gives them."""
    memory = mmap.mmap(-1, n * piece_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    pieces = np.frombuffer(memory, np.uint8).reshape(n, piece_bytes)
    pieces[:] = (np.arange(n) % 251)[:, None]  # every page exists
    return pieces
