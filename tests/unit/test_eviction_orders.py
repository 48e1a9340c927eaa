"""What leaves first: one suite over every order, then what each order is for."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from kvmem._core import HostTier, eviction_orders
from kvmem.cache import Cache
from tests.blocks import BLOCKS, chain, put, sound, turn, use

ORDERS = eviction_orders()


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tier(order: str) -> HostTier:
    return HostTier(10, order)


# --- eviction ---


def test_eviction_takes_leaves_first(tier: HostTier) -> None:
    a = chain("a", 10)
    put(tier, a)
    for n in range(1, 6):
        put(tier, chain("b", n))
        assert tier.match(a) == 10 - n
    assert sound(tier)


def test_evicted_block_is_never_served(tier: HostTier) -> None:
    a = chain("a", 10)
    put(tier, a)
    put(tier, chain("b", 4))
    lease, n, slots, _ = tier.acquire(a, 0, 10)
    assert (n, len(slots), tier.why(a[9])) == (6, 6, "evicted")
    tier.release(lease)


def test_reserve_never_evicts_its_own_ancestors(tier: HostTier) -> None:
    a = chain("a", 14)
    put(tier, a[:9])
    put(tier, chain("b", 1))
    index, _, _, reason = tier.reserve(a, 9, 14)
    assert (index.tolist(), reason) == ([9], "no_room")
    assert tier.match(a) == 9


def test_block_spared_by_a_failed_reserve_can_still_be_evicted() -> None:
    for order in ORDERS:
        tier = HostTier(3, order)
        a = chain("a", 4)
        put(tier, a[:3])
        assert tier.reserve(a, 3, 4)[3] == "no_room"
        assert put(tier, chain("b", 1)) == 1
        assert sound(tier)


def test_reserve_keeps_what_it_got_when_room_ends(tier: HostTier) -> None:
    keys = chain("a", 14)
    index, slots, generations, reason = tier.reserve(keys, 0, 14)
    assert (len(index), reason) == (10, "no_room")
    assert tier.publish(slots, generations, generations) == 10


def test_no_tier_passes_its_slots(tier: HostTier) -> None:
    for prompt in range(50):
        put(tier, chain(str(prompt), 1 + prompt % 10))
        stats = tier.stats()
        assert stats["free"] + stats["published"] == 10
    assert stats["evictions"] > 0


def test_why_tells_the_last_fate_of_a_key(tier: HostTier) -> None:
    a = chain("a", 1)
    assert tier.why(a[0]) == "unknown"
    put(tier, a)
    assert tier.why(a[0]) == "published"
    for i in range(10):
        put(tier, chain(f"b{i}", 1))
    assert tier.why(a[0]) == "evicted"
    put(tier, a)
    assert tier.why(a[0]) == "published"


def test_memory_of_evicted_keys_is_bounded() -> None:
    tier = HostTier(16, "lru")
    gone = [chain(str(i), 1)[0] for i in range(5000)]
    for key in gone:
        put(tier, [key])
    assert all(tier.why(key) == "evicted" for key in gone[-500:-16])
    assert [tier.why(key) for key in gone].count("evicted") <= 1024


def test_victims_cost_the_same_however_many_leaves_there_are(order: str) -> None:
    n, k = 100_000, 20_000
    tier = HostTier(n, order)
    keys = np.random.default_rng(1).bytes(32 * (n + k))
    for start, stop in ((0, n), (n, n + k)):
        began = time.thread_time()
        for i in range(start, stop):
            _, slots, generations, _ = tier.reserve(keys[32 * i : 32 * i + 32], 0, 1)
            tier.publish(slots, generations, generations)
        spent = time.thread_time() - began
    assert tier.stats()["evictions"] == k
    # A scan of all leaves for each victim would be 2 * 10^9 looks: tens of seconds.
    assert spent < 3.0


@pytest.mark.parametrize("n_slots", [1_000_000, 1400])
def test_index_takes_at_most_64_bytes_a_block_besides_the_key(order: str, n_slots: int) -> None:
    stats = HostTier(n_slots, order).stats()
    assert 32 < stats["bytes_per_block"] <= 54
    assert stats["bytes_per_block"] + stats["side_bytes_per_block"] <= 64


# --- a piece that somebody else chose ---


def test_a_cut_takes_the_end_of_a_piece_and_nothing_that_is_held(tier: HostTier) -> None:
    a = chain("a", 8)
    put(tier, a)
    present, slots = tier.cut(a[2:6], 9)
    assert (present, len(slots)) == (4, 0)  # blocks hang below it
    present, slots = tier.cut(a[5:], 2)
    assert (present, len(slots), tier.match(a)) == (3, 2, 6)
    assert [tier.why(key) for key in a[5:]] == ["published", "evicted", "evicted"]
    lease, *_ = tier.acquire(a, 0, 4, use=False)
    assert (len(tier.cut(a, 99)[1]), tier.match(a)) == (2, 4)  # I3
    tier.release(lease)
    assert (tier.free(), sound(tier)) == (6, True)
    assert (len(tier.cut(a, 99)[1]), tier.cut(a, 1)[0], tier.free()) == (4, 0, 10)
    assert sound(tier)


def test_keys_that_are_no_chain_cut_no_more_than_their_last(tier: HostTier) -> None:
    a, b = chain("a", 4), chain("b", 4)
    put(tier, a)
    put(tier, b)
    assert len(tier.cut([*a[:2], b[3]], 9)[1]) == 1
    assert (tier.match(a), tier.match(b), sound(tier)) == (4, 3, True)


def test_lru_knows_a_parent_whose_child_was_cut_by_the_childs_last_use() -> None:
    tier = HostTier(10, "lru")
    a, b = chain("a", 5), chain("b", 4)
    put(tier, b)
    put(tier, a)
    tier.cut(a, 1)
    put(tier, chain("c", 4))
    assert (tier.match(a), tier.match(b)) == (4, 2)


# --- LRU ---


class RecencyModel:
    """LRU as one would define it: every use stamps the block and all its ancestors."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.now = 0
        self.stamp: dict[bytes, int] = {}
        self.parent: dict[bytes, bytes | None] = {}
        self.leased: set[bytes] = set()

    def use(self, key: bytes | None) -> None:
        self.now += 1
        while key is not None:
            self.stamp[key] = self.now
            key = self.parent[key]

    def put(self, keys: list[bytes]) -> None:
        new = [i for i, key in enumerate(keys) if key not in self.stamp]
        held = {key for i, key in enumerate(keys) if not new or i < new[0]}
        for i in new[: self._room(len(new), held)]:
            self.parent[keys[i]] = keys[i - 1] if i else None
            self.use(keys[i])

    def _room(self, wanted: int, held: set[bytes]) -> int:
        got = 0
        while got < wanted:
            if len(self.stamp) + got < self.n_slots:
                got += 1
                continue
            above = {self.parent[key] for key in self.stamp}
            leaves = [k for k in self.stamp if k not in above | self.leased | held]
            if not leaves:
                break
            victim = min(leaves, key=self.stamp.__getitem__)
            del self.stamp[victim], self.parent[victim]
        return got


def test_lru_evicts_as_if_every_use_stamped_all_ancestors() -> None:
    rng = random.Random(5)
    shared = chain("s", 4)
    prompts = [shared[: i % 5] + chain(f"p{i}", 6, (b"", *shared)[i % 5]) for i in range(12)]
    tier, model = HostTier(30, "lru"), RecencyModel(30)
    leases: list[tuple[int, bytes]] = []
    universe = {key for prompt in prompts for key in prompt}
    for _ in range(4000):
        keys = rng.choice(prompts)
        keys = keys[: rng.randint(1, len(keys))]
        what = rng.random()
        if what < 0.45:
            put(tier, keys)
            model.put(keys)
        elif what < 0.9 or not leases:
            lease, n, _, _ = tier.acquire(keys, 0, len(keys))
            if n:
                model.use(keys[n - 1])
                leases.append((lease, keys[n - 1]))
                model.leased = {key for _, key in leases}
        if len(leases) > 4 or (leases and what > 0.8):
            lease, key = leases.pop(rng.randrange(len(leases)))
            tier.release(lease)
            model.leased = {held for _, held in leases}
            if key not in model.leased:
                model.use(key)
        assert {key for key in universe if tier.why(key) == "published"} == set(model.stamp)
    assert tier.stats()["evictions"] > 500


# --- S3-FIFO ---


def burst(tier: HostTier, name: str, prompts: int, blocks: int) -> None:
    for i in range(prompts):
        put(tier, chain(f"{name} {i}", blocks))


def survivors_of_a_burst(order: str) -> int:
    tier, agent = HostTier(210, order), chain("agent", 21)
    put(tier, agent)
    use(tier, agent)
    burst(tier, "one-off", 40, 21)
    assert sound(tier)
    return tier.match(agent)


def test_prompt_used_twice_survives_a_burst_that_empties_lru() -> None:
    assert survivors_of_a_burst("lru") == 0
    assert survivors_of_a_burst("s3fifo") == 21


@pytest.mark.parametrize("step", [1000, 4])
def test_prompt_used_twice_survives_a_burst_of_requests(step: int) -> None:
    survivors = {}
    for order in ("lru", "s3fifo"):
        cache, agent = Cache(210, BLOCKS, eviction=order), chain("agent", 21)
        found = [turn(cache, f"agent {i}", agent, step=step) for i in range(2)]
        assert found == [0, 21]
        for i in range(40):
            assert turn(cache, f"one-off {i}", chain(f"one-off {i}", 21), step=step) == 0
        assert cache.check_integrity() == []
        assert cache.stats()["leases"] == 0
        survivors[order] = cache.match([agent], 0, 21)
    assert survivors == {"lru": 0, "s3fifo": 21}


def prompts_outlived(asks: int) -> int:
    """How many prompts that are used twice it takes to push out one that is in the main queue and
    that one request asked for `asks` times."""
    cache, agents = Cache(40, BLOCKS), [chain(f"agent {i}", 4) for i in range(5)]
    for i, agent in enumerate(agents * 2):
        turn(cache, f"agent {i}", agent)
    for i in range(10):  # pressure moves the agents to the main queue
        turn(cache, f"one-off {i}", chain(f"one-off {i}", 4))
    turn(cache, "again", agents[0], asks=asks)
    for n in range(100):
        if cache.match([agents[0]], 0, 4) < 4:
            return n
        for i in range(2):
            turn(cache, f"other {n} {i}", chain(f"other {n}", 4))
    raise AssertionError("it never left")


def test_a_request_that_asks_again_uses_its_prompt_once() -> None:
    assert 5 < prompts_outlived(asks=1) == prompts_outlived(asks=5) < 50


def test_a_request_that_finds_blocks_only_later_uses_them() -> None:
    cache, agent = Cache(210, BLOCKS), chain("agent", 21)
    assert cache.acquire("waiting", [agent], start=0, limit=21).n_blocks == 0
    turn(cache, "first", agent)
    assert turn(cache, "waiting", agent) == 21
    for i in range(40):
        turn(cache, f"one-off {i}", chain(f"one-off {i}", 21))
    assert cache.match([agent], 0, 21) == 21


def test_a_request_that_asks_for_what_it_stored_itself_is_no_use() -> None:
    cache, once = Cache(210, BLOCKS), chain("once", 21)
    cache.acquire("once", [once], start=0, limit=21)
    room = cache.reserve("once", 0, once, range(21))
    cache.publish(room.slots, room.generations, room.generations)
    cache.hold("once", 0, once, 21)
    assert turn(cache, "once", once) == 21  # preempted, it comes again
    for i in range(40):
        turn(cache, f"one-off {i}", chain(f"one-off {i}", 21))
    assert cache.match([once], 0, 21) == 0


def test_one_off_prompt_does_not_survive_a_burst() -> None:
    tier, once = HostTier(210, "s3fifo"), chain("once", 21)
    put(tier, once)
    burst(tier, "one-off", 40, 21)
    assert tier.match(once) == 0


def test_prompt_stored_again_soon_after_eviction_survives_the_next_burst() -> None:
    tier, agent = HostTier(210, "s3fifo"), chain("agent", 21)
    put(tier, agent)
    burst(tier, "first", 11, 21)
    assert tier.match(agent) < 21
    put(tier, agent)
    burst(tier, "second", 40, 21)
    assert tier.match(agent) >= 20


def test_chunked_first_store_is_no_second_use() -> None:
    tier, once = HostTier(210, "s3fifo"), chain("once", 21)
    for stop in (7, 14, 21):
        put(tier, once[:stop])
    burst(tier, "one-off", 40, 21)
    assert tier.match(once) == 0


def test_shared_prefix_survives_its_one_off_branches() -> None:
    tier, system = HostTier(210, "s3fifo"), chain("system", 10)
    for i in range(60):
        use(tier, system)
        put(tier, system + chain(f"question {i}", 15, system[-1]))
    burst(tier, "one-off", 40, 21)
    assert tier.match(system) == 10


def test_new_agents_replace_old_ones() -> None:
    tier = HostTier(210, "s3fifo")
    for generation in range(4):
        agents = [chain(f"agent {generation} {i}", 10) for i in range(15)]
        for _ in range(5):
            for agent in agents:
                put(tier, agent)
                use(tier, agent)
    assert sum(tier.match(agent) == 10 for agent in agents) >= 13
