"""vLLM's two schedulers, pipelined as its engine core does, around both halves of the connector.

vLLM's CPU platform turns asynchronous scheduling off, so no real engine shows here what it does.
The forward looks at every position that attention would read; see `forward`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvmem import events
from kvmem.store.inspect import Inspected, inspect
from kvmem.store.scrub import Scrub
from tests.scheduling.engine import Engine, InjectedError, running
from tests.scheduling.forward import BLOCK, WrongKVError

pytestmark = pytest.mark.engine

WHOLE = 4  # blocks of PROMPT that can be loaded
PROMPT = list(range(1, WHOLE * BLOCK + 6))


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def engine(request: pytest.FixtureRequest, config: Any, arena_name: str) -> Iterator[Engine]:
    with running(config, asynchronous=request.param, arena=arena_name, n_host=40) as engine:
        yield engine


def stored(engine: Engine, prompt: list[int] = PROMPT, n_tokens: int = 1, **options: Any) -> Any:
    """The prompt is answered, and then only kvmem has it."""
    turn = engine.generate(prompt, n_tokens, **options)
    assert engine.forget_device()
    return turn


def in_flight(engine: Engine, prompt: list[int] = PROMPT, n_tokens: int = 1) -> str:
    """A request whose load is with the worker and not over."""
    engine.loads.hold = True
    one = engine.add(prompt, n_tokens)
    engine.step_until(lambda: engine.loads.held)
    assert engine.scheduler.requests[one].status.name == "WAITING_FOR_REMOTE_KVS"
    return one


def other(n_tokens: int, seed: int = 1) -> list[int]:
    return [100 + (seed * 37 + i) % 700 for i in range(n_tokens)]


# -- what is stored comes back -------------------------------------------------------------------


def test_a_prompt_comes_back_from_the_host_tier(engine: Engine) -> None:
    cold = stored(engine)
    assert cold.receipt["tokens"]["computed"] == len(PROMPT)
    restored = engine.generate(PROMPT)
    assert engine.half.totals.blocks_loaded == WHOLE
    assert restored.receipt["tokens"]["host"] == WHOLE * BLOCK
    assert restored.stats.num_external_cached_tokens == WHOLE * BLOCK
    engine.assert_settled()


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_last_complete_block_of_a_reply_comes_back(
    engine: Engine, over: int, eager: bool
) -> None:
    engine.eager = eager
    n = 2 * BLOCK - len(PROMPT) % BLOCK + 1 + over  # the last sampled token has no KV
    turn = stored(engine, PROMPT, n)
    whole = (len(PROMPT) + n - 1) // BLOCK
    assert whole == WHOLE + (1 if over < 0 else 2)
    # Only asynchronous scheduling learns of the last block's tokens too late to store it with the
    # step that computes it, and only where no step comes after that.
    assert engine.kept == (["r0"] if engine.asynchronous and over == 0 else [])
    following = engine.generate([*PROMPT, *turn.tokens, 3])
    assert engine.half.totals.blocks_loaded == whole
    assert following.receipt["tokens"]["host"] == whole * BLOCK
    engine.assert_settled()


def test_a_reply_that_stops_by_itself_is_stored_too(engine: Engine) -> None:
    """Its end is not foreseen: with asynchronous scheduling one more step is under way."""
    prompts = [other(n, seed) for n, seed in ((40, 5), (41, 6), (42, 7), (43, 8), (44, 9))]
    ended = 0
    for prompt in prompts:
        turn = stored(engine, prompt, 60, stop=True)
        ended += turn.finish_reason == "stop"
        whole = (len(prompt) + len(turn.tokens) - 1) // BLOCK
        again = engine.generate([*prompt, *turn.tokens, 3])
        assert again.receipt["tokens"]["host"] == whole * BLOCK
    assert ended >= 3
    engine.assert_settled()


def test_a_preempted_request_goes_on_from_the_host_tier(engine: Engine) -> None:
    prompts = [other(66, seed) for seed in range(4)]  # 4 * 8 blocks in the end, 18 there are
    ids = [engine.add(prompt, 60) for prompt in prompts]
    engine.drain()
    assert engine.preemptions > 0
    assert engine.half.totals.blocks_loaded > 0
    for i in ids:  # so what was loaded was loaded by requests that were preempted
        assert engine.turns[i].receipt["tokens"] == {
            "prompt": 66, "device": 0, "host": 0, "disk": 0, "far": 0, "computed": 66,
        }  # fmt: skip
    engine.assert_settled()


def test_two_requests_of_one_step_share_what_is_stored(engine: Engine) -> None:
    for _ in range(2):
        engine.add(PROMPT, 20)
    engine.drain()
    assert engine.half.totals.blocks_stored == (len(PROMPT) + 19) // BLOCK
    assert engine.forget_device()
    ids = [engine.add([*PROMPT, last], 5) for last in (7, 8)]
    engine.drain()
    told = [engine.turns[i].receipt["tokens"] for i in ids]
    # The first one's load is the second's, too: there it finds them on the device.
    assert [(one["device"], one["host"]) for one in told] == [
        (0, WHOLE * BLOCK),
        (WHOLE * BLOCK, 0),
    ]
    assert engine.half.totals.blocks_loaded == WHOLE
    engine.assert_settled()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_loads_of_a_real_thread_read_right(
    config: Any, arena_name: str, asynchronous: bool
) -> None:
    with running(config, asynchronous=asynchronous, arena=arena_name, thread=True) as engine:
        prompts = [PROMPT, *[other(50 + 9 * seed, seed) for seed in range(4)]]
        for turn in range(6):
            for prompt in prompts:
                engine.add(prompt[: len(prompt) - turn], 9)
            engine.drain()
            assert engine.forget_device()
        assert engine.half.totals.blocks_loaded > 30
        engine.assert_settled()


# -- the client goes away ------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_an_abort_while_a_load_is_in_flight_waits_for_it(engine: Engine, late: bool) -> None:
    stored(engine)
    one = in_flight(engine)
    if late:
        engine.meanwhile.append(lambda: engine.abort(one))
        engine.step_until(lambda: not engine.meanwhile)
    else:
        engine.abort(one)
    assert engine.live() == []
    for _ in range(3):
        engine.step()
    assert one in engine.scheduler.requests  # its device blocks are still being written
    assert engine.half.cache.stats()["leases"] == 1  # I3: and its slots read
    engine.drain()
    engine.assert_settled()
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK
    engine.assert_settled()


def test_an_abort_while_a_threads_load_is_in_flight_waits_for_it(
    config: Any, arena_name: str
) -> None:
    with running(config, asynchronous=True, arena=arena_name, thread=True) as engine:
        stored(engine)
        gate = threading.Event()
        engine.worker.worker._pool.submit(gate.wait)  # the thread is busy until then
        one = engine.add(PROMPT)
        engine.step_until(lambda: engine.worker.worker._loads)
        engine.abort(one)
        engine.step()
        assert one in engine.scheduler.requests
        gate.set()
        engine.drain()
        engine.assert_settled()


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("steps", range(5))
def test_an_abort_after_the_load_leaves_nothing(engine: Engine, steps: int, eager: bool) -> None:
    stored(engine)
    engine.eager = eager
    one = in_flight(engine, PROMPT, 30)
    engine.loads.run()
    for _ in range(steps):
        engine.step()
    engine.abort(one)
    engine.drain()
    engine.assert_settled()
    assert engine.half.totals.blocks_loaded == WHOLE
    assert engine.forget_device()
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK


# -- resets --------------------------------------------------------------------------------------


def test_a_reset_while_a_store_is_in_flight_leaves_nothing(engine: Engine) -> None:
    one = engine.add(PROMPT, 3)
    engine.meanwhile.append(engine.reset_connector)
    engine.step_until(lambda: not engine.meanwhile)
    assert engine.half.cache.stats()["published"] == 0
    engine.drain()
    assert len(engine.turns[one].tokens) == 3
    assert engine.half.totals.blocks_stored == 0
    engine.assert_settled()
    assert engine.forget_device()
    assert engine.generate(PROMPT).receipt["miss"] == "cleared"


def test_a_reset_while_a_load_is_in_flight_leaves_nothing(engine: Engine) -> None:
    stored(engine)
    before = engine.half.totals.blocks_stored
    one = in_flight(engine, PROMPT, 40)
    assert engine.reset_connector()
    engine.loads.run()
    engine.drain()
    assert len(engine.turns[one].tokens) == 40
    assert engine.half.totals.blocks_stored == before  # I3: it is all older than the reset
    # What the device still has of it is as old, and so is what is computed on top.
    assert engine.generate([*PROMPT, *other(40)]).receipt["tokens"]["device"] == WHOLE * BLOCK
    assert engine.half.totals.blocks_stored == before
    engine.assert_settled()
    assert engine.forget_device()
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == 0


def test_a_lookup_that_fails_after_a_reset_stores_nothing_on_older_blocks(engine: Engine) -> None:
    engine.generate(PROMPT)  # the device keeps its blocks
    assert engine.reset_connector()
    before = engine.half.totals.blocks_stored
    engine.fail_once(("half", "match"), after=False)
    engine.generate([*PROMPT, *other(40)])
    assert engine.half.page.failures == 1
    assert engine.half.totals.blocks_stored == before
    engine.assert_settled()


def test_what_was_computed_anew_does_not_make_older_blocks_pass_for_new(engine: Engine) -> None:
    old = engine.add(PROMPT, 80)
    engine.step_until(lambda: engine.turns[old].tokens)
    assert engine.reset_connector()  # the device keeps the blocks of the running request
    engine.add(PROMPT, 2, skip_reading=True)
    engine.step_until(lambda: len(engine.live()) == 1)
    longer = [*PROMPT, *other(40)]
    engine.add(longer)
    engine.drain()
    assert engine.forget_device()
    engine.generate([*longer, 3])  # the forward looks at how old what it reads is
    engine.assert_settled()


def test_a_load_that_a_reset_overtook_does_not_pass_for_new(engine: Engine) -> None:
    stored(engine)
    old = in_flight(engine, PROMPT, 150)
    assert engine.reset_connector()
    new = engine.add(PROMPT, 2)  # the device does not know of the load's blocks yet: computed
    engine.step_until(lambda: new not in engine.live())
    engine.loads.hold = False
    engine.loads.run()
    engine.step_until(lambda: engine.turns[old].tokens)
    for seed in (5, 6):  # the new blocks have to leave the device, the old ones are in use
        filler = engine.add(other(150, seed))
        engine.step_until(lambda filler=filler: filler not in engine.live())
    longer = [*PROMPT, *other(40)]
    third = engine.add(longer)
    engine.step_until(lambda: third not in engine.live())
    assert engine.turns[third].receipt["tokens"]["device"] == WHOLE * BLOCK
    engine.drain()
    assert engine.forget_device()
    told = engine.generate([*longer, 3]).receipt["tokens"]
    assert told["host"] == WHOLE * BLOCK  # the new ones, and nothing that lies on the old
    engine.assert_settled()


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", range(WHOLE))
def test_a_broken_block_is_quarantined_and_computed(engine: Engine, bad: int) -> None:
    stored(engine)
    engine.corrupt(engine.slots_of(PROMPT)[bad])
    turn = engine.generate(PROMPT, 4)
    assert turn.receipt["miss"] == "load_failed"
    assert turn.receipt["tokens"]["host"] == bad * BLOCK
    assert engine.half.totals.quarantined == WHOLE - bad
    assert engine.forget_device()
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK  # stored anew
    engine.assert_settled()


def test_a_load_that_fails_after_a_preemption_changes_no_receipt(engine: Engine) -> None:
    one = engine.add(PROMPT, 20)
    engine.step_until(lambda: engine.half.totals.blocks_stored == WHOLE)
    while engine.queue:
        engine.step_out()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.corrupt(engine.slots_of(PROMPT)[2])
    engine.drain()
    assert engine.half.totals.quarantined > 0
    told = engine.turns[one].receipt
    assert told["tokens"] == {
        "prompt": 69,
        "device": 0,
        "host": 0,
        "disk": 0,
        "far": 0,
        "computed": 69,
    }
    assert told["miss"] == "new"
    engine.assert_settled()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lost_step_that_took_all_the_room_gives_it_back(
    config: Any, arena_name: str, asynchronous: bool
) -> None:
    with running(config, asynchronous=asynchronous, arena=arena_name, n_host=WHOLE) as engine:
        engine.fail_once(("worker", "acks"), after=True)
        engine.add(PROMPT)
        engine.step_until(lambda: engine.half.cache.stats()["pending"] == WHOLE)
        engine.drain()
        stored(engine, other(40))  # finds no room, but its steps are acknowledged
        assert engine.half.cache.stats()["pending"] == 0
        stored(engine, other(40, 2))
        assert engine.generate(other(40, 2)).receipt["tokens"]["host"] == 2 * BLOCK
        engine.assert_settled()


HOOKS = [
    ("half", "on_new_request"),
    ("half", "match"),
    ("half", "allocated"),
    ("half", "orders"),
    ("half", "acknowledged"),
    ("half", "received"),
    ("half", "finished"),
    ("worker", "begin"),
    ("worker", "store"),
    ("worker", "results"),
    ("worker", "failed_requests"),
    ("worker", "failed_blocks"),
    ("worker", "acks"),
    ("worker", "_load"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("hook", HOOKS, ids=[name for _, name in HOOKS])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_hook_that_fails_once_costs_a_recompute(
    engine: Engine, hook: tuple[str, str], after: bool, call: int
) -> None:
    stored(engine)
    ids = [engine.add([*PROMPT, *other(20, seed)], 30) for seed in range(3)]
    for _ in range(call):
        engine.step()
    engine.fail_once(hook, after=after)
    engine.drain()
    assert [len(engine.turns[i].tokens) for i in ids] == [30] * 3
    engine.mend()
    engine.generate(other(40, 9))  # what was lost is given back once a store is acknowledged
    engine.assert_settled()
    assert engine.forget_device()
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("hook", HOOKS, ids=[name for _, name in HOOKS])
def test_a_hook_that_fails_after_an_abort_leaves_nothing(
    engine: Engine, hook: tuple[str, str], after: bool
) -> None:
    stored(engine)
    one = in_flight(engine)
    engine.abort(one)
    while engine.queue:
        engine.step_out()
    engine.fail_once(hook, after=after)
    engine.drain()
    engine.mend()
    engine.generate(other(40, 9))
    engine.assert_settled()


def test_a_request_whose_loads_fail_unheard_ends(engine: Engine) -> None:
    """The engine is told of the bad blocks, and what would tell the scheduler's half is lost."""
    stored(engine)
    half, calls = engine.worker.worker, 0

    def failing(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        raise InjectedError("_load")

    half._load = failing
    acks, half.acks = half.acks, lambda: (acks(), None)[1]
    one = engine.add(PROMPT, 4)
    for _ in range(50):
        if engine.turns[one].finish_reason is not None:
            break
        engine.step()
    assert calls == 1
    assert len(engine.turns[one].tokens) == 4
    half.acks = acks
    assert engine.turns[one].receipt["miss"] == "load_failed"


def test_a_request_whose_load_is_always_refused_ends(engine: Engine) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    if not hasattr(base, "KVConnectorTransferResults"):
        pytest.skip("before 0.30 vLLM is told of blocks alone")
    stored(engine)
    half, calls = engine.worker.worker, 0

    def failing() -> set[str]:
        nonlocal calls
        calls += 1
        raise InjectedError("failed_requests")

    half.failed_requests = failing
    one = engine.add(PROMPT, 4)
    for _ in range(50):
        if engine.turns[one].finish_reason is not None:
            break
        engine.step()
    assert calls > 0
    assert len(engine.turns[one].tokens) == 4
    assert engine.turns[one].receipt["tokens"]["host"] == 0
    assert engine.turns[one].receipt["miss"] == "load_failed"
    del half.failed_requests
    engine.drain()
    engine.faulted = True
    engine.assert_settled()


# -- the harness sees what it is for -------------------------------------------------------------


def shift_loads(engine: Engine) -> None:
    """Every load goes to its blocks in another order."""
    half = engine.worker.worker
    real = half.begin

    def begin(orders: Any) -> None:
        for part in (part for load in orders.loads for part in load.parts):
            part.block_ids = np.roll(part.block_ids, 1)
        real(orders)

    half.begin = begin


def report_loads_early(engine: Engine) -> None:
    """A load is called over when it has only begun."""
    half = engine.worker.worker
    real = half.results

    def results(orders: Any) -> tuple[set[str], set[str]]:
        sent, received = real(orders)
        early = {load.request_id for load in half._loads.values()}
        half._loads.clear()
        return sent, received | early

    half.results = results


def store_early(engine: Engine) -> None:
    """Each step stores the block that it has only begun, too."""
    real = engine.half.orders

    def orders(output: Any) -> Any:
        more = {i: n + BLOCK - 1 for i, n in output.num_scheduled_tokens.items()}
        early = SimpleNamespace(**{**vars(output), "num_scheduled_tokens": more})
        return real(early)

    engine.half.orders = orders


def forget_resets(engine: Engine) -> None:
    engine.half.reset = lambda: True


def test_a_load_into_the_wrong_blocks_is_seen(engine: Engine) -> None:
    stored(engine)
    shift_loads(engine)
    with pytest.raises(WrongKVError, match=r"layer 0 of group 0 is wrong at positions \[0, 1,"):
        engine.generate(PROMPT)


def test_a_load_that_is_not_over_is_seen(engine: Engine) -> None:
    stored(engine)
    report_loads_early(engine)
    in_flight(engine)
    with pytest.raises(WrongKVError, match="layer 0 of group 0 is wrong"):
        engine.step_until(lambda: not engine.live())


@pytest.mark.parametrize("seen_by", ["the store", "attention"])
def test_a_block_stored_too_early_is_seen(engine: Engine, seen_by: str) -> None:
    engine.check_stores = seen_by == "the store"
    store_early(engine)
    engine.add(other(40), 1)
    prompt = other(100, 2)  # its first chunk gets 24 of the step's 64 tokens
    match = (
        "which does not hold its key's KV" if engine.check_stores else "layer 0 of group 0 is wrong"
    )

    def store_and_load() -> None:
        stored(engine, prompt)
        engine.generate(prompt)

    with pytest.raises(WrongKVError, match=match):
        store_and_load()


def test_kv_that_is_older_than_a_reset_is_seen(engine: Engine) -> None:
    stored(engine)
    forget_resets(engine)
    assert engine.reset_connector()
    with pytest.raises(WrongKVError, match="was loaded after reset 2 and holds KV of 1"):
        engine.generate(PROMPT)


def test_a_kept_block_that_is_given_back_too_soon_is_missed(
    config: Any, new_arena_name: Callable[[], str]
) -> None:
    """The proof that the kept block is what brings the last block back."""
    n = 2 * BLOCK - len(PROMPT) % BLOCK + 1
    hosts = []
    for keep in (True, False):
        with running(config, asynchronous=True, arena=new_arena_name()) as engine:
            if not keep:
                finished = engine.half.finished
                engine.half.finished = lambda request, _, f=finished: f(request, ([],))
            turn = stored(engine, PROMPT, n)
            hosts.append(engine.generate([*PROMPT, *turn.tokens, 3]).receipt["tokens"]["host"])
    assert hosts == [(WHOLE + 2) * BLOCK, (WHOLE + 1) * BLOCK]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_damage_that_the_scrub_found_is_answered_by_nobody(
    config: Any, arena_name: str, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setattr(Scrub, "_run", lambda self: self._closing.wait())  # it looks when told
    with running(
        config, asynchronous=asynchronous, arena=arena_name, n_host=40, scrub_mb_s=1
    ) as engine:
        engine.faulted = True
        stored(engine)
        engine.corrupt(engine.slots_of(PROMPT)[1])
        n_bytes = engine.half.arena.slot_bytes
        assert engine.half.scrub.look(0) == WHOLE * n_bytes
        assert engine.generate(PROMPT, 4).receipt["tokens"]["host"] == BLOCK
        found = [e for e in engine.half.bus.recent() if isinstance(e, events.Quarantined)]
        assert [(e.reason, e.blocks) for e in found] == [("scrub", WHOLE - 1)]
        assert engine.half.totals.quarantined == WHOLE - 1
        (told,) = engine.half.cache.quarantined()
        assert (told.reason, told.blocks, told.kept) == ("scrub", WHOLE - 1, True)
        path, key = engine.half.arena.path, bytes.fromhex(told.key)
        assert key == engine.keys_of(PROMPT)[1]
        assert inspect(path, told.slot, told.generation, key) == Inspected(
            "bytes", 0, n_bytes, (0,)
        )
        # Honest slots are untouched, and the prompt is stored anew beside what is kept.
        assert engine.forget_device()
        assert engine.generate(PROMPT, 4).receipt["tokens"]["host"] == WHOLE * BLOCK
        assert told.slot not in engine.slots_of(PROMPT)
        engine.assert_settled()
