"""Demotion and promotion: what goes down comes up checked, or not at all."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from kvmem import events
from kvmem.cache import Cache
from kvmem.cache.moves import PATIENCE_S, Moves
from kvmem.types import GroupShape, Move, Moved

FULL, STATE = GroupShape(16), GroupShape(16, 1)
N = 6


def keys(n: int = N, seed: int = 0) -> list[bytes]:
    return [hashlib.sha256(repr((seed, i)).encode()).digest() for i in range(n)]


KEYS = keys()


class Disk:
    """A mover that does what it is told, when it is told; its records hold keys."""

    def __init__(self, n_records: int = 32, queue: int = 64) -> None:
        self.n_records = n_records
        self.room = n_records
        self.pieces = 0  # writes that find room in pieces only
        self.used_bytes, self.disk_bytes = 0, 1 << 20
        self.on = True
        self.records: dict[int, tuple[bytes, int]] = {}
        self.begun: list[tuple[str, Move]] = []
        self.order: list[bytes] = []  # keys as they were written
        self.faults: dict[bytes, str] = {}
        self.late: bytes | None = None
        self.waits = 0
        self.too_slow_s: list[float] = []
        self._queue = queue

    def recovered(self) -> None:
        return None

    def write(self, move: Move) -> bool:
        return self._begin("write", move)

    def read(self, move: Move) -> bool:
        return self._begin("read", move)

    def _begin(self, what: str, move: Move) -> bool:
        if len(self.begun) >= self._queue:
            return False
        self.begun.append((what, move))
        return True

    def drop(self, record: int) -> None:
        self.records.pop(record, None)

    def clear(self) -> None:
        self.records.clear()

    def poll(self) -> list[Moved]:
        done = []
        begun, self.begun = self.begun, []
        if self.late is not None:  # the others overtake it
            begun, self.begun = (
                [one for one in begun if one[1].key != self.late],
                [one for one in begun if one[1].key == self.late],
            )
        for what, move in begun:
            fault = self.faults.get(move.key, "")
            if what == "write" and self.pieces > 0:
                self.pieces, fault = self.pieces - 1, "room"
            if what == "write" and not fault:
                self.records[move.record] = (move.key, move.record_generation)
                self.order.append(move.key)
            if what == "read" and not fault:
                assert self.records[move.record] == (move.key, move.record_generation)
            done.append(Moved(move.ticket, fault, checksum=7, bytes=100, io_s=0.5))
        return done

    def too_slow(self, seconds: float) -> None:
        self.too_slow_s.append(seconds)

    def wait(self, seconds: float, n: int = 1) -> None:
        self.waits += 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(disk: Disk, clock: Clock | None = None, n_slots: int = 16, groups: Any = (FULL,)) -> Cache:
    return Cache(n_slots, groups, mover=disk, clock=clock or Clock())


@pytest.fixture
def cache(disk: Disk, clock: Clock) -> Cache:
    return make(disk, clock)


def put(cache: Cache, chain: list[bytes], group: int = 0, blocks: Any = None) -> None:
    blocks = list(range(len(chain))) if blocks is None else blocks
    room = cache.reserve("w", group, chain, blocks)
    cache.publish(room.slots, room.generations, np.ones(len(room.slots), np.uint64))
    cache.demote(group, chain, blocks)


def below(cache: Cache) -> Moves:
    assert cache._moves is not None
    return cache._moves


def forget_host(cache: Cache) -> None:
    """What a host tier of other prompts leaves of this one: nothing."""
    cache._tier.clear()
    cache._tier.check_integrity()


def ask(cache: Cache, chain: list[bytes] = KEYS, who: str = "r") -> Any:
    return cache.acquire(who, [chain], start=0, limit=16 * len(chain))


def test_a_block_goes_down_after_its_parents_and_comes_up_again(cache: Cache, disk: Disk) -> None:
    put(cache, KEYS)
    cache.settle()
    assert disk.order == KEYS
    forget_host(cache)
    first = ask(cache)
    assert (first.coming, first.stop, first.parts) == (True, 0, ())
    grant = ask(cache)
    assert (grant.coming, grant.stop, grant.from_disk, grant.missing) == (False, 96, 96, "none")
    assert len(grant.parts[0].slots) == N
    cache.release("r")
    assert cache.check_integrity() == []
    assert cache.stats()["leases"] == cache.stats()["disk"]["leases"] == 0


def test_what_the_host_has_is_not_waited_for(cache: Cache, disk: Disk) -> None:
    put(cache, KEYS)
    cache.settle()
    grant = ask(cache)
    assert (grant.coming, grant.stop, grant.from_disk) == (False, 96, 0)
    assert disk.begun == []


def test_only_what_the_host_lacks_is_read(cache: Cache, disk: Disk) -> None:
    put(cache, KEYS)
    cache.settle()
    forget_host(cache)
    put(cache, KEYS[:2])
    assert ask(cache).coming
    assert [move.key for _, move in disk.begun] == KEYS[2:]
    grant = ask(cache)
    assert (grant.stop, grant.from_disk) == (96, 64)


def test_nothing_is_copied_twice(cache: Cache, disk: Disk) -> None:
    put(cache, KEYS)
    cache.settle()
    cache.demote(0, KEYS, range(N))
    assert disk.begun == []


def test_two_requests_share_one_read(
    cache: Cache, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, KEYS)
    cache.settle()
    forget_host(cache)
    assert ask(cache, who="a").coming
    monkeypatch.setattr(below(cache), "poll", lambda: None)
    assert ask(cache, who="b").coming
    assert len(disk.begun) == N
    monkeypatch.undo()
    assert [ask(cache, who=who).stop for who in "ab"] == [96, 96]
    cache.release("a")
    cache.release("b")
    assert cache.stats()["leases"] == 0


def test_a_block_that_fails_its_check_and_all_below_it_are_not_served(
    cache: Cache, disk: Disk
) -> None:
    put(cache, KEYS)
    cache.settle()
    forget_host(cache)
    disk.faults[KEYS[2]] = "record"
    assert ask(cache).coming
    grant = ask(cache)
    assert grant.stop == 32
    (told,) = [e for e in cache.bus.recent() if isinstance(e, events.Quarantined)]
    assert (told.tier, told.blocks) == ("disk", 4)
    assert below(cache).disk.match(KEYS) == 2
    assert cache.check_integrity() == []


def test_a_write_that_fails_takes_what_hangs_below_it_along(cache: Cache, disk: Disk) -> None:
    disk.faults[KEYS[2]] = "io"
    put(cache, KEYS)
    cache.settle()
    assert below(cache).disk.match(KEYS) == 2
    # Those below it were written all the same: their records are dropped.
    assert {key for key, _ in disk.records.values()} == set(KEYS[:2])
    disk.faults.clear()
    cache.demote(0, KEYS, [N - 1])  # the next block of the prompt fills the hole
    cache.settle()
    assert below(cache).disk.match(KEYS) == N


def test_a_full_queue_costs_the_rest_of_the_chain_and_no_lease(clock: Clock) -> None:
    disk = Disk(queue=2)
    cache = make(disk, clock)
    put(cache, KEYS)
    assert cache.stats()["disk"]["refused"] == N - 2
    cache.settle()
    assert below(cache).disk.match(KEYS) == 2
    assert cache.stats()["leases"] == 0
    assert cache.check_integrity() == []


def test_a_disk_that_is_too_slow_is_not_waited_for(
    cache: Cache, disk: Disk, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, KEYS)
    cache.settle()
    forget_host(cache)
    assert ask(cache).coming
    monkeypatch.setattr(below(cache), "poll", lambda: None)
    clock.now = PATIENCE_S / 2
    assert ask(cache).coming
    clock.now = PATIENCE_S + 1
    grant = ask(cache)
    assert (grant.coming, grant.stop) == (False, 0)
    assert disk.too_slow_s == [PATIENCE_S + 1]
    disk.on = False
    assert not ask(cache, who="next").coming  # who would have waited as long
    disk.on = True
    cache.release("next")
    monkeypatch.undo()
    cache.release("r")
    cache.settle()
    assert ask(cache, who="later").stop == 96
    cache.release("later")
    assert cache.stats()["leases"] == 0


def test_a_host_without_room_for_all_of_it_is_asked_once(disk: Disk, clock: Clock) -> None:
    cache = make(disk, clock, n_slots=4)
    put(cache, KEYS[:3])
    cache.settle()
    # The host never holds all six: the others are there from an earlier run.
    records = below(cache).disk.reserve(KEYS, 3, 6)
    below(cache).disk.publish(records[1], records[2], np.ones(3, np.uint64))
    for i, record, generation in zip(*(a.tolist() for a in records[:3]), strict=True):
        disk.records[record] = (KEYS[i], generation)
    forget_host(cache)
    assert ask(cache).coming
    grants = [ask(cache) for _ in range(3)]
    assert [g.coming for g in grants] == [False] * 3
    assert grants[0].stop == 64  # four slots


def test_a_disk_that_is_off_is_no_disk(cache: Cache, disk: Disk) -> None:
    put(cache, KEYS)
    cache.settle()
    forget_host(cache)
    disk.on = False
    assert ask(cache).stop == 0
    cache.release("r")
    put(cache, keys(seed=1))
    assert disk.begun == []


def test_a_request_that_ends_meanwhile_leaves_no_lease(cache: Cache, disk: Disk) -> None:
    put(cache, KEYS)
    cache.settle()
    forget_host(cache)
    assert ask(cache).coming
    assert cache.waits_for_disk
    cache.release("r")
    assert not cache.waits_for_disk
    cache.settle()
    stats = cache.stats()
    assert (stats["leases"], stats["pending"], stats["disk"]["leases"]) == (0, 0, 0)
    assert cache._tier.match(KEYS) == N  # it serves the next one


def test_a_reset_reaches_the_disk(cache: Cache, disk: Disk) -> None:
    put(cache, KEYS)
    cache.settle()
    put(cache, keys(seed=1))  # on its way down
    cache.drop("reset")
    cache.settle()
    assert disk.records == {}
    assert not ask(cache).coming
    assert cache.check_integrity() == []


def test_states_come_up_by_themselves(disk: Disk, clock: Clock) -> None:
    cache = make(disk, clock, groups=(FULL, STATE))
    states = keys(seed=9)
    put(cache, KEYS)
    put(cache, states, 1, [1, 3])
    cache.settle()
    forget_host(cache)
    wanted = [KEYS, states]
    assert cache.acquire("r", wanted, start=0, limit=96).coming
    assert {move.key for _, move in disk.begun} == {*KEYS[:4], states[3]}
    grant = cache.acquire("r", wanted, start=0, limit=96)
    assert (grant.stop, grant.from_disk) == (64, 64)
    cache.release("r")
    assert cache.stats()["leases"] == cache.stats()["disk"]["leases"] == 0


def test_room_in_pieces_is_made_whole(cache: Cache, disk: Disk) -> None:
    old, chain = keys(9, seed=1), keys(4)
    put(cache, old)
    cache.settle()
    disk.pieces = 3
    put(cache, chain)
    for _ in range(5):
        cache.settle()
    assert below(cache).match(chain, 0) == 4
    assert below(cache).match(old, 0) == 3  # two blocks for each try, from its end
    assert cache.stats()["disk"]["refused"] == 0


def test_room_that_cannot_be_made_is_not_asked_for_for_ever(cache: Cache, disk: Disk) -> None:
    chain = keys(4)
    disk.pieces = 10**6
    put(cache, chain)
    for _ in range(100):
        cache.settle()
    stats = cache.stats()
    assert (stats["disk"]["under_way"], stats["disk"]["refused"], stats["leases"]) == (0, 4, 0)
    assert below(cache).match(chain, 0) == 0
    assert cache.check_integrity() == []


def test_room_is_made_before_blocks_go_down(cache: Cache, disk: Disk) -> None:
    put(cache, keys(9, seed=1))
    cache.settle()
    disk.room = 1
    put(cache, keys(4))
    cache.settle()
    assert (below(cache).match(keys(4), 0), below(cache).match(keys(9, seed=1), 0)) == (4, 6)
    assert len(disk.records) == 10  # what went is gone there, too


def test_a_block_that_is_written_before_its_parent_waits_for_it(cache: Cache, disk: Disk) -> None:
    chain = keys(4)
    put(cache, chain[:2])
    disk.late = chain[1]
    put(cache, chain)
    cache.settle()
    assert below(cache).match(chain, 0) < 2
    disk.late = None
    cache.settle()
    assert below(cache).match(chain, 0) == 4
    assert cache.stats()["disk"]["under_way"] == 0
    assert cache.stats()["leases"] == 0
