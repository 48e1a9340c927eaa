"""Weights that change in a running engine, around vLLM's own schedulers and engine core.

The forward knows which weights computed each position: a request that begins on KV of weights
that are not served any more is an error. Each part of what is done about it is taken out once, to
see the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvmem.engines.vllm import weights
from tests.scheduling.engine import Engine, running
from tests.scheduling.forward import BLOCK, WrongKVError
from tests.scheduling.test_steps import PROMPT, WHOLE, in_flight, other, stored

pytestmark = pytest.mark.engine


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def engine(request: pytest.FixtureRequest, config: Any, arena_name: str) -> Iterator[Engine]:
    with running(config, asynchronous=request.param, arena=arena_name, n_host=40) as engine:
        yield engine


def is_computed(engine: Engine, prompt: list[int]) -> bool:
    tokens = engine.generate(prompt).receipt["tokens"]
    return bool(tokens["computed"] == len(prompt))


def is_stored_again(engine: Engine, prompt: list[int] = PROMPT) -> bool:
    assert engine.forget_device()
    tokens = engine.generate(prompt).receipt["tokens"]
    return bool(tokens["host"] == (len(prompt) - 1) // BLOCK * BLOCK)


# -- what was there ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["host", "device", "both"])
def test_nothing_of_the_old_weights_answers(engine: Engine, where: str) -> None:
    engine.generate(PROMPT)
    if where == "host":
        assert engine.forget_device()
    if where == "device":
        engine.half.cache.drop("test")
    engine.new_weights()
    assert engine.core.model_executor.calls == ["update_weights"]
    assert is_computed(engine, PROMPT)
    assert is_stored_again(engine)
    engine.assert_settled()


def test_old_blocks_on_the_device_would_be_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "empty", lambda pool: True)
    engine.generate(PROMPT)
    engine.new_weights()
    with pytest.raises(WrongKVError, match="KV of weights 1, served are 2"):
        engine.generate(PROMPT)


def test_old_blocks_in_the_host_tier_would_be_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.half.cache, "drop", lambda reason: 0)
    monkeypatch.setattr(weights, "EPOCH_BYTES", 0)
    stored(engine)
    engine.new_weights()
    with pytest.raises(WrongKVError, match="KV of weights 1, served are 2"):
        engine.generate(PROMPT)


@pytest.mark.parametrize("without", ["drop", "epoch"])
def test_the_epoch_and_the_drop_each_keep_old_blocks_from_answering(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    if without == "drop":
        monkeypatch.setattr(engine.half.cache, "drop", lambda reason: 0)
    else:
        monkeypatch.setattr(weights, "EPOCH_BYTES", 0)
    stored(engine)
    engine.new_weights()
    assert is_computed(engine, PROMPT)


# -- requests under way --------------------------------------------------------------------------


@pytest.mark.parametrize("n_prompt", [5, 40, 200])  # no whole block yet; a part; several chunks
@pytest.mark.parametrize("eager", [True, False])
def test_nobody_finds_what_a_running_request_goes_on_to_fill(
    engine: Engine, n_prompt: int, eager: bool
) -> None:
    engine.eager = eager
    prompt = other(n_prompt)
    one = engine.add(prompt, 30)
    engine.step_until(lambda: engine.forward.positions_read)
    engine.new_weights()
    # While it runs, and after it: the prompt alone, and with what was answered.
    engine.add(prompt)
    engine.drain()
    assert len(engine.turns[one].tokens) == 30
    longer = [*prompt, *engine.turns[one].tokens, 3]
    tokens = engine.generate(longer).receipt["tokens"]
    assert tokens["device"] + tokens["host"] <= n_prompt
    assert is_stored_again(engine, longer)
    engine.assert_settled()


def test_blocks_that_a_running_request_goes_on_to_fill_would_be_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "poison", lambda request: True)
    one = engine.add(PROMPT, 60)
    engine.step_until(lambda: engine.turns[one].tokens)
    engine.new_weights()
    engine.drain()
    engine.generate(PROMPT)  # the prompt's own blocks are new, and those after it would be found
    with pytest.raises(WrongKVError, match="KV of weights 1, served are 2"):
        engine.generate([*PROMPT, *engine.turns[one].tokens])


def test_blocks_of_a_reply_that_was_kept_for_one_more_copy_are_not_stored(
    config: Any, arena_name: str
) -> None:
    with running(config, asynchronous=True, arena=arena_name, n_host=40) as engine:
        n = 2 * BLOCK - len(PROMPT) % BLOCK + 1
        engine.add(PROMPT, n)
        engine.step_until(lambda: not engine.live())
        assert engine.half._to_finish
        before = engine.half.totals.blocks_stored
        engine.new_weights()
        engine.drain()
        assert engine.half.totals.blocks_stored == before
        engine.assert_settled()


def test_a_preempted_request_is_computed_anew_and_stored(engine: Engine) -> None:
    one = engine.add(PROMPT, 20)
    engine.step_until(lambda: engine.turns[one].tokens)
    while engine.queue:
        engine.step_out()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.new_weights()
    engine.drain()
    assert len(engine.turns[one].tokens) == 20
    assert is_stored_again(engine, [*PROMPT, *engine.turns[one].tokens[:-1], 3])
    engine.assert_settled()


# -- loads under way -----------------------------------------------------------------------------


@pytest.mark.parametrize("over", [False, True], ids=["in flight", "over"])
def test_a_request_whose_load_is_of_old_weights_is_looked_up_anew(
    engine: Engine, over: bool
) -> None:
    stored(engine)
    one = in_flight(engine, PROMPT, 20)
    if over:  # and told, but the request has not begun
        engine.loads.run()
        engine.step_until(lambda: one in engine.scheduler.finished_recving_kv_req_ids)
    engine.new_weights()
    engine.drain()
    turn = engine.turns[one]
    assert turn.receipt["tokens"]["computed"] == len(PROMPT)
    assert len(turn.tokens) == 20
    assert is_stored_again(engine)
    engine.assert_settled()


def test_a_load_of_old_weights_would_be_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.Live, "_restart", lambda self, request: False)
    stored(engine)
    in_flight(engine)
    engine.new_weights()
    with pytest.raises(WrongKVError, match="KV of weights 1, served are 2"):
        engine.drain()


def test_a_request_that_was_loaded_and_waits_for_its_turn_is_looked_up_anew(
    engine: Engine,
) -> None:
    stored(engine)
    one = in_flight(engine, PROMPT, 20)
    request = engine.scheduler.requests[one]
    engine.loads.run()
    engine.step_until(lambda: one in engine.scheduler.finished_recving_kv_req_ids)
    while engine.queue:
        engine.step_out()
    assert engine.scheduler._handle_blocked_waiting_request(request)  # as when there is no budget
    assert request.status.name == "WAITING"
    assert request.num_computed_tokens == WHOLE * BLOCK
    engine.new_weights()
    engine.drain()
    assert engine.turns[one].receipt["tokens"]["computed"] == len(PROMPT)
    engine.assert_settled()


# -- the call ------------------------------------------------------------------------------------


def test_calls_that_change_no_weights_drop_nothing(engine: Engine) -> None:
    stored(engine)
    engine.core.model_executor.changes = False
    for name in sorted(weights.HARMLESS):
        engine.core.collective_rpc(name)
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK


@pytest.mark.parametrize("method", ["reload_weights", "nobody knows this one", lambda worker: None])
def test_any_other_call_counts_as_a_change(engine: Engine, method: Any) -> None:
    stored(engine)
    engine.core.collective_rpc(method)
    assert is_computed(engine, PROMPT)


def test_a_call_that_fails_counts_as_a_change(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(engine)
    real = engine.core.model_executor.collective_rpc

    def half_way(method: Any, *args: Any, **kwargs: Any) -> Any:
        answer = real(method, *args, **kwargs)
        if method == "update_weights":
            raise RuntimeError("the trainer has gone")
        return answer

    monkeypatch.setattr(engine.core.model_executor, "collective_rpc", half_way)
    with pytest.raises(RuntimeError, match="the trainer has gone"):
        engine.new_weights()
    assert is_computed(engine, PROMPT)


def test_what_fails_in_kvmem_costs_what_is_stored_and_not_the_call(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running_one = engine.add(other(40), 40)
    engine.step_until(lambda: engine.turns[running_one].tokens)
    before = engine.half.totals.blocks_stored
    monkeypatch.setattr(engine.half.cache, "drop", lambda reason: 1 // 0)
    engine.new_weights()
    assert engine.half.page.failures == 2
    assert "weights_changed: ZeroDivisionError" in engine.half.page.last_failure
    engine.drain()
    assert engine.half.totals.blocks_stored - before <= 1  # the step that was under way


def test_another_engine_of_the_process_is_left_alone(
    config: Any, new_arena_name: Any, engine: Engine
) -> None:
    stored(engine)
    with running(config, asynchronous=False, arena=new_arena_name()) as second:
        second.new_weights()
        assert second.half.live.epoch
    assert not engine.half.live.epoch
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK
    engine.new_weights()  # the watch of the one that stays has stayed
    assert engine.half.live.epoch
    engine.assert_settled()
