"""Weights that are replaced in a running engine: what the old ones computed answers nothing.

The oracle is the same engine, with the same weights, computing the prompt whole. Where kvmem's
watch is taken out, the old text is served: by vLLM's own cache, and by kvmem's.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.host import (
    BLOCK,
    Engine,
    EngineHost,
    Turn,
    assert_agrees,
    assert_settled,
    prompt,
)

pytestmark = pytest.mark.engine

N_TOKENS = 200
WHOLE = (N_TOKENS - 1) // BLOCK * BLOCK
_seeds = itertools.count(700)


@pytest.fixture(scope="module")
def host(smollm2: str) -> Iterator[EngineHost]:
    host = EngineHost(smollm2, kvmem={"host_gb": 0.5})
    yield host
    host.close()


@pytest.fixture(autouse=True)
def _nothing_is_left(host: EngineHost) -> Iterator[None]:
    yield
    host.run(assert_settled)


def write_other_weights(_: Engine, model: str, folder: str) -> None:
    """The same model, with other norms, keys and values in every layer."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in Path(model).glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if any(part in name for part in ("input_layernorm", "k_proj", "v_proj")):
                tensors[name] = torch.roll(tensor, 1, 0)
        save_file(tensors, Path(folder) / path.name, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def other_weights(host: EngineHost, smollm2: str, tmp_path_factory: Any) -> str:
    folder = str(tmp_path_factory.mktemp("weights") / "other")
    host.run(write_other_weights, smollm2, folder)
    return folder


def new_prompt() -> list[int]:
    return prompt(N_TOKENS, next(_seeds))


def ask(engine: Engine, tokens: list[int], **kvmem: bool) -> Turn:
    return engine.generate([tokens], kvmem=kvmem or None)[0]


def computed(engine: Engine, tokens: list[int]) -> Turn:
    """The truth: nothing of the prompt comes from anywhere, and nothing is kept of it."""
    engine.forget_device()
    turn = ask(engine, tokens, load=False, store=False)
    engine.forget_device()
    return turn


def told(turn: Turn) -> tuple[int, int]:
    return turn.receipt["tokens"]["device"], turn.receipt["tokens"]["host"]


# -- ways to change them -------------------------------------------------------------------------


def reload(engine: Engine, folder: str) -> None:
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})


def by_a_function(engine: Engine, folder: str) -> None:
    """As a trainer in the same process may do: here with the norms, which no kernel repacks."""
    from safetensors.torch import load_file

    tensors = {
        name: tensor
        for path in Path(folder).glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if "input_layernorm" in name
    }

    def load(model: Any) -> int:
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)
        return len(tensors)

    assert engine.llm.apply_model(load)[0] > 0


WAYS = {"reload_weights": reload, "apply_model": by_a_function}
CASES = [("reload_weights", "device"), ("reload_weights", "host"), ("apply_model", "host")]


def changed(
    engine: Engine, way: str, tokens: list[int], old: str, new: str, where: str
) -> tuple[Turn, Turn, Turn]:
    """The prompt by the old weights, by the new ones from what is kept, and the truth."""
    WAYS[way](engine, old)
    before = ask(engine, tokens)
    if where == "host":
        engine.forget_device()
    else:
        engine.settle()
    WAYS[way](engine, new)
    return before, ask(engine, tokens), computed(engine, tokens)


@contextmanager
def unwatched(engine: Engine) -> Iterator[None]:
    live = engine.half.live
    live.close()
    try:
        yield
    finally:
        live._watch()


def changed_unwatched(
    engine: Engine, way: str, tokens: list[int], old: str, new: str, where: str
) -> tuple[Turn, Turn, Turn]:
    with unwatched(engine):
        answer = changed(engine, way, tokens, old, new, where)
    engine.half.cache.drop("test")  # what was stored meanwhile is of nobody knows which weights
    engine.forget_device()
    return answer


@pytest.mark.parametrize(("way", "where"), CASES)
def test_new_weights_find_nothing_of_the_old(
    host: EngineHost, smollm2: str, other_weights: str, way: str, where: str
) -> None:
    tokens = new_prompt()
    before, turn, truth = host.run(changed, way, tokens, smollm2, other_weights, where)
    assert told(turn) == (0, 0)
    assert turn.tokens != before.tokens
    assert_agrees(turn, truth)
    host.run(ask, tokens)
    assert told(host.run(ask, tokens)) == (WHOLE, 0)
    host.run(Engine.forget_device)
    restored = host.run(ask, tokens)
    assert told(restored) == (0, WHOLE)
    assert_agrees(restored, truth)


@pytest.mark.parametrize(("way", "where"), CASES)
def test_without_the_watch_old_kv_would_answer(
    host: EngineHost, smollm2: str, other_weights: str, way: str, where: str
) -> None:
    tokens = new_prompt()
    _, turn, truth = host.run(changed_unwatched, way, tokens, smollm2, other_weights, where)
    assert told(turn) == ((WHOLE, 0) if where == "device" else (0, WHOLE))
    assert turn.logprobs != pytest.approx(truth.logprobs, abs=1e-2)


def changed_while_running(
    engine: Engine, tokens: list[int], old: str, new: str
) -> tuple[Turn, Turn]:
    """A request begins on the old weights and ends on the new ones; then its text is a prompt."""
    from vllm import SamplingParams

    reload(engine, old)
    llm = engine.llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=3 * BLOCK, ignore_eos=True)
    llm.add_request("runs", {"prompt_token_ids": tokens}, params)
    out: Any = None
    while out is None or len(out.outputs[0].token_ids) < BLOCK // 2:
        (out,) = llm.step() or (out,)
    reload(engine, new)
    while not out.finished:
        (out,) = llm.step() or (out,)
    longer = [*tokens, *out.outputs[0].token_ids]
    ask(engine, tokens)  # the prompt's own blocks are new, and those after it would be found
    return ask(engine, longer), computed(engine, longer)


def test_nobody_finds_what_a_running_request_goes_on_to_fill(
    host: EngineHost, smollm2: str, other_weights: str
) -> None:
    turn, truth = host.run(changed_while_running, new_prompt(), smollm2, other_weights)
    assert told(turn) == (WHOLE, 0)
    assert_agrees(turn, truth)


def harmless(engine: Engine, name: str) -> bool:
    before = engine.half.live.epoch
    engine.llm.collective_rpc(name)
    return bool(engine.half.live.epoch == before)


@pytest.mark.parametrize("name", ["check_health", "compute_weight_checksums", "get_kv_cache_spec"])
def test_calls_that_only_look_change_nothing(host: EngineHost, name: str) -> None:
    assert host.run(harmless, name)


def update_without_a_trainer(engine: Engine) -> tuple[str, bool]:
    before = engine.half.live.epoch
    try:
        engine.llm.collective_rpc("update_weights", kwargs={"update_info": {}})
    except RuntimeError as error:
        return str(error), engine.half.live.epoch != before
    return "", engine.half.live.epoch != before


def test_a_transfer_that_fails_is_the_callers_to_see_and_counts(host: EngineHost) -> None:
    error, counted = host.run(update_without_a_trainer)
    assert "Weight transfer not configured" in error
    assert counted


def ends(engine: Engine) -> tuple[bool, bool]:
    """Whether vLLM's functions are wrapped while kvmem watches, and afterwards."""
    from vllm.v1.engine.core import EngineCore

    names = [name for _, name in engine.half.live._watched]

    def wrapped() -> list[bool]:
        return [hasattr(vars(EngineCore)[name], "__wrapped__") for name in names]

    watching = all(wrapped())
    with unwatched(engine):
        return watching, any(wrapped())


def test_the_engines_functions_are_its_own_again(host: EngineHost) -> None:
    assert host.run(ends) == (True, False)
