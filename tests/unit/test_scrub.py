"""The host's scrub: damage that no request met is found, and nothing else is called damage."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvmem._core import SlotCopier, SlotScrubber
from kvmem.cache import Cache
from kvmem.store import scrub as scrub_module
from kvmem.store.arena import Arena
from kvmem.store.scrub import AT_A_TIME, Scrub
from kvmem.types import GroupShape

SHARE = 5_000
N_SLOTS = 3 * AT_A_TIME
RATE = 1e6


def keys(n: int, seed: int = 0) -> list[bytes]:
    return [hashlib.sha256(repr((seed, i)).encode()).digest() for i in range(n)]


class Rig:
    """An arena of `ranks` and a cache over it, whose blocks are random bytes."""

    def __init__(self, name: str, ranks: int = 1) -> None:
        self.arena = Arena.create(
            name, n_slots=N_SLOTS, slot_bytes=SHARE, namespace=bytes(32), ranks=ranks, label="t"
        )
        self.cache = Cache(N_SLOTS, (GroupShape(16),))
        self.device = np.random.default_rng(1).integers(0, 256, (64, SHARE), np.uint8)
        self.copiers = [
            SlotCopier(np.frombuffer(self.arena.buffer, np.uint8), 1, rank) for rank in range(ranks)
        ]
        width = np.array([SHARE], np.uint64)
        for copier in self.copiers:
            copier.register_layers(np.array([self.device.ctypes.data], np.uint64), width, width, 64)

    def put(self, chain: list[bytes]) -> None:
        room = self.cache.reserve("w", 0, chain, range(len(chain)))
        chosen = b"".join(chain[i] for i in room.index.tolist())
        total = np.zeros(len(room.slots), np.uint64)
        for copier in self.copiers:
            ids = np.arange(len(room.slots), dtype=np.int32)
            status, sums = copier.store(ids, room.slots, room.generations, chosen)
            assert not status.any()
            total ^= sums
        self.cache.publish(room.slots, room.generations, total)

    def slot_of(self, chain: list[bytes], at: int) -> int:
        grant = self.cache.acquire("q", [chain], start=0, limit=16 * len(chain))
        self.cache.release("q")
        return int(grant.parts[0].slots[at])

    def flip(self, slot: int, rank: int = 0, at: int = 7) -> None:
        stride = self.arena.header.slot_stride
        data = np.frombuffer(self.arena.buffer, np.uint8)
        data[self.arena.data_of(slot) + rank * stride + at] ^= 1

    def close(self) -> None:
        self.copiers.clear()
        self.arena.close(unlink=True)


@pytest.fixture
def start(new_arena_name: Callable[[], str]) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def start(**options: Any) -> Rig:
        rigs.append(Rig(new_arena_name(), **options))
        return rigs[-1]

    yield start
    for rig in rigs:
        rig.close()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrubs whose thread does nothing by itself."""
    monkeypatch.setattr(Scrub, "_run", lambda self: self._closing.wait())


def one_pass(scrub: Scrub) -> list[tuple[int, int, bytes]]:
    for first in range(0, N_SLOTS, AT_A_TIME):
        scrub.look(first)
    return scrub.take()


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (3, 0), (3, 2)])
def test_a_flipped_bit_that_nobody_asked_for_is_found(
    start: Callable[..., Rig], ranks: int, rank: int
) -> None:
    rig, chain = start(ranks=ranks), keys(40)
    rig.put(chain)
    scrub = Scrub(rig.arena, rig.cache.published, RATE)
    assert one_pass(scrub) == []
    assert (scrub.blocks, scrub.bytes) == (40, 40 * SHARE * ranks)
    slot = rig.slot_of(chain, 25)
    rig.flip(slot, rank)
    ((found, generation, key),) = one_pass(scrub)
    assert (found, key) == (slot, chain[25])
    assert scrub.stats()["faults"] == 1
    # What the owner of the index does with it: the descendants go, too.
    assert rig.cache.quarantine(found, generation, key=key, reason="scrub") == 15
    assert rig.cache.match([chain], 0, 16 * 40) == 16 * 25
    assert one_pass(scrub) == []
    scrub.close()


@pytest.mark.usefixtures("still")
def test_a_slot_that_moves_on_is_no_fault(start: Callable[..., Rig]) -> None:
    rig, chain = start(), keys(4)
    rig.put(chain)
    slots, generations, listed = rig.cache.published(0, N_SLOTS)
    assert {listed.tobytes()[32 * i : 32 * i + 32] for i in range(4)} == set(chain)
    rig.flip(int(slots[0]))
    stale = generations + np.uint64(5)  # of whatever is no more, or not yet, in these slots
    scrub = Scrub(rig.arena, lambda first, n: (slots, stale, listed), RATE)
    scrub.look(0)
    assert (scrub.take(), scrub.faults) == ([], 0)
    scrub.close()


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("length", [0, SHARE + 1, 2**40])
def test_a_damaged_descriptor_is_found_and_not_believed(
    start: Callable[..., Rig], length: int
) -> None:
    rig, chain = start(), keys(3)
    rig.put(chain)
    slot = rig.slot_of(chain, 1)
    at = 4096 + 128 * slot + 16
    rig.arena.buffer[at : at + 8] = length.to_bytes(8, "little")
    scrub = Scrub(rig.arena, rig.cache.published, RATE)
    assert [found[0] for found in one_pass(scrub)] == [slot]
    scrub.close()


def test_slots_out_of_range_are_refused(start: Callable[..., Rig]) -> None:
    rig = start()
    scrubber = SlotScrubber(np.frombuffer(rig.arena.buffer, np.uint8))
    for slot in (-1, N_SLOTS):
        with pytest.raises(ValueError, match="no such slot"):
            scrubber.check(np.array([slot], np.int32), np.array([1], np.uint64))
    del scrubber


def test_its_thread_keeps_to_the_rate_and_ends(
    start: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an event whose waits are counted: no clock."""
    rig, passed = start(), threading.Event()
    rig.put(keys(40))
    waits: list[float] = []

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if not timeout:  # the thread module's own
                return super().wait(timeout)
            waits.append(timeout)
            if len(waits) >= 6:
                passed.set()
                return super().wait(60)  # until it is closed
            return False

    monkeypatch.setattr(scrub_module.threading, "Event", Closing)
    scrub = Scrub(rig.arena, rig.cache.published, RATE)
    monkeypatch.undo()
    assert passed.wait(60)
    scrub.close()
    assert not scrub._thread.is_alive()
    # 32 blocks, then 8, then none, and again.
    assert waits[:3] == pytest.approx([32 * SHARE / RATE, 8 * SHARE / RATE, 32 * SHARE / RATE])
    assert scrub.passes >= 1
