"""A disk store and an arena to move blocks between, for benchmarks of either."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem._core import DiskStore, SlotCopier
from kvmem.store.arena import Arena
from kvmem.types import NO_PARENT

__all__ = ["NAMESPACE", "Rig", "key_of"]

NAMESPACE = hashlib.sha256(b"benchmark").digest()
WAIT_S = 60.0


def key_of(i: int) -> bytes:
    """A key a number."""
    return hashlib.sha256(i.to_bytes(8, "little")).digest()


class Rig:
    """An arena of `n_slots` blocks and a store below it. Block i lies in slot i; its bytes are
    `blocks[i]`.

    Args:
        folder: the store's, made if need be.
        blocks: uint8 [n_slots, block_bytes].
        disk_bytes: the budget.
        store: further arguments of `DiskStore`.
    """

    def __init__(
        self, folder: Path, blocks: npt.NDArray[np.uint8], disk_bytes: int, **store: Any
    ) -> None:
        self.n_slots, self.block_bytes = blocks.shape
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.arena = Arena.create(
            f"bench-{folder.name}", n_slots=self.n_slots, slot_bytes=self.block_bytes,
            namespace=NAMESPACE, label="benchmark",
        )  # fmt: skip
        buffer = np.frombuffer(self.arena.buffer, np.uint8)
        copier = SlotCopier(buffer, 1)
        length = np.array([self.block_bytes], np.uint64)
        base = np.array([blocks.ctypes.data], np.uint64)
        copier.register_layers(base, length, length, self.n_slots)
        self.keys = [key_of(i) for i in range(self.n_slots)]
        every = np.arange(self.n_slots, dtype=np.int32)
        status, _ = copier.store(
            every, every, np.ones(self.n_slots, np.uint64), b"".join(self.keys)
        )
        if status.any():
            raise RuntimeError(f"blocks were not stored: {np.unique(status)}")
        self.generations = [1] * self.n_slots  # of the slots
        self.store = DiskStore(str(folder), buffer, disk_bytes, NAMESPACE, queue=1 << 16, **store)
        self.store.recovered()

    def move(self, numbers: Sequence[int], *, write: bool, record_generation: int = 1) -> int:
        """Block i to record i, or from it back into slot i, for each of these; the answer is the
        bytes that moved on the disk.

        Raises:
            RuntimeError: one of them failed.
        """
        for i in numbers:
            if not write:
                self.generations[i] += 1
            begun = self.store.begin(
                write, i + 1, i, self.generations[i], i, record_generation, 0, self.keys[i],
                NO_PARENT, 0,
            )  # fmt: skip
            if not begun:
                raise RuntimeError("the queue is full")
        n_bytes, left = 0, len(numbers)
        while left:
            self.store.wait(WAIT_S)
            for ticket, status, error, _, moved, *_ in self.store.poll():
                if status:
                    raise RuntimeError(f"move {ticket}: status {status}, errno {error}")
                n_bytes += moved
                left -= ticket > 0
        return n_bytes

    def slot(self, i: int) -> npt.NDArray[np.uint8]:
        """The bytes in slot i."""
        at = self.arena.data_of(i)
        return np.frombuffer(self.arena.buffer, np.uint8)[at : at + self.block_bytes]

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.store.close()
        self.arena.close(unlink=True)
