"""The scheduler's half with the engine's own configuration, requests and hashes, without an engine.

Bad input is refused before any request; acknowledgements that get lost cost nothing but a copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from kvmem import events
from kvmem.config import Config
from kvmem.engines.vllm.page import RECENT
from kvmem.engines.vllm.proof import ProofDone
from kvmem.engines.vllm.scheduler import SchedulerHalf
from kvmem.engines.vllm.wire import MAP_FAILED, Acks, LoadDone, Orders, StoreDone
from kvmem.errors import ArenaInUse, CapacityError, ConfigError
from kvmem.store import set_switch
from kvmem.store.arena import Arena

BLOCK = 32
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def vllm_config(smollm2: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=smollm2,
        block_size=BLOCK,
        kv_transfer_config={
            "kv_connector": "KvmemConnector",
            "kv_connector_module_path": "kvmem.engines.vllm.connector",
            "kv_role": "kv_both",
        },
    )
    return args.create_engine_config()


@pytest.fixture(scope="module")
def kv_cache_config() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    layers = [f"layer.{i}" for i in range(30)]
    return KVCacheConfig(
        num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, spec)]
    )


@pytest.fixture
def half(vllm_config: Any, kv_cache_config: Any, arena_name: str) -> Iterator[SchedulerHalf]:
    # No worker writes its slots, and a scrub would find that.
    config = Config(host_gb=0.1, arena=arena_name, scrub_mb_s=0)
    half = SchedulerHalf(config, vllm_config, kv_cache_config)
    half.acknowledged(Acks(proofs=[ProofDone(0, "")]))  # nothing is promised before
    yield half
    half.close()


def request(request_id: str, n_tokens: int, seed: int = 0) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    return Request(
        request_id=request_id,
        prompt_token_ids=[1 + seed + i for i in range(n_tokens)],
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def step(half: SchedulerHalf, **tokens: int) -> Orders:
    """One step that schedules so many tokens for each request; blocks are numbered from 10."""
    output = SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        kv_connector_block_state=SimpleNamespace(
            get_block_ids=lambda request_id: (list(range(10, 90)),)
        ),
    )
    orders = half.orders(output)
    half.forget(half.sent_out())
    return orders


def done(orders: Orders, status: int = 0) -> Acks:
    return Acks(
        stores=[
            StoreDone(
                orders.sequence,
                [np.full(len(s.slots), status, np.uint8) for s in orders.stores],
                [np.ones(len(s.slots), np.uint64) for s in orders.stores],
                0.0,
            )
        ]
    )


def stored(half: SchedulerHalf, request_id: str, n_tokens: int, seed: int = 0) -> Any:
    """A request whose prompt is computed and stored; it is still running."""
    one = request(request_id, n_tokens, seed)
    half.on_new_request(one)
    assert half.match(one, 0) == (0, False)
    half.acknowledged(done(step(half, **{request_id: n_tokens})))
    return one


def finish(half: SchedulerHalf, one: Any) -> Any:
    from vllm.v1.request import RequestStatus

    one.status = RequestStatus.FINISHED_STOPPED
    return half.finished(one, (list(range(10, 90)),))


def test_a_stored_prompt_is_matched_up_to_its_last_token(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    again = request("b", 4 * BLOCK)
    half.on_new_request(again)
    assert half.match(again, 0) == (3 * BLOCK, True)  # one token must be computed


def test_asking_again_changes_nothing(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    again = request("b", 4 * BLOCK)
    half.on_new_request(again)
    answers = {half.match(again, 0) for _ in range(5)}
    assert answers == {(3 * BLOCK, True)}
    assert half.cache.stats()["leases"] == 1


def test_blocks_are_invisible_until_they_are_acknowledged(half: SchedulerHalf) -> None:
    one, two = request("a", 3 * BLOCK), request("b", 3 * BLOCK)
    for r in (one, two):
        half.on_new_request(r)
    half.match(one, 0)
    orders = step(half, a=3 * BLOCK)
    assert half.match(two, 0) == (0, False)  # I4
    half.acknowledged(done(orders))
    assert half.match(two, 0)[0] == 2 * BLOCK


def test_an_acknowledgement_that_is_lost_gives_its_slots_back(half: SchedulerHalf) -> None:
    one = request("a", 3 * BLOCK)
    half.on_new_request(one)
    half.match(one, 0)
    step(half, a=3 * BLOCK)  # never acknowledged
    assert half.cache.stats()["pending"] == 3
    stored(half, "b", 2 * BLOCK, seed=1000)
    assert half.cache.stats()["pending"] == 0
    assert half.cache.stats()["published"] == 2


def test_a_failed_copy_is_never_published(half: SchedulerHalf) -> None:
    one = request("a", 3 * BLOCK)
    half.on_new_request(one)
    half.match(one, 0)
    half.acknowledged(done(step(half, a=3 * BLOCK), status=255))
    stats = half.cache.stats()
    assert (stats["published"], stats["pending"]) == (0, 0)


def test_a_block_is_published_when_all_ranks_have_written_it(half: SchedulerHalf) -> None:
    half.ranks = 2
    one = request("a", 3 * BLOCK)
    half.on_new_request(one)
    half.match(one, 0)
    orders = step(half, a=3 * BLOCK)
    both = done(orders).aggregate(done(orders))
    assert isinstance(both, Acks)
    half.acknowledged(both)
    assert half.cache.stats()["published"] == 3

    two = request("b", 3 * BLOCK, seed=1000)
    half.on_new_request(two)
    half.match(two, 0)
    half.acknowledged(done(step(half, b=3 * BLOCK)))  # the other rank has not said so
    assert half.cache.stats()["published"] == 3
    assert half.cache.stats()["pending"] == 0


def test_a_block_that_one_rank_failed_to_write_is_not_published(half: SchedulerHalf) -> None:
    half.ranks = 2
    one = request("a", 3 * BLOCK)
    half.on_new_request(one)
    half.match(one, 0)
    orders = step(half, a=3 * BLOCK)
    failed = done(orders)
    failed.stores[0].statuses[0][2] = 255
    for both in (done(orders).aggregate(failed), failed.aggregate(done(orders))):
        assert isinstance(both, Acks)
        assert both.stores[0].statuses[0].tolist() == [0, 0, 255]
    half.acknowledged(both)
    assert half.cache.stats()["published"] == 2


def test_acknowledgements_of_several_steps_are_joined_step_by_step(half: SchedulerHalf) -> None:
    one = request("a", 3 * BLOCK)
    half.on_new_request(one)
    half.match(one, 0)
    first = step(half, a=BLOCK)
    one.num_computed_tokens = BLOCK
    second = step(half, a=2 * BLOCK)
    mine = Acks(done(second).stores, [LoadDone("x", 0, 1, 1, 0.0)], [("here", "e")])
    theirs = Acks([*done(first).stores, *done(second).stores], [LoadDone("x", 1, 1, 1, 0.0)])
    joined = mine.aggregate(theirs)
    assert isinstance(joined, Acks)
    assert [(s.sequence, s.ranks) for s in joined.stores] == [
        (first.sequence, 1), (second.sequence, 2),
    ]  # fmt: skip
    assert ([d.rank for d in joined.loads], joined.failures) == ([0, 1], [("here", "e")])


def test_a_failed_copy_takes_the_blocks_on_top_with_it(half: SchedulerHalf) -> None:
    one = request("a", 4 * BLOCK)
    half.on_new_request(one)
    half.match(one, 0)
    orders = step(half, a=4 * BLOCK)
    acks = done(orders)
    acks.stores[0].statuses[0][1] = 255
    half.acknowledged(acks)
    assert half.cache.stats()["published"] == 1
    assert half.cache.check_integrity() == []


def test_a_load_that_finds_a_broken_block_takes_it_out_of_matching(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 5 * BLOCK))
    again = request("b", 5 * BLOCK)
    half.on_new_request(again)
    n_tokens, _ = half.match(again, 0)
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(50, 60)),))
    half.allocated(again, blocks, n_tokens)  # type: ignore[arg-type]
    (load,) = step(half).loads
    (part,) = load.parts
    assert part.block_ids.tolist() == [50, 51, 52, 53]
    bad = (int(part.slots[2]), int(part.generations[2]), part.keys[64:96], 3)
    half.acknowledged(Acks(loads=[LoadDone("b", 0, 4, 0, 0.0, [bad])]))
    half.received(["b"])
    third = request("c", 5 * BLOCK)
    half.on_new_request(third)
    assert half.match(third, 0)[0] == 2 * BLOCK
    assert half.totals.quarantined == 3  # the block, and the two on top of it


def test_a_broken_promise_names_only_the_blocks_that_were_to_be_loaded(
    half: SchedulerHalf,
) -> None:
    finish(half, stored(half, "a", 5 * BLOCK))
    again = request("b", 5 * BLOCK)
    half.on_new_request(again)
    n_tokens, _ = half.match(
        again, 2 * BLOCK
    )  # two blocks are the engine's own, shared with others
    half.break_load(again, SimpleNamespace(get_block_ids=lambda: ([7, 8, 50, 51],)), n_tokens)  # type: ignore[arg-type]
    assert step(half).broken == [("b", [50, 51])]


def test_after_a_reset_nothing_is_stored_on_blocks_only_the_engine_has(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    half.reset()
    again = request("b", 6 * BLOCK)
    half.on_new_request(again)
    half.match(again, 4 * BLOCK)  # the engine kept blocks that are older than the reset
    assert not step(half, b=2 * BLOCK).stores


def test_after_a_reset_that_left_the_device_empty_everything_is_stored_again(
    half: SchedulerHalf,
) -> None:
    pool = SimpleNamespace(
        cached_block_hash_to_block={}, num_gpu_blocks=100, get_num_free_blocks=lambda: 99
    )
    half.bind(pool)  # type: ignore[arg-type]
    finish(half, stored(half, "a", 4 * BLOCK))
    half.reset()
    # Blocks on the device that kvmem has not: of a request that asked not to be stored, say.
    later = request("b", 6 * BLOCK)
    half.on_new_request(later)
    half.match(later, 4 * BLOCK)
    later.num_computed_tokens = 4 * BLOCK
    (store,) = step(half, b=2 * BLOCK).stores
    assert len(store.slots) == 6

    for change in (
        {"cached_block_hash_to_block": {"older": 1}},  # a request held it during the reset
        {"get_num_free_blocks": lambda: 98},  # a block that is full and cached only later
    ):
        half.bind(SimpleNamespace(**{**vars(pool), **change}))  # type: ignore[arg-type]
        half.reset()
        again = request("c", 6 * BLOCK)
        half.on_new_request(again)
        half.match(again, 4 * BLOCK)
        assert not step(half, c=2 * BLOCK).stores


def test_a_worker_that_cannot_map_is_promised_to_nobody_until_it_can(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    half.acknowledged(Acks(failures=[(MAP_FAILED, "OSError: too many open files")]))
    assert half.page.failures == 1
    again = request("b", 4 * BLOCK)
    half.on_new_request(again)
    assert half.match(again, 0) == (0, False)
    stored(half, "c", 2 * BLOCK, seed=1000)  # the worker stored something: it has it mapped
    assert half.match(again, 0) == (3 * BLOCK, True)


def test_a_clients_long_request_ids_do_not_burst_the_stats_page(half: SchedulerHalf) -> None:
    for i in range(RECENT + 1):
        finish(half, stored(half, f"{i}-" + "é" * 40_000, BLOCK, seed=100 * i))
    half.failed("somewhere", "x" * 100_000)
    half.write_stats()
    raw = Arena.read_stats(half.arena.path)
    assert raw is not None
    page = msgspec.msgpack.decode(raw)
    assert len(page["recent"]) == RECENT
    assert page["recent"][-1]["request_id"].startswith(f"{RECENT}-é")


def test_the_page_tells_of_leases_and_of_slots_that_are_being_written(half: SchedulerHalf) -> None:
    def held() -> tuple[int, int]:
        half.failed("somewhere", "so that the page is written now")
        half.write_stats()
        host = msgspec.msgpack.decode(Arena.read_stats(half.arena.path) or b"")["host"]
        return host["leased"], host["reserved"]

    one = request("a", 3 * BLOCK)
    half.on_new_request(one)
    half.match(one, 0)
    orders = step(half, a=3 * BLOCK)
    assert held() == (0, 3)
    half.acknowledged(done(orders))
    assert held() == (1, 0)
    half.reset()  # what a step is writing stays its slots' until it says so
    two = request("b", 3 * BLOCK, seed=1000)
    half.on_new_request(two)
    half.match(two, 0)
    orders = step(half, b=3 * BLOCK)
    half.cache.drop("again")
    assert held() == (1, 3)
    half.acknowledged(done(orders))
    finish(half, one)
    finish(half, two)
    assert held() == (0, 0)


def test_a_finished_request_holds_no_lease(half: SchedulerHalf) -> None:
    one = stored(half, "a", 4 * BLOCK)
    assert half.cache.stats()["leases"] == 1
    keep, told = finish(half, one)
    assert not keep
    assert told["kvmem"]["blocks_stored"] == 4
    assert half.cache.stats()["leases"] == 0


def test_a_request_aborted_while_it_loads_keeps_its_lease_until_the_load_is_over(
    half: SchedulerHalf,
) -> None:
    from vllm.v1.request import RequestStatus

    finish(half, stored(half, "a", 4 * BLOCK))
    again = request("b", 4 * BLOCK)
    half.on_new_request(again)
    n_tokens, _ = half.match(again, 0)
    half.allocated(again, SimpleNamespace(get_block_ids=lambda: (list(range(9)),)), n_tokens)  # type: ignore[arg-type]
    step(half)
    again.status = RequestStatus.FINISHED_ABORTED
    half.finished(again, ([],))
    assert half.cache.stats()["leases"] == 1  # I3: the worker still reads the slots
    half.received(["b"])
    assert half.cache.stats()["leases"] == 0


def test_what_was_reserved_before_a_reset_is_never_published(half: SchedulerHalf) -> None:
    one = request("a", 3 * BLOCK)
    half.on_new_request(one)
    half.match(one, 0)
    orders = step(half, a=3 * BLOCK)
    half.reset()
    half.acknowledged(done(orders))
    assert half.cache.stats()["published"] == 0
    assert not step(half, a=1).stores


def test_verification_checks_exactly_the_share_asked_for(half: SchedulerHalf) -> None:
    half.config = Config(verify_share=0.25)
    picked = [half.pick_verified(n) for n in (3, 1, 7, 5, 16, 8)]
    assert sum(int(p.sum()) for p in picked) == 40 // 4


# -- the scrub -----------------------------------------------------------------------------------


class Found:
    """Stands for a scrub that found something, or failed."""

    def __init__(self, *bad: tuple[int, int, bytes], error: str | None = None) -> None:
        self.bad, self.error, self.faults = list(bad), error, len(bad)

    def take(self) -> list[tuple[int, int, bytes]]:
        found, self.bad = self.bad, []
        return found

    def stats(self) -> dict[str, Any]:
        return {"bytes": 0, "blocks": 0, "passes": 0, "faults": self.faults, "on": False}

    def close(self) -> None:
        """Nothing to end."""


def test_what_the_scrub_found_is_promised_to_nobody(half: SchedulerHalf) -> None:
    one = stored(half, "a", 4 * BLOCK)
    finish(half, one)
    slots, generations, keys = half.cache.published(0, 100)
    at = next(i for i in range(4) if keys.tobytes()[32 * i :][:32] == one.block_hashes[1])
    key = bytes(one.block_hashes[1])
    half.scrub = Found((int(slots[at]), int(generations[at]), key))  # type: ignore[assignment]
    again = request("b", 4 * BLOCK)
    half.on_new_request(again)
    assert half.match(again, 0) == (BLOCK, True)
    assert half.totals.quarantined == 3
    half.page.touch()
    half.write_stats()
    page = msgspec.msgpack.decode(Arena.read_stats(half.arena.path) or b"")
    (told,) = page["quarantine"]
    assert (told["key"], told["reason"], told["kept"]) == (key.hex(), "scrub", True)
    assert page["scrub"]["faults"] == 1


def test_memory_that_was_seen_to_fail_is_verified_in_full(half: SchedulerHalf) -> None:
    half.config = Config(verify_share=0.0)
    assert half.pick_verified(5).tolist() == [0] * 5
    half.scrub = Found((0, 1, bytes(32)))  # type: ignore[assignment]
    assert half.pick_verified(5).tolist() == [1] * 5


def test_a_scrub_that_failed_is_told_once_and_costs_nothing_else(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    half.scrub = Found(error="OSError: x")  # type: ignore[assignment]
    for name in "bc":
        again = request(name, 4 * BLOCK)
        half.on_new_request(again)
        assert half.match(again, 0) == (3 * BLOCK, True)
    assert (half.page.failures, half.page.last_failure) == (1, "scrub: OSError: x")


def test_sixteen_failures_have_room_on_the_page(half: SchedulerHalf) -> None:
    for i in range(RECENT + 1):
        finish(half, stored(half, f"{i}-" + "é" * 40_000, BLOCK, seed=100 * i))
    slots, generations, _ = half.cache.published(0, 100)
    for slot, generation in zip(slots.tolist(), generations.tolist(), strict=True):
        half.cache.quarantine(slot, generation, key=b"\xff" * 32, reason="generation")
    half.failed("somewhere", "x" * 100_000)
    half.write_stats()
    page = msgspec.msgpack.decode(Arena.read_stats(half.arena.path) or b"")
    assert (len(page["quarantine"]), len(page["recent"])) == (16, RECENT)


# -- the live switch -----------------------------------------------------------------------------


def looked_up(half: SchedulerHalf, request_id: str, n_tokens: int, seed: int = 0) -> Any:
    """A new request, after its first lookup."""
    one = request(request_id, n_tokens, seed)
    half.on_new_request(one)
    half.match(one, 0)
    return one


def test_loads_switched_off_answer_nothing_from_the_next_lookup_on(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    again = looked_up(half, "b", 4 * BLOCK)
    set_switch(half.arena.path, loads=False)
    assert half.match(again, 0) == (0, False)
    told = finish(half, again)[1]["kvmem"]
    assert (told["miss"], told["off"]) == ("load_off", {"load": "switch"})
    assert told["tokens"]["host"] == 0

    set_switch(half.arena.path, loads=True)
    later = looked_up(half, "c", 4 * BLOCK)
    assert half.match(later, 0) == (3 * BLOCK, True)
    told = finish(half, later)[1]["kvmem"]
    assert told["miss"] == "none"
    assert "off" not in told


def test_a_load_that_was_granted_goes_out_after_loads_were_switched_off(
    half: SchedulerHalf,
) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    again = looked_up(half, "b", 4 * BLOCK)
    set_switch(half.arena.path, loads=False)
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(50, 60)),))
    half.allocated(again, blocks, 3 * BLOCK)  # type: ignore[arg-type]
    (load,) = step(half).loads
    assert load.block_ids == [50, 51, 52]
    half.received(["b"])
    assert finish(half, again)[1]["kvmem"]["tokens"]["host"] == 3 * BLOCK
    assert half.cache.stats()["leases"] == 0


def test_stores_switched_off_reserve_nothing(half: SchedulerHalf) -> None:
    set_switch(half.arena.path, stores=False)
    one = looked_up(half, "a", 4 * BLOCK)
    assert not step(half, a=4 * BLOCK).stores
    assert half.cache.stats()["pending"] == 0
    one.num_computed_tokens = 4 * BLOCK  # all of them, and none is stored
    keep, receipt = finish(half, one)
    assert not keep  # the engine gets its blocks back at once
    assert (receipt["kvmem"]["blocks_stored"], receipt["kvmem"]["off"]) == (0, {"store": "switch"})
    assert half.cache.check_integrity() == []


def test_stores_switched_off_leave_loads_as_they_were(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    set_switch(half.arena.path, stores=False)
    again = looked_up(half, "b", 4 * BLOCK)
    assert half.match(again, 0) == (3 * BLOCK, True)
    step(half, b=4 * BLOCK)
    finish(half, again)


def test_stores_switched_on_again_store_what_was_computed_meanwhile(half: SchedulerHalf) -> None:
    set_switch(half.arena.path, stores=False)
    one = looked_up(half, "a", 6 * BLOCK)
    assert not step(half, a=2 * BLOCK).stores
    one.num_computed_tokens = 2 * BLOCK
    set_switch(half.arena.path, stores=True)
    orders = step(half, a=4 * BLOCK)
    assert [len(store.slots) for store in orders.stores] == [6]
    half.acknowledged(done(orders))
    finish(half, one)
    assert half.match(looked_up(half, "b", 6 * BLOCK), 0) == (5 * BLOCK, True)


def test_blocks_kept_for_one_more_copy_are_let_go_when_stores_are_switched_off(
    half: SchedulerHalf,
) -> None:
    one = looked_up(half, "a", 4 * BLOCK)
    one.num_computed_tokens = 3 * BLOCK
    keep, _ = finish(half, one)
    assert keep
    set_switch(half.arena.path, stores=False)
    orders = step(half)
    assert orders.finished == ["a"]  # the engine waits for this word
    assert not orders.stores
    assert half.cache.stats()["pending"] == 0


def test_the_switch_allows_nothing_that_the_settings_or_the_request_forbid(
    half: SchedulerHalf,
) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    set_switch(half.arena.path, loads=True, stores=True)
    wish = request("b", 4 * BLOCK)
    wish.kv_transfer_params = {"kvmem": {"load": False}}
    half.config = Config(store=False)
    half.on_new_request(wish)
    assert half.match(wish, 0) == (0, False)
    assert not step(half, b=4 * BLOCK).stores
    told = finish(half, wish)[1]["kvmem"]
    assert told["off"] == {"load": "request", "store": "setting"}


def test_a_damaged_switch_changes_nothing_and_counts_as_one_failure(half: SchedulerHalf) -> None:
    finish(half, stored(half, "a", 4 * BLOCK))
    set_switch(half.arena.path, loads=False)
    one = looked_up(half, "b", 4 * BLOCK)
    at = half.arena.header.switch_offset
    half.arena.buffer[at + 4] ^= 1
    for _ in range(3):
        assert half.match(one, 0) == (0, False)  # still off
    assert half.page.failures == 1
    assert half.page.last_failure is not None
    assert half.page.last_failure.startswith("switch: ")
    set_switch(half.arena.path, loads=True, stores=True)
    assert half.match(one, 0) == (3 * BLOCK, True)


def test_a_change_of_the_switch_is_an_event(half: SchedulerHalf) -> None:
    set_switch(half.arena.path, loads=False)
    looked_up(half, "a", BLOCK)
    assert events.Switched(loads=False, stores=True) in half.bus.recent()


# -- bad input -----------------------------------------------------------------------------------


def test_a_budget_below_one_block_names_the_setting(vllm_config: Any, kv_cache_config: Any) -> None:
    with pytest.raises(CapacityError, match="host_gb") as error:
        SchedulerHalf(Config(host_gb=1e-5), vllm_config, kv_cache_config)
    assert error.value.setting == "host_gb"


def test_a_budget_above_the_machine_names_the_setting_and_leaves_nothing(
    vllm_config: Any, kv_cache_config: Any, arena_name: str
) -> None:
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(CapacityError, match="host_gb"):
        SchedulerHalf(Config(host_gb=1e6, arena=arena_name), vllm_config, kv_cache_config)
    assert set(Path("/dev/shm").iterdir()) <= before


def test_a_second_engine_on_an_arena_is_refused_and_the_first_goes_on(
    half: SchedulerHalf, vllm_config: Any, kv_cache_config: Any, arena_name: str
) -> None:
    with pytest.raises(ArenaInUse, match="arena") as error:
        SchedulerHalf(Config(host_gb=0.1, arena=arena_name), vllm_config, kv_cache_config)
    assert str(os.getpid()) in str(error.value)
    finish(half, stored(half, "a", 2 * BLOCK))
    assert half.cache.stats()["published"] == 2


def test_dummy_weights_need_a_name(vllm_config: Any, kv_cache_config: Any) -> None:
    real = vllm_config.load_config.load_format
    vllm_config.load_config.load_format = "dummy"
    try:
        with pytest.raises(ConfigError, match="weights_digest"):
            SchedulerHalf(Config(host_gb=0.1), vllm_config, kv_cache_config)
    finally:
        vllm_config.load_config.load_format = real


def test_closing_leaves_nothing(vllm_config: Any, kv_cache_config: Any, arena_name: str) -> None:
    half = SchedulerHalf(Config(host_gb=0.1, arena=arena_name), vllm_config, kv_cache_config)
    path = half.arena.path
    assert path.exists()
    half.close()
    assert not path.exists()


def test_a_start_removes_what_a_killed_engine_left(
    vllm_config: Any, kv_cache_config: Any, new_arena_name: Callable[[], str]
) -> None:
    dead = Arena.path_of(new_arena_name())
    dead.symlink_to("/proc/4194305/fd/7")  # above the kernel's highest pid
    half = SchedulerHalf(Config(host_gb=0.1, arena=new_arena_name()), vllm_config, kv_cache_config)
    assert dead in half.reclaimed
    assert not dead.is_symlink()
    half.close()
