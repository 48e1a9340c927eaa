"""Chains of blocks that anybody can make again, and a cache over a disk or a far store that holds
them."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem import events
from kvmem._core import SlotCopier
from kvmem.cache import Cache
from kvmem.store.arena import Arena
from kvmem.store.disk import Disk
from kvmem.store.far import Far, FarStore
from kvmem.types import GroupShape

__all__ = ["CHAIN", "DISK_BYTES", "SHARE_BYTES", "Host", "block_of", "chain_of"]

SHARE_BYTES = 10_000  # no multiple of anything
CHAIN = 5
N_SLOTS = 64
DISK_BYTES = 8 << 20
NAMESPACE = hashlib.sha256(b"faults").digest()
BLOCK_TOKENS = 16
SETTLE_S = 30.0
_names = itertools.count()


def chain_of(number: int) -> list[bytes]:
    """The keys of a prompt's blocks."""
    return [hashlib.sha256(repr((number, i)).encode()).digest() for i in range(CHAIN)]


def block_of(key: bytes) -> npt.NDArray[np.uint8]:
    """A key's bytes: bf16 numbers, which a codec makes shorter, or noise."""
    draw = np.random.default_rng(int.from_bytes(key[:8], "little"))
    if key[0] % 2:
        return draw.integers(0, 256, SHARE_BYTES, np.uint8)
    numbers = draw.standard_normal(SHARE_BYTES // 2, np.float32).view(np.uint32) >> 16
    return numbers.astype(np.uint16).view(np.uint8)


class Host:
    """An arena and a cache over the disk in `root`, or over a far store where `far` makes one;
    `close` ends it."""

    def __init__(
        self, root: Path, *, faults: str = "", far: Callable[[], FarStore] | None = None
    ) -> None:
        name = f"faults-{os.getpid()}-{next(_names)}"
        self.arena = Arena.create(
            name, n_slots=N_SLOTS, slot_bytes=SHARE_BYTES, namespace=NAMESPACE, label="faults"
        )
        self.disk = self.far = None
        self.bus = events.Bus(keep=1 << 14)
        if far is None:
            self.disk = Disk(root, DISK_BYTES, self.arena, NAMESPACE, self.bus, faults=faults)
        else:
            self.far = Far(far, self.arena, NAMESPACE, self.bus)
        self.cache = Cache(
            N_SLOTS, (GroupShape(BLOCK_TOKENS),), mover=self.disk, carrier=self.far, bus=self.bus
        )
        self._device = np.zeros((CHAIN, SHARE_BYTES), np.uint8)
        self._copier = SlotCopier(np.frombuffer(self.arena.buffer, np.uint8), 1)
        width = np.array([SHARE_BYTES], np.uint64)
        base = np.array([self._device.ctypes.data], np.uint64)
        self._copier.register_layers(base, width, width, CHAIN)

    def put(self, number: int) -> None:
        """Stores a chain in the host and begins its way to the disk."""
        keys = chain_of(number)
        room = self.cache.reserve("w", 0, keys, range(CHAIN))
        chosen = [keys[i] for i in room.index.tolist()]
        for i, key in enumerate(chosen):
            self._device[i] = block_of(key)
        ids = np.arange(len(chosen), dtype=np.int32)
        status, sums = self._copier.store(ids, room.slots, room.generations, b"".join(chosen))
        if status.any():
            raise RuntimeError(f"blocks were not stored: {np.unique(status)}")
        self.cache.publish(room.slots, room.generations, sums)
        self.cache.demote(0, keys, range(CHAIN))

    def settle(self) -> None:
        """Returns when nothing is on its way."""
        while self.stats()["under_way"]:
            self.cache.settle(SETTLE_S)

    def stats(self) -> dict[str, Any]:
        """Of the disk, or of the far store."""
        return dict(self.cache.stats()["disk" if self.far is None else "far"])

    def forget_host(self) -> None:
        """Only the disk has anything."""
        self.settle()
        self.cache._tier.clear()

    def get(self, number: int) -> tuple[int, int]:
        """Blocks that were answered, and how many of them are not their keys'."""
        keys, who = chain_of(number), f"r{number}"
        grant = self.cache.acquire(who, [keys], start=0, limit=BLOCK_TOKENS * CHAIN)
        while grant.coming:
            self.cache.settle(SETTLE_S)
            grant = self.cache.acquire(who, [keys], start=0, limit=BLOCK_TOKENS * CHAIN)
        n = wrong = 0
        for part in grant.parts:
            n = len(part.slots)
            self._device[:] = 0
            status = self._copier.load(
                np.arange(n, dtype=np.int32), part.slots, part.generations, b"".join(keys[:n]),
                np.zeros(n, np.uint8),
            )  # fmt: skip
            for i, key in enumerate(keys[:n]):
                wrong += bool(status[i]) or not np.array_equal(self._device[i], block_of(key))
        self.cache.release(who)
        return n, wrong

    def close(self) -> None:
        for tier in (self.disk, self.far):
            if tier is not None:
                tier.close()
        del self._copier
        self.arena.close(unlink=True)
