"""The least that must hold with every vLLM that kvmem works with, on the real engine and model.

`tests/versions/matrix.py` runs this file in an environment of its own for each release.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvmem.engines.vllm import interface
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
    """An engine that knows kvmem by its entry point alone: no module is named."""
    transfer = {
        "kv_connector": "KvmemConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"host_gb": 0.5},
    }
    host = EngineHost(smollm2, kvmem=None, kv_transfer_config=transfer)
    yield host
    host.close()


@pytest.fixture(autouse=True)
def _nothing_is_left(host: EngineHost) -> Iterator[None]:
    yield
    host.run(assert_settled)


def test_the_engine_has_what_kvmem_needs() -> None:
    assert interface.why_off() is None


def connector_name(engine: Engine) -> tuple[str, str]:
    """The class on the scheduler's side and on the worker's."""
    return tuple(
        f"{type(c).__module__}.{type(c).__name__}"
        for c in (engine.connector, engine.worker_connector)
    )


def test_vllm_finds_the_connector_by_its_entry_point(host: EngineHost) -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="kvmem")
    assert [p.value for p in points] == ["kvmem.engines.vllm.plugin:register"]
    name = "kvmem.engines.vllm.connector.KvmemConnector"
    assert host.run(connector_name) == (name, name)


def wipe(engine: Engine) -> None:
    """Nothing of what the device's blocks held is left.

    Not by `collective_rpc`: kvmem takes what that does for a change of weights.
    """
    layers = engine.core.model_executor.driver_worker.worker.model_runner.kv_caches
    assert len(layers) > 0
    for layer in layers:
        layer.zero_()


def cold_native_host(engine: Engine, tokens: list[int]) -> tuple[Turn, Turn, Turn, int, int]:
    """The same prompt computed, from the engine's own cache, and from the host tier alone; blocks
    that were stored and loaded meanwhile."""
    before = engine.half.totals.as_dict()
    cold, native = engine.generate([tokens])[0], engine.generate([tokens])[0]
    engine.forget_device()
    wipe(engine)
    restored = engine.generate([tokens])[0]
    engine.settle()
    after = engine.half.totals.as_dict()
    stored, loaded = (after[n] - before[n] for n in ("blocks_stored", "blocks_loaded"))
    return cold, native, restored, stored, loaded


def test_a_stored_prompt_comes_back_from_the_host_token_by_token(host: EngineHost) -> None:
    cold, native, restored, stored, loaded = host.run(cold_native_host, prompt(700, 1))
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
    assert stored == (700 + len(cold.tokens) - 1) // BLOCK  # the reply completes one more
    assert loaded == whole // BLOCK
    assert_same(restored, native)
    assert_agrees(restored, cold)


def loaded_as_zeros(engine: Engine, tokens: list[int]) -> Turn:
    """The prompt again, when loads say that they are done and have brought nothing."""
    engine.forget_device()
    worker = engine.worker_connector.worker
    real = worker._load

    def load(*orders: Any) -> Any:
        done = real(*orders)
        wipe(engine)
        return done

    worker._load = load
    try:
        return engine.generate([tokens])[0]
    finally:
        del worker._load
        engine.settle()
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)


def test_blocks_that_were_not_moved_would_not_pass_for_right(host: EngineHost) -> None:
    tokens = prompt(320, 2)
    expected = host.run(generate_one, tokens)
    wrong = host.run(loaded_as_zeros, tokens)
    assert wrong.receipt["tokens"]["host"] == 319 // BLOCK * BLOCK
    with pytest.raises(AssertionError):
        assert_agrees(wrong, expected)


def aborted_while_it_loads(engine: Engine, tokens: list[int]) -> bool:
    """Whether the load was under way when its request was aborted; it ends after that."""
    from vllm import SamplingParams

    engine.generate([tokens], 1)
    engine.forget_device()
    worker, ends = engine.worker_connector.worker, threading.Event()
    real = worker._load
    worker._load = lambda load: real(load) if ends.wait() else None
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    llm = engine.llm.llm_engine
    llm.add_request("gone", {"prompt_token_ids": tokens}, params)
    try:
        llm.step()
        return bool(worker._loads)
    finally:
        llm.abort_request(["gone"])
        ends.set()
        del worker._load


def test_a_request_that_is_aborted_while_it_loads_leaves_nothing(host: EngineHost) -> None:
    tokens = prompt(500, 3)
    assert host.run(aborted_while_it_loads, tokens)
    host.run(assert_settled)
    turn = host.run(generate_one, tokens)
    host.run(Engine.forget_device)
    assert_agrees(turn, host.run(generate_one, tokens, kvmem={"load": False}))


def reset_everything(engine: Engine) -> bool:
    engine.settle()
    return bool(engine.scheduler.reset_prefix_cache(reset_connector=True))


def test_a_reset_leaves_nothing_to_answer(host: EngineHost) -> None:
    tokens = prompt(200, 4)
    host.run(generate_one, tokens)
    assert host.run(reset_everything)
    turn = host.run(generate_one, tokens)
    assert turn.receipt["tokens"]["computed"] == 200
    assert turn.receipt["miss"] == "cleared"


def test_another_salt_sees_nothing(host: EngineHost) -> None:
    tokens = prompt(200, 5)
    host.run(generate_one, tokens, salt="a")
    host.run(Engine.forget_device)
    assert host.run(generate_one, tokens, salt="b").receipt["tokens"]["host"] == 0
    host.run(Engine.forget_device)
    assert host.run(generate_one, tokens, salt="a").receipt["tokens"]["host"] > 0


def broken(engine: Engine, tokens: list[int]) -> Turn:
    """A load whose every block fails its check."""
    import numpy as np

    engine.forget_device()
    arena = engine.half.arena
    np.frombuffer(arena.buffer, np.uint8)[arena.data_of(0) :] ^= 1
    return engine.generate([tokens])[0]


def test_blocks_that_fail_their_check_are_computed(host: EngineHost) -> None:
    host.run(reset_everything)
    tokens = prompt(320, 6)
    expected = host.run(generate_one, tokens, kvmem={"load": False})
    turn = host.run(broken, tokens)
    assert turn.receipt["miss"] == "load_failed"
    assert_agrees(turn, expected)
    assert host.run(reset_everything)
