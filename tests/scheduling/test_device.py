"""Blocks that come to the device before a request, and loads that several share, under vLLM's own
schedulers: what attention reads is checked by the forward of these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmem import events
from tests.scheduling.engine import N_DEVICE, Engine, running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_hints import LONG, hint, talk

pytestmark = pytest.mark.engine

N_LONG = LONG // BLOCK


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def start(
    request: pytest.FixtureRequest, config: Any, new_arena_name: Callable[[], str]
) -> Callable[..., Any]:
    def start(**options: Any) -> Any:
        settings = {"eviction": "agents", "n_host": 40, **options}
        return running(config, asynchronous=request.param, arena=new_arena_name(), **settings)

    return start


def known(engine: Engine, name: int = 1, session: str = "me") -> list[int]:
    """A session's prompt of LONG tokens, which the host alone has."""
    prompt = talk(name, LONG)
    engine.generate(prompt, 1, session=session)
    assert engine.forget_device()
    return prompt


def tool_ended(engine: Engine, session: str = "me") -> dict[str, Any]:
    return hint(engine, {"do": "tool_ended", "session": session})[0]


def on_device(engine: Engine, prompt: list[int]) -> int:
    """Leading blocks of a prompt that the engine's own cache has."""
    n = 0
    for key in engine.keys_of(prompt):
        if engine.pool.get_cached_block(key, [0]) is None:
            break
        n += 1
    return n


def off_events(engine: Engine) -> list[events.DeviceOff]:
    return [e for e in engine.half.bus.recent() if isinstance(e, events.DeviceOff)]


def test_the_next_turn_finds_its_blocks_on_the_device(start: Callable[..., Any]) -> None:
    with start() as engine:
        prompt = known(engine)
        told = tool_ended(engine)
        assert (told["status"], told["blocks"]) == ("accepted", N_LONG)
        engine.drain()  # no request asks for a step
        assert on_device(engine, prompt) == N_LONG
        assert engine.half.totals.blocks_loaded == N_LONG
        turn = engine.generate([*prompt, *talk(3, 5)], 4, session="me")
        assert (turn.receipt["tokens"]["device"], turn.receipt["tokens"]["host"]) == (LONG, 0)
        assert engine.half.totals.blocks_loaded == N_LONG
        assert engine.half.device.stats()["brought"] == N_LONG
        engine.assert_settled()


def test_a_request_that_comes_meanwhile_waits_and_loads_nothing_itself(
    start: Callable[..., Any],
) -> None:
    with start() as engine:
        prompt = known(engine)
        engine.loads.hold = True
        tool_ended(engine)
        engine.step()
        i = engine.add([*prompt, *talk(3, 5)], 4, session="me")
        for _ in range(4):
            engine.step()
        assert engine.turns[i].tokens == []
        engine.drain()
        assert engine.turns[i].receipt["tokens"]["device"] == LONG
        assert engine.half.totals.blocks_loaded == N_LONG
        engine.assert_settled()


def test_a_request_waits_for_a_bounded_time(start: Callable[..., Any]) -> None:
    with start() as engine:
        prompt = known(engine)
        engine.half.flights._clock = lambda: now[0]
        now = [0.0]
        engine.loads.hold = True
        tool_ended(engine)
        engine.step()
        i = engine.add([*prompt, *talk(3, 5)], 1, session="me")
        engine.step()
        engine.step()
        assert len(engine.loads.held) == 1
        now[0] = 60.0
        for _ in range(3):
            engine.step()
        assert len(engine.loads.held) == 2  # its own
        engine.drain()
        assert engine.turns[i].receipt["tokens"]["host"] == LONG
        engine.assert_settled()


@pytest.mark.parametrize("what", ["reset", "weights"])
def test_what_a_reset_overtakes_gets_no_hash(start: Callable[..., Any], what: str) -> None:
    with start() as engine:
        prompt = known(engine)
        engine.loads.hold = True
        tool_ended(engine)
        engine.step()
        assert engine.half.device.is_busy
        if what == "reset":
            assert engine.reset_connector()
        else:
            engine.new_weights()
        engine.drain()
        assert on_device(engine, prompt) == 0
        assert engine.half.device.stats()["discarded"] == N_LONG
        engine.generate([*prompt, 5], 2)
        engine.assert_settled()


def test_a_damaged_block_gets_no_hash(start: Callable[..., Any]) -> None:
    with start(verify_share=1.0) as engine:
        prompt = known(engine)
        engine.corrupt(engine.slots_of(prompt)[2])
        tool_ended(engine)
        engine.drain()
        assert on_device(engine, prompt) == 0
        assert engine.half.totals.quarantined > 0
        turn = engine.generate([*prompt, 5], 3, session="me")
        assert turn.receipt["tokens"]["device"] == 0
        engine.assert_settled()


def test_requests_keep_their_room(start: Callable[..., Any]) -> None:
    with start() as engine:
        prompt = known(engine)
        i = engine.add(talk(9, 11 * BLOCK), 30)  # of 18 blocks
        engine.step_until(lambda: engine.pool.get_num_free_blocks() <= 7)
        told = tool_ended(engine)
        assert 0 < told["blocks"] <= 7 - N_DEVICE // 8
        engine.loads.hold = True
        engine.step()
        assert engine.pool.get_num_free_blocks() >= N_DEVICE // 8
        engine.drain()
        assert engine.preemptions == 0
        assert engine.turns[i].finish_reason is not None
        assert on_device(engine, prompt) <= told["blocks"]
        engine.assert_settled()


def test_prefetch_to_the_device_is_told_by_receipts(start: Callable[..., Any]) -> None:
    with start() as engine:
        known(engine)
        asked = {"do": "prefetch", "session": "me", "to": "device"}
        told = hint(engine, asked)[0]
        assert (told["status"], told["blocks"]) == ("deferred", N_LONG)
        engine.drain()
        assert hint(engine, asked)[0] == {
            "do": "prefetch", "status": "accepted", "session": "me", "reason": "it is there",
            "blocks": N_LONG, "for_s": 0.0,
        }  # fmt: skip
        engine.half.cache.drop("test")
        assert engine.forget_device()
        told = hint(engine, asked)[0]
        assert (told["status"], told["reason"]) == ("rejected", "nothing of it is in the host")
        engine.assert_settled()


def test_the_blocks_of_a_session_that_ended_are_evicted_first(start: Callable[..., Any]) -> None:
    with start() as engine:
        older, newer = talk(1, 6 * BLOCK), talk(2, 6 * BLOCK)
        engine.generate(older, 1, session="older")
        engine.generate(newer, 1, session="newer")
        hint(engine, {"do": "session_end", "session": "newer"})
        assert engine.half.device.stats()["left"] == 6
        engine.generate(talk(3, 11 * BLOCK), 1)  # 12 of 18 blocks, 6 of them never used
        assert on_device(engine, newer) == 0
        assert on_device(engine, older) == 6
        engine.assert_settled()


def test_what_others_share_stays_where_it_is(start: Callable[..., Any]) -> None:
    with start() as engine:
        shared = talk(1, 4 * BLOCK)
        for name in ("one", "two"):
            engine.generate([*shared, *talk(len(name) + ord(name[0]), 2 * BLOCK)], 1, session=name)
        hint(engine, {"do": "session_end", "session": "one"})
        assert engine.half.device.stats()["left"] == 2
        engine.assert_settled()


def test_a_pool_of_another_make_switches_it_off_once(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.block_pool import BlockPool

    def other(self: Any, block: Any) -> None:
        raise AssertionError("it must not be called")

    real = BlockPool._insert_block_hash
    monkeypatch.setattr(BlockPool, "_insert_block_hash", other)
    with start() as engine:
        monkeypatch.setattr(BlockPool, "_insert_block_hash", real)  # the engine's own needs it
        prompt = known(engine)
        assert [e.error for e in off_events(engine)] == [
            "TypeError: vLLM's BlockPool lacks _insert_block_hash"
        ]
        told = hint(engine, {"do": "prefetch", "session": "me", "to": "device"})[0]
        assert (told["status"], "lacks" in told["reason"]) == ("rejected", True)
        tool_ended(engine)
        assert not engine.half.device.is_busy
        turn = engine.generate([*prompt, 5], 1, session="me")
        assert turn.receipt["tokens"]["host"] == LONG
        engine.assert_settled()


@pytest.mark.parametrize("method", ["get_cached_block", "get_new_blocks", "touch"])
def test_a_failure_switches_it_off_and_leaves_the_pool_whole(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken on purpose")

    with start() as engine:
        prompt = known(engine)
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.pool), method, broken)
            assert tool_ended(engine)["status"] == "accepted"
            engine.drain()
        assert len(off_events(engine)) == 1
        tool_ended(engine)
        assert len(off_events(engine)) == 1
        turn = engine.generate([*prompt, 5], 1, session="me")
        assert turn.receipt["tokens"]["host"] == LONG
        engine.assert_settled()


def test_orders_that_are_lost_give_the_blocks_back(start: Callable[..., Any]) -> None:
    with start() as engine:
        prompt = known(engine)
        raised = engine.fail_once(("half", "wait_for_disk"), after=False)
        tool_ended(engine)
        engine.drain()
        assert raised()
        assert on_device(engine, prompt) == 0
        turn = engine.generate([*prompt, 5], 1, session="me")
        assert turn.receipt["tokens"]["host"] == LONG
        engine.assert_settled()


@pytest.mark.parametrize("hook", ["begin", "results"])
def test_a_worker_that_fails_gives_the_blocks_back(start: Callable[..., Any], hook: str) -> None:
    with start() as engine:
        prompt = known(engine)
        raised = engine.fail_once(("worker", hook), after=False)
        tool_ended(engine)
        engine.drain()
        assert raised()
        assert not engine.half.device.is_busy
        engine.generate([*prompt, 5], 1, session="me")
        engine.assert_settled()


# -- loads that are shared -------------------------------------------------------------------------


def test_siblings_that_start_together_load_what_they_share_once(start: Callable[..., Any]) -> None:
    with start(eviction="lru") as engine:
        shared = known(engine)
        engine.loads.hold = True
        ids = [engine.add([*shared, *talk(20 + i, 4)], 2) for i in range(4)]
        for _ in range(3):
            engine.step()
        assert len(engine.loads.held) == 1
        engine.drain()
        assert engine.half.totals.blocks_loaded == N_LONG
        told = [engine.turns[i].receipt["tokens"] for i in ids]
        assert [one["device"] for one in told] == [0, LONG, LONG, LONG]
        assert engine.half.flights.n_waited == 3
        engine.assert_settled()


def test_siblings_that_start_together_compute_what_they_share_once(
    start: Callable[..., Any],
) -> None:
    with start() as engine:
        shared = talk(1, 7 * BLOCK)  # more than the engine computes in a step
        ids = [engine.add([*shared, *talk(20 + i, 4)], 2) for i in range(4)]
        engine.drain()
        computed = [engine.turns[i].receipt["tokens"]["computed"] for i in ids]
        assert sum(computed) == 7 * BLOCK + 4 * 4
        engine.assert_settled()


def test_a_sibling_goes_on_by_itself_when_the_first_one_is_gone(start: Callable[..., Any]) -> None:
    with start(eviction="lru") as engine:
        shared = known(engine)
        engine.loads.hold = True
        first, second = (engine.add([*shared, *talk(20 + i, 4)], 2) for i in range(2))
        engine.step()
        engine.abort(first)
        engine.drain()
        assert engine.turns[second].finish_reason is not None
        assert engine.turns[second].receipt["tokens"]["host"] == LONG
        engine.assert_settled()
