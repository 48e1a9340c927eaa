"""Engines in small: the two halves of a connector as two processes that copy real bytes.

The upper process owns the client of a node, or a cache of its own; the lower one maps the arena and
copies. They are forked from a process that has everything imported and no thread, so that one is
there in some milliseconds.

A block's bytes follow from its key, so that whoever loads one knows what it must be.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import pickle
import signal
import struct
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvmem._core import SlotCopier
from kvmem.errors import KVMemError
from kvmem.node import Link, Node, NodeCache, Settings
from kvmem.node.attaching import Attachment, hello_of
from kvmem.types import GroupShape

__all__ = ["COUNTS", "GROUPS", "NAMESPACE", "Counts", "Device", "block_of", "chain", "fork"]

NAMESPACE = bytes(range(32))
GROUPS = (GroupShape(16),)
COUNTS = ("wrong", "failures", "stored", "loaded", "asked", "missed", "waited", "away")
COPY_S = 0.005
OFTEN = 8
PR_SET_PDEATHSIG = 1
_WORD = struct.Struct("<I")


def chain(seed: int, n: int) -> list[bytes]:
    """A prompt's keys: chained, and the same wherever they are made."""
    key, keys = seed.to_bytes(32, "little"), []
    for i in range(n):
        key = hashlib.sha256(key + i.to_bytes(4, "little")).digest()
        keys.append(key)
    return keys


def block_of(key: bytes, n_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of the block with this key: each 8 of them tell where they belong."""
    seed = int.from_bytes(key[:8], "little")
    at = np.arange(n_bytes // 8, dtype=np.uint64)
    return ((at + np.uint64(1)) * np.uint64(seed | 1)).view(np.uint8)


class Counts:
    """What engines have done, in memory that outlives them: a row for each."""

    def __init__(self, n: int) -> None:
        self._memory = mmap.mmap(-1, max(4096, n * len(COUNTS) * 8))
        self.rows = np.frombuffer(self._memory, np.int64)[: n * len(COUNTS)].reshape(n, -1)

    def add(self, row: int, name: str, n: int = 1) -> None:
        """One process writes a cell."""
        self.rows[row, COUNTS.index(name)] += n

    def total(self, name: str) -> int:
        """Of all rows."""
        return int(self.rows[:, COUNTS.index(name)].sum())


class Device:
    """Blocks of an engine's own memory, and the copier between them and an arena."""

    def __init__(self, n_blocks: int, block_bytes: int) -> None:
        self.blocks = np.zeros((n_blocks, block_bytes), np.uint8)

    def copier(self, buffer: Any, threads: int = 1) -> SlotCopier:
        """Over this arena."""
        made = SlotCopier(np.frombuffer(buffer, np.uint8), threads)
        made.register_layers(
            np.array([self.blocks.ctypes.data], np.uint64),
            np.array([self.blocks.shape[1]], np.uint64),
            np.array([self.blocks.shape[1]], np.uint64),
            len(self.blocks),
        )
        return made


def fork(do: Callable[[], None], *, outlives: bool = False) -> int:
    """A child that does this and ends, with its parent unless it `outlives` that; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if not outlives:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        do()
        code = 0
    except BaseException:  # noqa: BLE001 the child's own top: it must not go on as its parent
        traceback.print_exc()
    finally:
        os._exit(code)


def serve(settings: Settings) -> None:
    """A node, until it is killed."""
    Node(settings).run()


class Engine:
    """Asks, loads, stores and checks, until it is killed.

    Args:
        folder: the node's.
        block_bytes: of a slot.
        counts, row: where it counts.
        seed: of its prompts' order.
        prompts: how many there are, for all engines together.
        length: of a prompt, in blocks, at most.
    """

    def __init__(
        self, folder: Path, block_bytes: int, counts: Counts, row: int, *, seed: int, prompts: int,
        length: int,
    ) -> None:  # fmt: skip
        self.folder, self.block_bytes = folder, block_bytes
        self.counts, self.row = counts, row
        self.random = np.random.default_rng(seed)
        self.prompts, self.length = prompts, length

    def run(self) -> None:
        """Never returns: it is killed."""
        down_r, down_w = os.pipe()
        up_r, up_w = os.pipe()

        def lower() -> None:
            os.close(down_w)  # or it would never see the upper half's end
            os.close(up_r)
            Worker(self, down_r, up_w).run()

        fork(lower, outlives=True)
        os.close(down_r)
        os.close(up_w)
        self._down, self._up = down_w, up_r
        cache = NodeCache(self.folder, self.like(), wait_s=5.0, deadline_s=0.5)
        held: list[str] = []
        for number in range(1 << 60):
            try:
                self.turn(cache, f"r{number}")
            except KVMemError:
                self.counts.add(self.row, "failures")
                traceback.print_exc()
            held.append(f"r{number}")
            while len(held) > 4:  # some leases are held at any time
                cache.release(held.pop(0))

    def like(self) -> Any:
        """What it tells of its blocks."""
        return hello_of(
            namespace=NAMESPACE, slot_bytes=self.block_bytes, ranks=1, groups=GROUPS, label="bench"
        )

    def turn(self, cache: NodeCache, request: str) -> None:
        """One prompt: what is there is loaded and checked, what is not is stored."""
        n = int(self.random.integers(1, self.length + 1))
        # Half of them are asked for all the time, half hardly ever again: so slots change hands.
        often = self.random.random() < 0.5
        seed = int(self.random.integers(OFTEN if often else self.prompts))
        keys = chain(seed, n)
        tokens = n * GROUPS[0].block_tokens
        cache.adopt()
        self.counts.add(self.row, "asked")
        self.counts.add(self.row, "away", int(not cache.attached))
        if not cache.attached:
            time.sleep(0.001)  # what it computes meanwhile
        grant = cache.acquire(request, [keys], start=0, limit=tokens)
        if grant.coming:
            self.counts.add(self.row, "waited")
            cache.settle(0.005)
            return
        attachment, epoch = cache.attachment, cache.epoch
        for part in grant.parts:
            told = self._order("load", attachment, part.slots, part.generations,
                               keys[part.first : part.first + len(part.slots)])  # fmt: skip
            for slot, generation, key, status in told["bad"]:
                if status in (1, 2, 3) and grant.epoch == cache.epoch:
                    # What a lease holds is what it was, whoever died: anything else is a breach.
                    self.counts.add(self.row, "wrong")
                    cache.quarantine(slot, generation, key=key, reason="bench")
        room = cache.reserve(request, 0, keys, range(n))
        if len(room.slots):
            told = self._order("store", attachment, room.slots, room.generations,
                               [keys[i] for i in room.index.tolist()])  # fmt: skip
            if cache.epoch == epoch == room.epoch:
                good = told["status"] == 0
                cache.abandon(room.slots[~good], room.generations[~good])
                done = cache.publish(
                    room.slots[good], room.generations[good], told["checksums"][good]
                )
                self.counts.add(self.row, "stored", done)
        cache.hold(request, 0, keys, n)
        self.counts.add(self.row, "missed", n - sum(len(part.slots) for part in grant.parts))

    def _order(
        self, what: str, attachment: Attachment, slots: Any, generations: Any, keys: list[bytes]
    ) -> dict[str, Any]:
        body = pickle.dumps((what, attachment, slots, generations, keys))
        _write(self._down, body)
        return dict(pickle.loads(_read(self._up)))  # noqa: S301 our own other half


class Worker:
    """The lower half of an engine."""

    def __init__(self, engine: Engine, down: int, up: int) -> None:
        self.engine, self._down, self._up = engine, down, up
        self.device = Device(engine.length, engine.block_bytes)
        self._link: Link | None = None
        self._copier: SlotCopier | None = None
        self._mapped: Attachment | None = None

    def run(self) -> None:
        """Until the upper half has gone; what it was told is done first."""
        while True:
            try:
                order = pickle.loads(_read(self._down))  # noqa: S301 as above
            except EOFError:
                return
            with contextlib.suppress(BrokenPipeError):
                _write(self._up, pickle.dumps(self._do(*order)))

    def _lost(self) -> None:
        self._copier = None

    def _map(self, attachment: Attachment) -> SlotCopier | None:
        if attachment == self._mapped and self._copier is not None:
            return self._copier
        self._copier = None
        if self._link is not None:
            self._link.close()
            self._link = None
        like = msgspec.structs.replace(self.engine.like(), role="worker", token=attachment.token)
        try:
            self._link = Link(self.engine.folder, like, self._lost)
        except (KVMemError, OSError):  # the node has gone: nothing is copied
            return None
        self._mapped = attachment
        self._copier = self.device.copier(self._link.arena.buffer)
        return self._copier

    def _do(
        self, what: str, attachment: Attachment, slots: Any, generations: Any, keys: list[bytes]
    ) -> dict[str, Any]:
        n = len(slots)
        copier = self._map(attachment)
        ids = np.arange(n, dtype=np.int32)
        wanted = np.stack([block_of(key, self.engine.block_bytes) for key in keys])
        none = {"bad": [], "status": np.full(n, 255, np.uint8), "checksums": np.zeros(n, np.uint64)}
        if copier is None:
            return none
        if what == "store":
            self.device.blocks[:n] = wanted
            status, checksums = copier.store(ids, slots, generations, b"".join(keys))
            # Nobody else writes there until it is reported: what was written is what is there,
            # also after as long as a large copy takes.
            time.sleep(COPY_S)
            self.device.blocks[:n] = 0
            back = copier.load(ids, slots, generations, b"".join(keys), np.ones(n, np.uint8))
            good = status == 0
            if (back[good] != 0).any() or (self.device.blocks[:n][good] != wanted[good]).any():
                self.engine.counts.add(self.engine.row, "wrong")
            return {**none, "status": status, "checksums": checksums}
        self.device.blocks[:n] = 0
        status = copier.load(ids, slots, generations, b"".join(keys), np.ones(n, np.uint8))
        for i in np.flatnonzero(status == 0).tolist():
            if (self.device.blocks[i] != wanted[i]).any():
                self.engine.counts.add(self.engine.row, "wrong")
        self.engine.counts.add(self.engine.row, "loaded", int((status == 0).sum()))
        rows = zip(slots.tolist(), generations.tolist(), keys, status.tolist(), strict=True)
        return {**none, "bad": [row for row in rows if row[3] != 0]}


def _write(fd: int, body: bytes) -> None:
    view = memoryview(_WORD.pack(len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd: int) -> bytes:
    (n,) = _WORD.unpack(_exactly(fd, _WORD.size))
    return _exactly(fd, n)


def _exactly(fd: int, n: int) -> bytes:
    found = b""
    while len(found) < n:
        more = os.read(fd, n - len(found))
        if not more:
            raise EOFError
        found += more
    return found


def until(reached: Callable[[], Any], seconds: float) -> bool:
    """Whether it came about in time."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
