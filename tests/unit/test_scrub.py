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
from kvmem.store.arena import Arena
from kvmem.store.scrub import AT_A_TIME, PASS_S, Scrub
from kvmem.types import GroupShape

SHARE = 5_000
N_SLOTS = AT_A_TIME + 40
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
        self.device = np.random.default_rng(1).integers(0, 256, (N_SLOTS, SHARE), np.uint8)
        self.copiers = [
            SlotCopier(np.frombuffer(self.arena.buffer, np.uint8), 1, rank) for rank in range(ranks)
        ]
        width = np.array([SHARE], np.uint64)
        for copier in self.copiers:
            base = np.array([self.device.ctypes.data], np.uint64)
            copier.register_layers(base, width, width, N_SLOTS)

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
@pytest.mark.parametrize("rewritten", [False, True])
def test_a_slot_that_moves_on_is_no_fault(start: Callable[..., Rig], rewritten: bool) -> None:
    """Its block leaves, and another may come, after the scrub was told of it and before it
    looks."""
    rig, chain = start(), keys(4)
    rig.put(chain)
    listed = rig.cache.published(0, N_SLOTS)
    assert {listed[2].tobytes()[32 * i : 32 * i + 32] for i in range(4)} == set(chain)
    answers = [listed]

    def published(first: int, n: int) -> Any:
        answer = answers.pop() if answers else rig.cache.published(first, n)
        if n > 1:  # the first time it is asked
            for slot in listed[0].tolist():
                rig.flip(slot)
            rig.cache.drop("test")
            if rewritten:
                rig.put(keys(N_SLOTS, seed=1))
        return answer

    scrub = Scrub(rig.arena, published, RATE)
    if rewritten:
        scrub.look(0)
        assert (scrub.take(), scrub.stats()["faults"], scrub.blocks) == ([], 0, 0)
    else:  # the bytes are still there, of that generation, and wrong: but nobody can ask for them
        scrub.look(0)
        ((slot, generation, key), *_) = scrub.take()
        assert rig.cache.quarantine(slot, generation, key=key, reason="scrub") == 0
    scrub.close()


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("stamp", [0, 5, (1 << 64) - 1])
def test_a_damaged_stamp_is_not_taken_for_a_slot_that_moved_on(
    start: Callable[..., Rig], stamp: int
) -> None:
    rig, chain = start(), keys(3)
    rig.put(chain)
    slot = rig.slot_of(chain, 1)
    at = 4096 + 128 * slot
    rig.arena.buffer[at : at + 8] = stamp.to_bytes(8, "little")
    scrub = Scrub(rig.arena, rig.cache.published, RATE)
    assert [(found[0], found[2]) for found in one_pass(scrub)] == [(slot, chain[1])]
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


class Clock:
    """Waits of a scrub's thread, counted: no time passes. After `most` it waits for the end."""

    def __init__(self, most: int) -> None:
        self.waits: list[float] = []
        self.over = threading.Event()
        self.ended = threading.Event()
        self._most = most

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        if len(self.waits) < self._most:
            return False
        self.over.set()
        assert self.ended.wait(60)
        return True


def test_its_thread_keeps_to_the_rate_and_ends(start: Callable[..., Rig]) -> None:
    rig, clock = start(), Clock(5)
    rig.put(keys(40))
    scrub = Scrub(rig.arena, rig.cache.published, RATE, wait=clock.wait)
    assert clock.over.wait(60)
    clock.ended.set()
    scrub.close()
    scrub.close()  # again is fine
    assert not scrub._thread.is_alive()
    read_s = 40 * SHARE / RATE
    rest_s = PASS_S - read_s  # a pass over little takes its time, too
    assert clock.waits == pytest.approx([read_s, rest_s, read_s, rest_s, read_s])
    assert (scrub.passes, scrub.bytes) == (2, 3 * 40 * SHARE)


@pytest.mark.parametrize("n_blocks", [0, 3])
def test_a_pass_over_little_is_no_busy_loop(start: Callable[..., Rig], n_blocks: int) -> None:
    rig, clock = start(), Clock(12)
    if n_blocks:
        rig.put(keys(n_blocks))
    scrub = Scrub(rig.arena, rig.cache.published, RATE, wait=clock.wait)
    assert clock.over.wait(60)
    passes = scrub.passes
    clock.ended.set()
    scrub.close()
    assert passes >= 5
    assert sum(clock.waits) >= (passes - 1) * PASS_S


def test_it_reads_no_more_at_once_than_a_burst(start: Callable[..., Rig]) -> None:
    rig, clock = start(), Clock(1)
    rig.put(keys(40))
    looked: list[int] = []
    scrub = Scrub(rig.arena, rig.cache.published, RATE, wait=clock.wait)
    assert clock.over.wait(60)
    scrub._burst = 16
    assert scrub.look(0, lambda n_bytes: looked.append(n_bytes) or False) == 40 * SHARE
    assert looked == [16 * SHARE, 16 * SHARE, 8 * SHARE]
    assert scrub.look(0, lambda n_bytes: True) == 16 * SHARE  # told to end
    clock.ended.set()
    scrub.close()


def test_a_scrub_that_fails_says_so_and_ends(start: Callable[..., Rig]) -> None:
    rig = start()

    def published(first: int, n: int) -> Any:
        raise RuntimeError("no index")

    scrub = Scrub(rig.arena, published, RATE)
    scrub._thread.join(60)
    assert (scrub.error, scrub.stats()["on"]) == ("RuntimeError: no index", False)
    scrub.close()


def test_nothing_reads_the_arena_after_close(start: Callable[..., Rig]) -> None:
    rig = start()
    rig.put(keys(40))
    scrub = Scrub(rig.arena, rig.cache.published, 1e12)
    scrub.close()
    rig.close()
    rig.arena.buffer.close()  # BufferError while anything still has it


def test_honest_blocks_are_never_called_bad_beside_a_writer(start: Callable[..., Rig]) -> None:
    """Threads, a real index and real copies, and then a block that is not honest."""
    rig, chain, found = start(), keys(8), threading.Event()
    rig.put(chain)
    scrubs: list[Scrub] = []

    def wait(seconds: float) -> bool:
        if scrubs and scrubs[0].faults:
            found.set()
        return False

    scrub = Scrub(rig.arena, rig.cache.published, RATE, wait=wait)
    scrubs.append(scrub)
    for seed in range(1, 60):
        rig.put(keys(60, seed))
    assert rig.cache.stats()["evictions"] > 0
    assert (scrub.faults, scrub.error) == (0, None)
    rig.put(chain)
    slot = rig.slot_of(chain, 3)
    rig.flip(slot)
    assert found.wait(60)
    scrub.close()
    assert {(one[0], one[2]) for one in scrub.take()} == {(slot, chain[3])}
