"""What the host tier matches, holds and refuses; each fact under every eviction order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvmem._core import HostTier, eviction_orders
from tests.blocks import chain, put, sound


@pytest.fixture(params=eviction_orders())
def order(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tier(order: str) -> HostTier:
    return HostTier(10, order)


# --- matching ---


@pytest.mark.parametrize("cached", range(9))
@pytest.mark.parametrize("hint", range(9))
def test_match_is_the_longest_published_prefix_whatever_the_hint(cached: int, hint: int) -> None:
    tier, keys = HostTier(10, "lru"), chain("a", 8)
    put(tier, keys[:cached])
    assert tier.match(keys, hint) == cached


def test_list_bytes_and_array_keys_match_alike(tier: HostTier) -> None:
    keys = chain("a", 6)
    put(tier, keys[:4])
    packed = b"".join(keys)
    flat = np.frombuffer(packed, np.uint8)
    assert [tier.match(k) for k in (keys, packed, flat, flat.reshape(6, 32))] == [4] * 4


def test_a_prompt_that_forks_matches_up_to_the_fork(tier: HostTier) -> None:
    shared = chain("system", 3)
    put(tier, shared + chain("a", 3, shared[-1]))
    assert tier.match(shared + chain("b", 3, shared[-1])) == 3


def test_no_keys_match_nothing(tier: HostTier) -> None:
    assert tier.match([]) == 0


def test_match_is_no_use_of_the_blocks() -> None:
    tier = HostTier(2, "lru")
    old, new = chain("old", 1), chain("new", 1)
    put(tier, old)
    put(tier, new)
    tier.match(old)
    put(tier, chain("c", 1))
    assert tier.why(old[0]) == "evicted"


def test_match_looks_at_few_keys_of_a_long_list() -> None:
    keys: list = chain("a", 840)
    tier = HostTier(1000, "lru")
    put(tier, keys[:800])
    looked_at = 0
    for i in range(840):
        trial = [*keys[:i], None, *keys[i + 1 :]]
        try:
            tier.match(trial)
        except TypeError:
            looked_at += 1
    assert looked_at <= 12


# --- reserve, publish, abandon ---


def test_pending_block_is_never_matched(tier: HostTier) -> None:
    keys = chain("a", 3)
    tier.reserve(keys, 0, 3)
    assert (tier.match(keys), tier.why(keys[0])) == (0, "pending")
    assert tier.acquire(keys, 0, 3)[:2] == (0, 0)


def test_reserve_skips_what_is_here(tier: HostTier) -> None:
    keys = chain("a", 5)
    put(tier, keys[:2])
    tier.reserve(keys, 2, 3)
    index, slots, generations, reason = tier.reserve(keys, 0, 5)
    assert (index.tolist(), reason) == ([3, 4], "")
    assert (index.dtype, slots.dtype, generations.dtype) == (np.int32, np.int32, np.uint64)
    assert len(set(slots.tolist())) == 2


def test_reserve_without_its_parent_says_no_parent(tier: HostTier) -> None:
    index, _, _, reason = tier.reserve(chain("a", 5), 2, 5)
    assert (len(index), reason) == (0, "no_parent")


def test_reserve_below_another_chain_says_no_parent(tier: HostTier) -> None:
    a, b = chain("a", 2), chain("b", 2)
    put(tier, a)
    put(tier, b)
    assert tier.reserve([a[0], b[1]], 1, 2)[3] == "no_parent"


def test_block_published_before_its_parent_is_abandoned(tier: HostTier) -> None:
    keys = chain("a", 2)
    _, slots, generations, _ = tier.reserve(keys, 0, 2)
    assert tier.publish(slots[1:], generations[1:], generations[1:]) == 0
    assert tier.publish(slots[:1], generations[:1], generations[:1]) == 1
    assert (tier.match(keys), tier.stats()["free"]) == (1, 9)


def test_abandoned_slots_are_free_again(tier: HostTier) -> None:
    _, slots, generations, _ = tier.reserve(chain("a", 4), 0, 4)
    assert tier.abandon(slots, generations) == 4
    assert tier.stats()["free"] == 10
    assert tier.why(chain("a", 4)[3]) == "abandoned"


def test_abandon_keeps_another_writers_slot_until_it_reports(tier: HostTier) -> None:
    keys = chain("a", 4)
    _, slots, generations, _ = tier.reserve(keys, 0, 2)
    _, below, below_generations, _ = tier.reserve(keys, 2, 4)
    assert tier.abandon(slots, generations) == 2
    stats = tier.stats()
    assert (stats["free"], stats["orphaned"], stats["pending"]) == (8, 2, 0)
    # I3: its writer may still be writing, so the slot is nobody else's until the report.
    taken = tier.reserve(chain("b", 10), 0, 10)[1]
    assert not set(taken.tolist()) & set(below.tolist())
    assert tier.publish(below, below_generations, below_generations) == 0
    assert tier.stats()["orphaned"] == 0


def test_stale_generation_changes_nothing() -> None:
    tier = HostTier(1, "lru")
    a, b = chain("a", 1), chain("b", 1)
    _, slots, old, _ = tier.reserve(a, 0, 1)
    tier.abandon(slots, old)
    _, slots, new, _ = tier.reserve(b, 0, 1)
    assert (int(old[0]), int(new[0])) == (1, 2)
    assert tier.publish(slots, old, old) == 0
    assert tier.abandon(slots, old) == 0
    assert tier.quarantine(int(slots[0]), int(old[0])) == 0
    assert tier.publish(slots, new, new) == 1
    with pytest.raises(ValueError, match="no published block of generation 1"):
        tier.checksum(int(slots[0]), 1)


def test_publishing_twice_counts_once(tier: HostTier) -> None:
    keys = chain("a", 2)
    _, slots, generations, _ = tier.reserve(keys, 0, 2)
    assert tier.publish(slots, generations, generations) == 2
    assert tier.publish(slots, generations, generations) == 0
    assert tier.abandon(slots, generations) == 0
    assert tier.match(keys) == 2


def test_checksum_is_the_one_given_at_publish(tier: HostTier) -> None:
    _, slots, generations, _ = tier.reserve(chain("a", 2), 0, 2)
    tier.publish(slots, generations, np.array([7, 2**64 - 1], np.uint64))
    assert tier.checksum(int(slots[1]), 1) == 2**64 - 1


# --- leases ---


def test_leased_block_and_its_ancestors_are_never_evicted(tier: HostTier) -> None:
    a = chain("a", 6)
    put(tier, a)
    lease, n, slots, generations = tier.acquire(a, 2, 5)
    assert (n, len(slots), generations.tolist()) == (5, 3, [1, 1, 1])
    assert put(tier, chain("b", 20)) == 5  # four free slots and a's last block
    assert tier.match(a) == 5
    tier.release(lease)
    assert put(tier, chain("c", 9)) == 9
    assert sound(tier)


def test_acquire_with_nothing_beyond_start_leases_nothing(tier: HostTier) -> None:
    a = chain("a", 6)
    put(tier, a[:3])
    lease, n, slots, generations = tier.acquire(a, 3, 6)
    assert (lease, n, len(slots), len(generations)) == (0, 3, 0, 0)
    assert tier.acquire(a, 5, 6)[:2] == (0, 3)
    assert tier.stats()["leases"] == 0


def test_acquired_slots_are_those_reserved(tier: HostTier) -> None:
    a = chain("a", 5)
    _, slots, generations, _ = tier.reserve(a, 0, 5)
    tier.publish(slots, generations, generations)
    lease, _, got, got_generations = tier.acquire(a, 1, 4)
    assert got.tolist() == slots[1:4].tolist()
    assert got_generations.tolist() == generations[1:4].tolist()
    tier.release(lease)


def test_keys_that_are_no_chain_are_no_hit(tier: HostTier) -> None:
    a, b = chain("a", 3), chain("b", 3)
    put(tier, a)
    put(tier, b)
    assert tier.acquire([a[0], b[1], a[2]], 0, 3)[:2] == (0, 0)


def test_released_lease_is_refused(tier: HostTier) -> None:
    put(tier, chain("a", 1))
    lease = tier.acquire(chain("a", 1), 0, 1)[0]
    tier.release(lease)
    with pytest.raises(ValueError, match=f"lease {lease} is unknown"):
        tier.release(lease)
    with pytest.raises(ValueError, match=f"lease {lease} is unknown"):
        tier.extend(lease, chain("a", 1), 1)


def test_block_with_two_leases_stays_until_both_end(tier: HostTier) -> None:
    a = chain("a", 5)
    put(tier, a)
    first, second = tier.acquire(a, 0, 5)[0], tier.acquire(a, 0, 5)[0]
    tier.release(first)
    put(tier, chain("b", 10))
    assert tier.match(a) == 5
    tier.release(second)
    put(tier, chain("c", 10))
    assert tier.match(a) < 5


def test_extended_lease_holds_the_deeper_blocks(tier: HostTier) -> None:
    a = chain("a", 8)
    put(tier, a[:3])
    lease = tier.acquire(a, 0, 8)[0]
    put(tier, a[:6])
    tier.extend(lease, a, 8)
    put(tier, chain("b", 10))
    assert tier.match(a) == 6
    tier.release(lease)
    assert sound(tier)


def test_extend_never_moves_a_lease_up(tier: HostTier) -> None:
    a = chain("a", 5)
    put(tier, a)
    lease = tier.acquire(a, 0, 5)[0]
    tier.extend(lease, a, 2)
    put(tier, chain("b", 10))
    assert tier.match(a) == 5
    tier.release(lease)


def test_extend_along_another_prompt_is_refused(tier: HostTier) -> None:
    a, b = chain("a", 3), chain("b", 5)
    put(tier, a)
    put(tier, b)
    lease = tier.acquire(a, 0, 3)[0]
    with pytest.raises(ValueError, match="not among these keys"):
        tier.extend(lease, b, 5)
    tier.release(lease)


# --- quarantine and clear ---


def test_quarantine_takes_the_block_and_all_below_it(tier: HostTier) -> None:
    shared = chain("s", 3)
    a, b = shared + chain("a", 2, shared[-1]), shared + chain("b", 2, shared[-1])
    put(tier, a)
    put(tier, b)
    lease, _, slots, generations = tier.acquire(a, 0, 3)
    tier.release(lease)
    assert tier.quarantine(int(slots[1]), int(generations[1])) == 6
    assert (tier.match(a), tier.match(b), tier.why(b[4])) == (1, 1, "quarantined")
    assert tier.stats()["free"] == 9
    assert sound(tier)


def test_quarantine_leaf_by_leaf_ends_where_one_of_the_root_does(order: str) -> None:
    shared = chain("s", 2)
    a, b = shared + chain("a", 3, shared[-1]), shared + chain("b", 2, shared[-1])
    ends = []
    for depths in ([5, 4, 3], [3]):
        tier = HostTier(10, order)
        put(tier, a)
        put(tier, b)
        _, _, slots, generations = tier.acquire(a, 0, 5)
        taken = [tier.quarantine(int(slots[d - 1]), int(generations[d - 1])) for d in depths]
        assert sum(taken) == 3
        assert sound(tier)
        stats = tier.stats()
        assert (stats["condemned"], stats["published"]) == (3, 4)
        ends.append((stats, [tier.why(key) for key in a + b], tier.match(a), tier.match(b)))
    assert ends[0] == ends[1]


def kept(tier: HostTier) -> list[int]:
    return tier.kept()[0].tolist()


def fail(tier: HostTier, keys: list[bytes], at: int) -> int:
    """Quarantines a block of a published prompt; the answer is its slot."""
    lease, _, slots, generations = tier.acquire(keys, 0, len(keys))
    tier.release(lease)
    assert tier.quarantine(int(slots[at]), int(generations[at])) == len(keys) - at
    return int(slots[at])


def test_a_block_that_failed_keeps_its_slot_and_those_below_it_do_not(order: str) -> None:
    tier, a = HostTier(10, order, keep=2), chain("a", 4)
    put(tier, a)
    slot = fail(tier, a, 1)
    stats = tier.stats()
    assert (kept(tier), stats["kept"], stats["free"], stats["published"]) == ([slot], 1, 8, 1)
    assert (tier.match(a), tier.why(a[1])) == (1, "quarantined")
    put(tier, a)  # the same keys, in other slots
    assert kept(tier) == [slot]
    assert slot not in tier.acquire(a, 0, 4)[2].tolist()
    assert sound(tier)


def test_the_oldest_of_those_kept_goes_at_the_bound(order: str) -> None:
    tier = HostTier(10, order, keep=2)
    slots = []
    for name in "abc":
        put(tier, chain(name, 1))
        slots.append(fail(tier, chain(name, 1), 0))
    assert kept(tier) == slots[1:]
    assert tier.stats()["free"] == 8
    assert sound(tier)


def test_what_is_kept_goes_before_a_block_is_refused_and_not_before_one_can_leave(
    order: str,
) -> None:
    tier, a, b = HostTier(4, order, keep=2), chain("a", 1), chain("b", 3)
    put(tier, a)
    slot = fail(tier, a, 0)
    assert put(tier, b) == 3  # the tier is full
    assert put(tier, chain("c", 1)) == 1  # a leaf of b left for it
    assert (kept(tier), tier.match(b)) == ([slot], 2)
    for prompt in (b[:2], chain("c", 1)):  # from here on nothing can leave
        tier.acquire(prompt, 0, len(prompt))
    _, slots, _, reason = tier.reserve(chain("d", 2), 0, 2)
    assert (slots.tolist(), kept(tier), reason) == ([slot], [], "no_room")
    assert sound(tier)


def test_a_leased_block_that_failed_is_kept_when_its_leases_end(order: str) -> None:
    tier, a = HostTier(10, order, keep=2), chain("a", 3)
    put(tier, a)
    lease, _, slots, generations = tier.acquire(a, 0, 3)
    tier.quarantine(int(slots[1]), int(generations[1]))
    assert (kept(tier), tier.stats()["kept"]) == ([int(slots[1])], 0)  # its bytes are there
    tier.release(lease)
    assert (kept(tier), tier.stats()["kept"]) == ([int(slots[1])], 1)
    assert tier.checksum(int(slots[1]), int(generations[1])) == int(generations[1])
    assert sound(tier)


def test_what_is_kept_stays_over_a_clear_and_answers_nobody(order: str) -> None:
    tier, a = HostTier(10, order, keep=2), chain("a", 3)
    put(tier, a)
    slot = fail(tier, a, 2)
    tier.clear()
    assert (kept(tier), tier.match(a), tier.stats()["free"]) == ([slot], 0, 9)
    generation = tier.kept()[1]
    assert tier.quarantine(slot, int(generation[0])) == 0
    assert tier.publish(np.array([slot], np.int32), generation, generation) == 0
    assert tier.abandon(np.array([slot], np.int32), generation) == 0
    assert sound(tier)


def test_a_block_that_is_being_written_is_not_kept(order: str) -> None:
    tier, a = HostTier(10, order, keep=2), chain("a", 1)
    _, slots, generations, _ = tier.reserve(a, 0, 1)
    tier.quarantine(int(slots[0]), int(generations[0]))
    tier.publish(slots, generations, generations)
    assert (kept(tier), tier.stats()["free"]) == ([], 10)


@pytest.mark.parametrize("keep", [-1, 11])
def test_no_more_are_kept_than_there_are_slots(keep: int) -> None:
    with pytest.raises(ValueError, match="keep must be within"):
        HostTier(10, "lru", keep)


def test_quarantine_of_a_reserved_leaf_leaves_its_siblings(tier: HostTier) -> None:
    a = chain("a", 2)
    put(tier, a)
    _, slots, generations, _ = tier.reserve(a + chain("b", 1, a[-1]), 2, 3)
    _, others, other_generations, _ = tier.reserve(a + chain("c", 1, a[-1]), 2, 3)
    assert tier.quarantine(int(slots[0]), int(generations[0])) == 1
    assert tier.stats()["orphaned"] == 1
    assert tier.publish(slots, generations, generations) == 0
    assert tier.publish(others, other_generations, other_generations) == 1
    assert tier.match(a + chain("c", 1, a[-1])) == 3
    assert sound(tier)


def test_quarantined_key_can_be_stored_anew(tier: HostTier) -> None:
    a = chain("a", 3)
    put(tier, a)
    lease, _, slots, generations = tier.acquire(a, 0, 3)
    tier.quarantine(int(slots[0]), int(generations[0]))
    assert put(tier, a) == 3
    # The old slots are still being read under the lease: the new blocks are elsewhere (I3).
    again, _, new_slots, _ = tier.acquire(a, 0, 3)
    assert not set(slots.tolist()) & set(new_slots.tolist())
    tier.release(lease)
    assert (tier.match(a), tier.stats()["free"]) == (3, 7)
    tier.release(again)
    assert sound(tier)


def test_quarantined_block_under_lease_keeps_its_ancestors(tier: HostTier) -> None:
    a = chain("a", 5)
    put(tier, a)
    lease, _, slots, generations = tier.acquire(a, 0, 5)
    assert tier.quarantine(int(slots[3]), int(generations[3])) == 2
    put(tier, chain("b", 10))
    assert (tier.match(a), tier.stats()["condemned"]) == (3, 2)
    tier.release(lease)
    assert tier.stats()["condemned"] == 0
    assert put(tier, chain("c", 10)) == 10


def test_quarantine_orphans_what_is_being_written_below(tier: HostTier) -> None:
    a = chain("a", 4)
    put(tier, a[:2])
    _, slots, generations, _ = tier.reserve(a, 2, 4)
    lease, _, read, read_generations = tier.acquire(a, 0, 2)
    assert tier.quarantine(int(read[0]), int(read_generations[0])) == 4
    assert tier.publish(slots, generations, generations) == 0
    tier.release(lease)
    assert (tier.match(a), tier.stats()["free"]) == (0, 10)


def test_clear_takes_everything_out_of_matching(tier: HostTier) -> None:
    a = chain("a", 4)
    put(tier, a)
    assert tier.clear() == 4
    assert (tier.match(a), tier.why(a[0]), tier.stats()["free"]) == (0, "cleared", 10)
    assert put(tier, a) == 4


def test_clear_leaves_leased_slots_until_release(tier: HostTier) -> None:
    a = chain("a", 6)
    put(tier, a)
    lease, _, slots, generations = tier.acquire(a, 0, 4)
    tier.clear()
    stats = tier.stats()
    assert (stats["free"], stats["condemned"]) == (6, 4)
    taken = tier.reserve(chain("b", 10), 0, 10)[1]
    assert not set(taken.tolist()) & set(slots.tolist())
    assert tier.checksum(int(slots[0]), int(generations[0])) == 1
    tier.extend(lease, a, 6)
    tier.release(lease)
    assert tier.stats()["condemned"] == 0
    assert sound(tier)


def test_block_pending_at_clear_can_not_be_published(tier: HostTier) -> None:
    a = chain("a", 3)
    _, slots, generations, _ = tier.reserve(a, 0, 3)
    tier.clear()
    assert tier.stats()["free"] == 7
    assert tier.publish(slots, generations, generations) == 0
    assert (tier.match(a), tier.stats()["free"]) == (0, 10)


def test_key_cleared_while_pending_can_be_stored_by_another(tier: HostTier) -> None:
    a = chain("a", 3)
    _, slots, generations, _ = tier.reserve(a, 0, 3)
    tier.clear()
    assert put(tier, a) == 3
    assert tier.abandon(slots, generations) == 3
    assert tier.match(a) == 3


# --- bad input ---

I32 = np.zeros(4, np.int32)
U64 = np.zeros(4, np.uint64)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t, k: t.match(tuple(k)), TypeError, "keys must be a list .* not tuple"),
        (lambda t, k: t.match([*k[:1], 7]), TypeError, r"keys\[1\] must be bytes, not int"),
        (lambda t, k: t.match([b"x" * 16]), ValueError, r"keys\[0\] must have 32 bytes, not 16"),
        (lambda t, k: t.match(b"x" * 33), ValueError, r"n\*32 bytes, not 33"),
        (lambda t, k: t.match(np.zeros(32, np.int8)), TypeError, "keys must be .* not ndarray"),
        (lambda t, k: t.match(np.zeros(64, np.uint8)[::2]), TypeError, "contiguous"),
        (lambda t, k: t.match(np.zeros((1, 64), np.uint8)), ValueError, r"\[n, 32\]"),
        (lambda t, k: t.match(k, 5), ValueError, "start must be within 0..3"),
        (lambda t, k: t.match(k, -1), ValueError, "start must be within 0..3"),
        (lambda t, k: t.acquire(k, 0, -1), ValueError, "limit must not be negative"),
        (lambda t, k: t.reserve(k, 2, 1), ValueError, "start must be within 0..1"),
        (lambda t, k: t.reserve(k, 0, 4), ValueError, "stop must be within 0..3"),
        (lambda t, k: t.reserve([*k[:2], None], 0, 3), TypeError, r"keys\[2\] must be bytes"),
        (lambda t, k: t.why(b"short"), ValueError, "key must have 32 bytes, not 5"),
        (lambda t, k: t.publish(I32[:1], U64[:2], U64[:1]), ValueError, "generations has 2"),
        (lambda t, k: t.publish(I32[:1], U64[:1], U64[:2]), ValueError, "checksums has 2"),
        (lambda t, k: t.abandon(I32[::2], U64[::2]), TypeError, "incompatible"),
        (lambda t, k: t.abandon(U64, U64), TypeError, "incompatible"),
        (lambda t, k: HostTier(0, "lru"), ValueError, "n_slots must be within 1"),
        (lambda t, k: HostTier(2**40, "lru"), ValueError, "n_slots must be within 1"),
        (lambda t, k: HostTier(1, "fifo"), ValueError, "one of lru, s3fifo, not 'fifo'"),
    ],
)
def test_bad_input_is_named(
    call: Callable[[HostTier, Any], object], error: type[Exception], says: str
) -> None:
    tier = HostTier(4, "lru")
    keys = chain("a", 3)
    put(tier, keys[:1])
    with pytest.raises(error, match=says):
        call(tier, keys)
    assert sound(tier)
    assert tier.stats()["leases"] == tier.stats()["pending"] == 0


def test_slots_out_of_range_are_ignored(tier: HostTier) -> None:
    slots = np.array([-1, 10, 2**31 - 1], np.int32)
    assert tier.publish(slots, U64[:3], U64[:3]) == tier.abandon(slots, U64[:3]) == 0
    assert tier.quarantine(-1, 0) == tier.quarantine(10, 1) == 0


def test_acquire_that_meets_a_bad_key_leases_nothing(tier: HostTier) -> None:
    keys: list = chain("a", 4)
    put(tier, keys)
    with pytest.raises(TypeError, match=r"keys\[3\]"):
        tier.acquire([*keys[:3], 3], 0, 4)
    assert tier.stats()["leases"] == 0
