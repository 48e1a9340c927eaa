"""Proof that this disk gives back what it was given, before anything of it is promised.

Two blocks, one that a codec makes shorter and one that it does not, go from an arena to a store of
their own in the engine's folder and come back into other slots; every byte is compared with what
they were made of. The store is removed again.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvmem._core import DiskStore
from kvmem.store.layout import Header
from kvmem.store.scratch import Scratch
from kvmem.types import NO_PARENT

__all__ = ["FOLDER", "prove"]

FOLDER = "proof"
N = 2
KEYS = [hashlib.sha256(f"kvmem proof {i}".encode()).digest() for i in range(N)]
WAIT_S = 10.0


def prove(folder: Path, like: Header, *, codec: bool, faults: str = "") -> str:
    """Empty, or what went wrong.

    Args:
        folder: the store's own; the proof's lies in it.
        like: the arena's header, for its geometry.
        codec: as the store has it.
        faults: for tests, see csrc/disk/disk_io.h.
    """
    own = folder / FOLDER
    try:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(mode=0o700)
        return _prove(own, like, codec=codec, faults=faults)
    except OSError as error:
        return str(error.args[-1] if error.strerror is None else error.strerror)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _prove(own: Path, like: Header, *, codec: bool, faults: str) -> str:
    scratch = Scratch(2 * N, like.slot_bytes, like.ranks, like.namespace)
    made = [_blocks(like.slot_bytes, rank) for rank in range(like.ranks)]
    numbers, ones = np.arange(N, dtype=np.int32), np.ones(N, np.uint64)
    for rank, device in enumerate(made):
        status, _ = scratch.copier_of(device, rank).store(numbers, numbers, ones, b"".join(KEYS))
        if status.any():
            return f"a block was not stored: status {int(status.max())}"
    budget = 8192 + N * 2 * (like.ranks * like.slot_bytes + 8192)
    store = DiskStore(
        str(own), scratch.buffer, budget, like.namespace, threads=1, codec=codec, faults=faults
    )
    try:
        store.recovered()
        for write in (True, False):
            for i, key in enumerate(KEYS):
                slot = i if write else N + i
                store.begin(write, i + 1, slot, 1, i, 1, 0, key, NO_PARENT, 0)
                store.wait(WAIT_S)
                told = store.poll()
                if len(told) != 1:
                    return f"no answer in {WAIT_S:.0f} s"
                _, status, errno, *_ = told[0]
                if status:
                    what = "write" if write else "read"
                    return f"a {what} of a block failed: status {status}, errno {errno}"
    finally:
        store.close()
    for rank, device in enumerate(made):
        for i in range(N):
            if not np.array_equal(scratch.share(N + i, rank), device[i]):
                return f"block {i} came back as another"
    return ""


def _blocks(slot_bytes: int, rank: int) -> npt.NDArray[np.uint8]:
    draw = np.random.default_rng(rank)
    numbers = draw.standard_normal(slot_bytes // 4 + 1, np.float32).view(np.uint8)[:slot_bytes]
    return np.stack([draw.integers(0, 256, slot_bytes, np.uint8), numbers])
