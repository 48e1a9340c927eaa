"""The connector on a real engine and a real model: what comes back is what was computed.

float32, so a cold prefill and a hit agree to rounding; every comparison also shows that blocks
were moved. vLLM schedules synchronously on a CPU, whatever it is asked: its asynchronous scheduler
is driven without a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.host import (
    BLOCK,
    Engine,
    EngineHost,
    Turn,
    assert_agrees,
    assert_same,
    assert_settled,
    generate_one,
    prompt,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def host(smollm2: str) -> Iterator[EngineHost]:
    host = EngineHost(smollm2, kvmem={"host_gb": 0.5})
    yield host
    host.close()


@pytest.fixture(autouse=True)
def _nothing_is_left(host: EngineHost) -> Iterator[None]:
    yield
    host.run(assert_settled)


def cold_native_host(engine: Engine, tokens: list[int]) -> tuple[Turn, Turn, Turn]:
    """The same prompt computed, from the engine's own cache, and from the host tier."""
    cold = engine.generate([tokens])[0]
    native = engine.generate([tokens])[0]
    engine.forget_device()
    return cold, native, engine.generate([tokens])[0]


def test_host_hit_equals_the_native_hit_and_the_cold_prefill(host: EngineHost) -> None:
    cold, native, restored = host.run(cold_native_host, prompt(700, 1))
    whole = 699 // BLOCK * BLOCK
    assert cold.receipt["tokens"] == {
        "prompt": 700,
        "device": 0,
        "host": 0,
        "disk": 0,
        "far": 0,
        "computed": 700,
    }
    assert native.receipt["tokens"]["device"] == whole
    assert restored.receipt["tokens"] == {
        "prompt": 700, "device": 0, "host": whole, "disk": 0, "far": 0, "computed": 700 - whole,
    }  # fmt: skip
    assert restored.cached == whole
    assert_same(restored, native)
    assert_agrees(restored, cold)


def test_one_changed_token_ends_the_hit_at_its_block(host: EngineHost) -> None:
    tokens = prompt(320, 2)
    host.run(cold_native_host, tokens)
    changed = [*tokens[:200], tokens[200] + 1, *tokens[201:]]
    host.run(Engine.forget_device)
    turn = host.run(generate_one, changed)
    assert turn.receipt["tokens"]["host"] == 200 // BLOCK * BLOCK
    assert turn.receipt["miss"] == "new"
    assert turn.receipt["first_missing_block"] == 200 // BLOCK


def reply_then_next_turn(engine: Engine, tokens: list[int], n: int) -> tuple[Turn, Turn, Turn]:
    first = engine.generate([tokens], n)[0]
    engine.settle()
    following = [*tokens, *first.tokens, *prompt(40, 99)]
    native = engine.generate([following], kvmem={"store": False})[0]
    engine.forget_device()
    return first, engine.generate([following])[0], native


@pytest.mark.parametrize("n", [BLOCK * 2, BLOCK * 2 + 1, BLOCK * 3 - 1])
def test_blocks_of_the_reply_are_stored_too(host: EngineHost, n: int) -> None:
    n_prompt = 3 * BLOCK + 5
    first, restored, native = host.run(reply_then_next_turn, prompt(n_prompt, 3 + n), n)
    # The last sampled token has no KV.
    whole = (n_prompt + len(first.tokens) - 1) // BLOCK * BLOCK
    assert restored.receipt["tokens"]["host"] == whole
    assert native.receipt["tokens"]["device"] == whole
    assert_same(restored, native)


def many_at_once(engine: Engine, prompts: list[list[int]], n: int, **kwargs: Any) -> list[Turn]:
    return engine.generate(prompts, n, **kwargs)


def preemptions(engine: Engine) -> int:
    return sum(int(m.value) for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_preempted_requests_answer_the_same(host: EngineHost) -> None:
    prompts = [prompt(480, 20 + i) for i in range(8)]  # 8 * 15 blocks of prompt, 127 there are
    alone = [host.run(generate_one, p, 40, kvmem={"load": False}) for p in prompts]
    host.run(Engine.forget_device)
    before = host.run(preemptions)
    together = host.run(many_at_once, prompts, 40)
    assert host.run(preemptions) > before
    assert sum(t.receipt["tokens"]["host"] for t in together) > 0
    for a, b in zip(alone, together, strict=True):
        assert a.tokens == b.tokens


def test_a_shared_prefix_is_stored_once_for_all(host: EngineHost) -> None:
    shared = prompt(256, 40)
    host.run(Engine.forget_device)
    before = host.run(Engine.stats)["published"]
    turns = host.run(many_at_once, [[*shared, *prompt(64, 41 + i)] for i in range(6)], 2)
    assert len(turns) == 6
    stored = host.run(settled_published) - before
    assert stored == 256 // BLOCK + 6 * (64 // BLOCK)


def settled_published(engine: Engine) -> int:
    engine.settle()
    return int(engine.stats()["published"])


def test_load_off_computes_and_store_off_keeps_nothing(host: EngineHost) -> None:
    tokens = prompt(200, 60)
    turn = host.run(generate_one, tokens, kvmem={"store": False})
    assert turn.receipt["blocks_stored"] == 0
    host.run(Engine.forget_device)
    stored = host.run(generate_one, tokens)
    assert stored.receipt["tokens"]["host"] == 0
    host.run(Engine.forget_device)
    off = host.run(generate_one, tokens, kvmem={"load": False})
    assert off.receipt["tokens"]["computed"] == 200
    assert off.receipt["miss"] == "load_off"
    host.run(Engine.forget_device)
    assert host.run(generate_one, tokens).receipt["tokens"]["host"] == 199 // BLOCK * BLOCK


def test_a_wish_that_is_not_understood_is_told_and_harms_nothing(host: EngineHost) -> None:
    turn = host.run(generate_one, prompt(64, 61), kvmem={"laod": False})
    assert turn.finish_reason == "length"
    assert "laod" in turn.receipt["error"]


def test_another_salt_sees_nothing(host: EngineHost) -> None:
    tokens = prompt(200, 62)
    host.run(generate_one, tokens, salt="a")
    host.run(Engine.forget_device)
    other = host.run(generate_one, tokens, salt="b")
    assert other.receipt["tokens"]["host"] == 0
    assert other.receipt["miss"] == "new"  # I11: no word of what the other tenant has
    host.run(Engine.forget_device)
    assert host.run(generate_one, tokens, salt="a").receipt["tokens"]["host"] > 0


def reset_everything(engine: Engine) -> bool:
    engine.settle()
    return bool(engine.scheduler.reset_prefix_cache(reset_connector=True))


def test_a_reset_leaves_nothing_to_answer(host: EngineHost) -> None:
    tokens = prompt(200, 63)
    host.run(generate_one, tokens)
    assert host.run(reset_everything)
    turn = host.run(generate_one, tokens)
    assert turn.receipt["tokens"]["computed"] == 200
    assert turn.receipt["miss"] == "cleared"


def reset_under_way(engine: Engine, tokens: list[int]) -> int:
    """Resets while a request is half prefilled; answers what is published when it is over."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    engine.llm.llm_engine.add_request("reset", {"prompt_token_ids": tokens}, params)
    for _ in range(2):
        engine.llm.llm_engine.step()
    engine.connector.reset_cache()
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
    return settled_published(engine)


def test_what_was_computed_before_a_reset_is_not_stored_after_it(host: EngineHost) -> None:
    host.run(reset_everything)
    assert host.run(reset_under_way, prompt(700, 64)) == 0


def abort_after(engine: Engine, tokens: list[int], steps: int, with_load: bool) -> None:
    """A request is aborted after so many steps, with a load under way or while it computes."""
    from vllm import SamplingParams

    if with_load:
        engine.generate([tokens], 1)
        engine.forget_device()
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    engine.llm.llm_engine.add_request("gone", {"prompt_token_ids": tokens}, params)
    for _ in range(steps):
        engine.llm.llm_engine.step()
    engine.llm.llm_engine.abort_request(["gone"])


@pytest.mark.parametrize("with_load", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_leaves_nothing_and_harms_nobody(
    host: EngineHost, steps: int, with_load: bool
) -> None:
    tokens = prompt(500, 70 + steps)
    host.run(abort_after, tokens, steps, with_load)
    host.run(assert_settled)
    turn = host.run(generate_one, tokens)
    host.run(Engine.forget_device)
    assert_agrees(turn, host.run(generate_one, tokens, kvmem={"load": False}))
