"""The order "agents" over a real tier: prompts as they come, leases, failures, LRU in its place."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytest

from kvmem import events
from kvmem.cache import Cache
from kvmem.explain.replay import Forest, Prompt, play
from kvmem.policy import Agents, Keeper, Room, Tree
from kvmem.types import GroupShape
from tests.blocks import BLOCKS, chain


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def key_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def keys_of(prompt: Prompt) -> list[bytes]:
    """Numbers name a block and all before it where no two prompts differ before one."""
    parent, keys = b"", []
    for number in prompt.keys:
        parent = hashlib.sha256(parent + key_of(number)).digest()
        keys.append(parent)
    return keys


def conversations(n: int, turns: int, seed: int = 0, *, gap: float = 1.0) -> list[Prompt]:
    """Sessions that take turns, with a common head; now and then one begins anew from its head, or
    goes back to an earlier turn."""
    draw = random.Random(seed)
    fresh = 1000
    chains = [[0, 1, 2, 3] for _ in range(n)]
    past: list[list[list[int]]] = [[[0, 1, 2, 3]] for _ in range(n)]
    found = []
    for turn in range(turns):
        for i in range(n):
            if draw.random() < 0.1:
                chains[i] = list(draw.choice(past[i]))
            new = draw.randint(1, 6)
            chains[i] = chains[i] + list(range(fresh, fresh + new))
            fresh += new
            past[i].append(chains[i])
            at_s = gap * (turn * n + i)
            found.append(Prompt(at_s, chains[i], f"s{i}", "tool", at_s))
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


def cache_of(n_slots: int, clock: Clock, eviction: str = "agents") -> Cache:
    return Cache(n_slots, BLOCKS, eviction=eviction, clock=clock)


def turn(cache: Cache, request: str, keys: list[bytes], reply: list[bytes] | None = None) -> int:
    """One request in the connector's order, its reply stored on top; the blocks that it found."""
    grant = cache.acquire(request, [keys], start=0, limit=len(keys))
    if cache.keeping is not None:
        cache.keeping.used(request, keys)
    whole = keys + (reply or [])
    for stop in range(grant.n_blocks + 1, len(whole) + 4, 4):
        room = cache.reserve(request, 0, whole, range(min(stop, len(whole))))
        cache.publish(room.slots, room.generations, np.ones(len(room.slots), np.uint64))
        cache.hold(request, 0, whole, min(stop, len(whole)))
    if cache.keeping is not None:
        cache.keeping.replied(request, whole)
    cache.release(request)
    return grant.n_blocks


def sound(cache: Cache) -> None:
    assert cache.check_integrity() == []
    if cache.keeping is not None and not cache.keeping.off:
        room = cache.keeping.room
        assert room.used == sum(room.here)


def hits(prompts: list[Prompt], n_slots: int, eviction: str, clock: Clock) -> int:
    cache, found = cache_of(n_slots, clock, eviction), 0
    for i, prompt in enumerate(prompts):
        clock.now_s = prompt.at_s
        found += turn(cache, f"r{i}", keys_of(prompt))
        if i % 16 == 0:
            sound(cache)
    sound(cache)
    assert not cache.stats()["leases"]
    assert cache.keeping is None or not cache.keeping.off
    return found


# -- the tree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_that_grows_has_the_blocks_of_the_whole_one(seed: int) -> None:
    prompts = conversations(5, 8, seed)
    tree = Tree(1 << 20, lambda run: 1)
    for prompt in prompts:
        keys = keys_of(prompt)
        path = tree.path(keys)
        assert path is not None
        assert b"".join(bytes(tree.keys(run)) for run in path) == b"".join(keys)
        assert [tree.parents[run] for run in path] == [-1, *path[:-1]]
    forest = Forest([p.keys for p in prompts])
    assert tree.n_blocks == forest.n_distinct == sum(tree.sizes)
    assert tree.n_runs <= len(forest.sizes)


def as_they_come(prompts: list[Prompt], capacity: int) -> int:
    """Hits where the tree is known as far as it has grown."""
    tree = Tree(1 << 20, lambda run: 1)
    room = Room(tree, capacity)
    agents = Agents(room)
    tree.watch(agents)
    found = 0
    for prompt in prompts:
        path = tree.path(keys_of(prompt))
        assert path is not None
        n = room.hits(path)
        room.fill(path, prompt.at_s)
        agents.used(path, n, prompt.at_s)
        agents.make_room(prompt.at_s)
        found += n
        assert room.used <= capacity
        for one in agents.rooms:
            assert one.used == sum(one.here)
            assert all(one.here[run] for run in one.leaves)
    return found


@pytest.mark.parametrize("capacity", [30, 60, 120])
def test_prompts_as_they_come_are_kept_as_in_a_replay_of_them_all(capacity: int) -> None:
    """Runs are cut elsewhere, so single blocks go otherwise; in all it is the same."""
    ours = wanted = 0
    for seed in range(5):
        prompts = conversations(6, 20, seed)
        ours += as_they_come(prompts, capacity)
        wanted += play(prompts, Forest([p.keys for p in prompts]), "kvmem", capacity).hit
    assert abs(ours - wanted) < 0.02 * wanted


def test_what_is_in_no_room_is_forgotten_and_the_tree_keeps_its_bound() -> None:
    tree = Tree(400, lambda run: 0)
    gone: list[int] = []

    class Watcher:
        def added(self, run: int) -> None: ...
        def split(self, run: int, upper: int) -> None: ...
        def removed(self, run: int) -> None:
            gone.append(run)

    tree.watch(Watcher())
    for i in range(500):
        tree.path(chain(f"p{i}", 20))
        assert tree.n_blocks <= 800
        assert tree.n_blocks == sum(tree.sizes)
    assert len(gone) > 400
    kept = Tree(400, lambda run: 3)  # of each run three blocks are in some room
    for i in range(500):
        kept.path(chain(f"p{i}", 20))
        assert kept.n_blocks <= 800
        assert kept.n_blocks == sum(kept.sizes)


# -- over a tier ---------------------------------------------------------------------------------


def test_sessions_that_take_turns_are_kept_whole_and_lru_keeps_none(clock: Clock) -> None:
    prompts = conversations(8, 40, seed=1)
    n_slots = Forest([p.keys for p in prompts]).n_distinct // 4
    agents, lru = (hits(prompts, n_slots, order, Clock()) for order in ("agents", "lru"))
    wanted = play(prompts, Forest([p.keys for p in prompts]), "kvmem", n_slots).hit
    assert agents > 1.3 * lru
    assert agents > 0.9 * wanted


def test_a_leased_prompt_stays_whatever_the_policy_says(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(40, clock)
    held = chain("held", 20)
    turn(cache, "first", held)
    grant = cache.acquire("holder", [held], start=0, limit=20)
    assert cache.keeping is not None
    real = Keeper.worths

    def held_is_worth_least(self: Keeper, now_s: float) -> Any:
        runs, worths = real(self, now_s)
        return runs, np.where(runs == runs[0], -1.0, worths)

    monkeypatch.setattr(Keeper, "worths", held_is_worth_least)
    for i in range(20):
        clock.now_s += 1.0
        turn(cache, f"r{i}", chain(f"p{i}", 8))
        assert cache.match([held], 0, 20) == 20  # I3
        sound(cache)
    assert grant.n_blocks == 20
    cache.release("holder")
    turn(cache, "last", chain("last", 30))
    sound(cache)


def test_what_a_failing_policy_costs_is_lru_and_one_event(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = conversations(6, 12, seed=2)
    cache, plain = cache_of(60, clock), cache_of(60, clock, "lru")
    told: list[events.Event] = []
    cache.bus.subscribe(told.append)

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Agents, "trim", broken)
    got = []
    for i, prompt in enumerate(prompts):
        clock.now_s = prompt.at_s
        got.append(tuple(turn(one, f"r{i}", keys_of(prompt)) for one in (cache, plain)))
    assert all(ours == theirs for ours, theirs in got)
    off = [one for one in told if isinstance(one, events.PolicyOff)]
    assert [one.error for one in off] == ["RuntimeError: broken on purpose"]
    assert cache.stats()["policy"]["leads"] == "lru"
    assert cache.check_integrity() == []


def test_while_lru_leads_the_tier_evicts_by_itself_and_the_table_is_put_right(
    clock: Clock,
) -> None:
    cache = cache_of(60, clock)
    assert cache.keeping is not None
    duel = cache.keeping.agents.duel
    prompts = conversations(6, 30, seed=3)
    for i, prompt in enumerate(prompts):
        clock.now_s = prompt.at_s
        if i == 60:
            duel._lead = -1e6
        if i == 120:
            duel._lead = 1e9
        turn(cache, f"r{i}", keys_of(prompt))
        if i == 61:
            cut = cache.keeping.room.n_cut
            assert (cache.keeping.leads, cut > 0) == ("lru", True)
        if i == 119:
            assert cache.keeping.room.n_cut == cut
    assert cache.stats()["policy"]["switches"] >= 2
    assert cache.keeping.room.n_cut > cut
    room = cache.keeping.room
    cache.keeping.dropped()  # puts right what is still off
    assert abs(room.used - cache.stats()["published"]) <= 60 // 16
    sound(cache)


def test_blocks_of_unknown_prompts_do_not_crowd_out_the_known(clock: Clock) -> None:
    cache = cache_of(64, clock)
    strangers = chain("stranger", 60)
    room = cache.reserve("s", 0, strangers, range(60))
    cache.publish(room.slots, room.generations, np.ones(60, np.uint64))
    for i in range(40):
        clock.now_s += 1.0
        turn(cache, f"r{i}", chain(f"p{i % 4}", 12))
        sound(cache)
    assert [cache.match([chain(f"p{i}", 12)], 0, 12) for i in range(4)] == [12] * 4


def test_models_with_windows_are_told_that_it_is_off() -> None:
    told: list[events.Event] = []
    bus = events.Bus()
    bus.subscribe(told.append)
    cache = Cache(64, (GroupShape(16), GroupShape(16, 39)), eviction="agents", bus=bus)
    assert cache.stats()["policy"]["off"]
    assert [type(one) for one in told] == [events.PolicyOff]


def test_after_a_reset_nothing_of_the_old_is_counted(clock: Clock) -> None:
    cache = cache_of(64, clock)
    turn(cache, "a", chain("a", 20))
    cache.drop("reset")
    assert cache.keeping is not None
    assert cache.keeping.room.used == 0
    assert turn(cache, "b", chain("a", 20)) == 0
    assert turn(cache, "c", chain("a", 20)) == 20
    sound(cache)


def test_what_is_a_branchs_own_ends_where_another_one_goes_on(clock: Clock) -> None:
    cache = cache_of(64, clock)
    keeping = cache.keeping
    assert keeping is not None
    shared = chain(0, 4)
    refs = [keeping.used(f"r{i}", [*shared, *chain(i, 3)]) for i in (1, 2)]
    inner = keeping.used("r3", [*shared, *chain(1, 3)[:2]])
    assert None not in (*refs, inner)
    own = [keeping.n_own(ref) for ref in refs if ref is not None]
    assert own == [1, 3]  # of the first one another branch ends before its last block
