"""The verbs over several KV-cache groups: a prompt is resumed only where every group has all it
reads, and as far on as that."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmem import events
from kvmem.cache import Cache
from kvmem.types import GroupShape

FULL, WINDOW, STATE = GroupShape(16), GroupShape(16, 39), GroupShape(32, 1)
N_TOKENS = 160


def keys(group: int, n_tokens: int = N_TOKENS, seed: int = 0) -> list[bytes]:
    shape = (FULL, WINDOW, STATE)[group]
    n_blocks = n_tokens // shape.block_tokens
    return [hashlib.sha256(repr((group, seed, i)).encode()).digest() for i in range(n_blocks)]


CHAINS = [keys(group) for group in range(3)]


def put(cache: Cache, group: int, blocks: list[int], chain: list[bytes] | None = None) -> Any:
    """Stores blocks of a group; the answer is the room that they got."""
    room = cache.reserve("writer", group, chain or CHAINS[group], blocks)
    cache.publish(room.slots, room.generations, np.ones(len(room.slots), np.uint64))
    return room


@pytest.fixture
def cache() -> Cache:
    return Cache(64, (FULL, WINDOW, STATE))


def whole(cache: Cache) -> None:
    put(cache, 0, list(range(10)))
    put(cache, 1, list(range(10)))
    put(cache, 2, list(range(5)))


def ask(cache: Cache, start: int = 0, limit: int = N_TOKENS, who: str = "r") -> Any:
    return cache.acquire(who, CHAINS, start=start, limit=limit)


def test_only_what_is_read_after_the_resume_point_is_loaded(cache: Cache) -> None:
    whole(cache)
    grant = ask(cache)
    assert (grant.stop, grant.missing) == (160, "none")
    # All of it; the blocks with tokens [121, 160); the state after token 159.
    assert [(p.group, p.first, len(p.slots)) for p in grant.parts] == [
        (0, 0, 10), (1, 7, 3), (2, 4, 1),
    ]  # fmt: skip
    assert grant.n_blocks == 14


def test_what_the_engine_has_is_not_loaded_again(cache: Cache) -> None:
    whole(cache)
    grant = ask(cache, start=128)
    assert [(p.group, p.first, len(p.slots)) for p in grant.parts] == [
        (0, 8, 2), (1, 8, 2), (2, 4, 1),
    ]  # fmt: skip


def test_the_slots_are_those_of_the_blocks(cache: Cache) -> None:
    rooms = [put(cache, g, b) for g, b in ((0, [*range(10)]), (1, [7, 8, 9]), (2, [4]))]
    grant = ask(cache)
    for part, room in zip(grant.parts, rooms, strict=True):
        assert part.slots.tolist() == room.slots.tolist()
        assert part.generations.tolist() == room.generations.tolist()


def test_a_gap_in_the_window_moves_the_resume_point_before_it(cache: Cache) -> None:
    put(cache, 0, list(range(10)))
    put(cache, 1, [0, 1, 2, 3, 4, 5, 7, 8, 9])
    put(cache, 2, [0, 1, 2, 3, 4])
    # After 160 tokens blocks 7, 8 and 9 are read, after 128 block 6 too.
    assert ask(cache).stop == 160
    assert ask(cache, limit=159).stop == 96
    assert cache.acquire("r", CHAINS, start=0, limit=150).missing == "no_boundary"


def test_a_prompt_is_resumed_at_states_only(cache: Cache) -> None:
    put(cache, 0, list(range(10)))
    put(cache, 1, list(range(10)))
    put(cache, 2, [1])
    grant = ask(cache)
    assert (grant.stop, grant.missing) == (64, "no_boundary")


def test_without_a_resume_point_nothing_is_held(cache: Cache) -> None:
    put(cache, 0, list(range(10)))
    grant = ask(cache)
    assert (grant.stop, grant.parts, grant.missing) == (0, (), "no_boundary")
    assert cache.stats()["leases"] == 0


def test_the_leases_of_a_request_are_those_of_its_last_answer(cache: Cache) -> None:
    whole(cache)
    for _ in range(3):
        ask(cache)
    assert cache.stats()["leases"] == 1 + 3 + 1
    ask(cache, limit=64)
    assert cache.stats()["leases"] == 1 + 3 + 1
    cache.release("r")
    assert cache.stats()["leases"] == 0


def test_what_is_leased_is_not_evicted(cache: Cache) -> None:
    cache = Cache(14, (FULL, WINDOW, STATE))
    put(cache, 0, list(range(10)))
    put(cache, 1, [7, 8, 9])
    put(cache, 2, [4])
    ask(cache)
    other = keys(1, seed=1)
    room = cache.reserve("writer", 1, other, [0, 1])
    assert (len(room.slots), room.refused) == (0, 2)
    cache.release("r")
    assert len(cache.reserve("writer", 1, other, [0, 1]).slots) == 2


def test_blocks_by_themselves_are_stored_in_any_order_and_once(cache: Cache) -> None:
    assert put(cache, 1, [5, 9]).index.tolist() == [5, 9]
    assert put(cache, 1, [4, 5, 9]).index.tolist() == [4]


def test_a_chain_is_not_stored_above_what_is_missing(cache: Cache) -> None:
    room = put(cache, 0, [5, 6])  # and so all before them
    assert room.index.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_lost_block_of_a_window_takes_no_other_with_it(cache: Cache) -> None:
    whole(cache)
    (part,) = [p for p in ask(cache).parts if p.group == 1]
    slot, generation = int(part.slots[1]), int(part.generations[1])
    blocks = cache.quarantine(slot, generation, key=CHAINS[1][8], reason="checksum")
    assert blocks == 1
    cache.release("r")
    assert ask(cache).stop == 128
    assert cache.check_integrity() == []


def quarantined(cache: Cache, seed: int, reason: str = "checksum") -> int:
    """Stores a prompt of two blocks whose first then fails; the answer is its slot."""
    chain = keys(0, 32, seed)
    room = put(cache, 0, [0, 1], chain)
    slot, generation = int(room.slots[0]), int(room.generations[0])
    assert cache.quarantine(slot, generation, key=chain[0], reason=reason) == 2
    assert cache.quarantine(slot, generation, key=chain[0], reason="twice") == 0
    return slot


def test_blocks_that_failed_are_told_with_their_reasons_and_their_bytes_kept(cache: Cache) -> None:
    begin = time.time()
    slot = quarantined(cache, 7, "scrub")
    (told,) = cache.quarantined()
    assert (told.slot, told.key, told.reason) == (slot, keys(0, 32, 7)[0].hex(), "scrub")
    assert (told.blocks, told.kept) == (2, True)
    assert begin <= told.at_s <= time.time()
    assert cache.stats()["kept"] == 1
    assert cache.check_integrity() == []


def test_of_64_slots_4_are_kept_and_16_failures_told(cache: Cache) -> None:
    for seed in range(20):
        quarantined(cache, seed)
    told = cache.quarantined()
    assert [one.key for one in told] == [keys(0, 32, seed)[0].hex() for seed in range(4, 20)]
    assert [one.kept for one in told] == [False] * 12 + [True] * 4  # I7
    assert cache.stats()["kept"] == 4


def test_a_small_host_keeps_nothing_and_tells_it() -> None:
    small = Cache(15, (FULL,))
    quarantined(small, 1)
    assert [one.kept for one in small.quarantined()] == [False]
    assert small.stats()["free"] == 15


def test_a_use_is_counted_once_a_request_in_every_group() -> None:
    # With LRU a request that only asks keeps its blocks; one that asks thrice is no better.
    cache = Cache(15, (FULL, WINDOW, STATE), eviction="lru")
    put(cache, 0, list(range(10)))
    put(cache, 1, [7, 8, 9])
    put(cache, 2, [4])
    stranger = put(cache, 2, [0], keys(2, seed=2))
    assert len(stranger.slots) == 1
    ask(cache, start=160)  # the engine has it all; that is a use of ours
    cache.release("r")
    put(cache, 2, [0], keys(2, seed=3))
    assert ask(cache).stop == 160  # the stranger left, not what was used last


def test_refusals_are_told_once_with_their_number() -> None:
    seen: list[events.Event] = []
    bus = events.Bus()
    bus.subscribe(seen.append)
    cache = Cache(2, (FULL, WINDOW, STATE), bus=bus)
    cache.reserve("writer", 1, CHAINS[1], [0, 1, 2, 3])
    (refused,) = [e for e in seen if isinstance(e, events.Refused)]
    assert (refused.blocks, refused.reason) == (2, "no_room")


STORED = st.tuples(
    st.integers(0, 10),
    st.sets(st.integers(0, 9)),
    st.sets(st.integers(0, 4)),
)


@given(stored=STORED, start=st.sampled_from([0, 32, 64, 96]), limit=st.integers(0, N_TOKENS))
def test_the_resume_point_is_the_last_where_all_is_here(
    stored: tuple[int, set[int], set[int]], start: int, limit: int
) -> None:
    n_full, window, states = stored
    cache = Cache(64, (FULL, WINDOW, STATE))
    if n_full:
        put(cache, 0, list(range(n_full)))
    for group, blocks in ((1, window), (2, states)):
        if blocks:
            put(cache, group, sorted(blocks))

    def may(n: int) -> bool:
        read = range(max(start, n - 39) // 16, n // 16)
        return n <= n_full * 16 and set(read) <= window and n // 32 - 1 in states

    best = max((n for n in range(start + 32, limit + 1, 32) if may(n)), default=start)
    grant = cache.acquire("r", CHAINS, start=start, limit=limit)
    assert grant.stop == best
    assert (grant.parts == ()) == (best == start)
    assert cache.check_integrity() == []


@given(n_tokens=st.integers(0, N_TOKENS))
def test_with_one_chain_the_resume_point_is_its_longest_prefix(n_tokens: int) -> None:
    cache = Cache(64, (FULL,))
    cache.reserve("w", 0, CHAINS[0], [0])  # pending: never matched
    other = keys(0, seed=9)
    if n_tokens >= 16:
        put(cache, 0, list(range(n_tokens // 16)), other)
    grant = cache.acquire("r", [other], start=0, limit=N_TOKENS)
    assert grant.stop == n_tokens // 16 * 16
    assert grant.missing == ("none" if grant.stop == N_TOKENS else "new")
