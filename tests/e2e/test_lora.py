"""LoRA adapters on a real engine: the base model and each adapter find their own KV only.

An adapter is what the engine has loaded, not its name, its path or what lies at its path by now.
The oracle is another adapter with the same content, or the same prompt computed whole. Where
kvmem's watch is taken out, the engine serves text of the former content: from vLLM's own cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import config_of, make_adapter
from tests.e2e.host import (
    BLOCK,
    Engine,
    EngineHost,
    Turn,
    assert_agrees,
    assert_same,
    assert_settled,
    prompt,
)

pytestmark = pytest.mark.engine

N_TOKENS = 200
WHOLE = (N_TOKENS - 1) // BLOCK * BLOCK
LORAS_HELD = 8

Lora = tuple[str, int, str]
_seeds = itertools.count(500)
_ids = itertools.count(1)


@pytest.fixture(scope="module")
def host(smollm2: str) -> Iterator[EngineHost]:
    host = EngineHost(
        smollm2,
        kvmem={"host_gb": 0.5},
        enable_lora=True,
        max_loras=LORAS_HELD,
        max_lora_rank=8,
    )
    yield host
    host.close()


@pytest.fixture(autouse=True)
def _nothing_is_left(host: EngineHost) -> Iterator[None]:
    yield
    host.run(assert_settled)


Make = Callable[..., Lora]


@pytest.fixture
def make(smollm2: str, tmp_path: Path) -> Make:
    """Writes an adapter of a seed's content; a new id where none is given."""

    def make(name: str, seed: int, i: int | None = None) -> Lora:
        path = make_adapter(tmp_path / name, seed=seed, config=config_of(smollm2))
        return name, next(_ids) if i is None else i, str(path)

    return make


def new_prompt() -> list[int]:
    return prompt(N_TOKENS, next(_seeds))


def ask(engine: Engine, tokens: list[int], lora: Lora | None = None, **kvmem: bool) -> Turn:
    return engine.generate([tokens], lora=lora, kvmem=kvmem or None)[0]


def use_once(engine: Engine, tokens: list[int], lora: Lora) -> None:
    engine.generate([tokens], 1, lora=lora)


def computed(engine: Engine, tokens: list[int], lora: Lora | None = None) -> Turn:
    """The truth: nothing of the prompt comes from anywhere, and nothing is kept of it."""
    engine.forget_device()
    turn = ask(engine, tokens, lora, load=False, store=False)
    engine.forget_device()
    assert turn.receipt["tokens"]["computed"] == len(tokens)
    return turn


def told(turn: Turn) -> tuple[int, int]:
    return turn.receipt["tokens"]["device"], turn.receipt["tokens"]["host"]


# -- nothing mixes -------------------------------------------------------------------------------


def at_once(engine: Engine, tokens: list[int], loras: list[Lora | None]) -> list[Turn]:
    """One batch of all of them.

    vLLM's kernels for the CPU take a base request's adapter index of -1 literally where a batch has
    adapters too (vLLM pull request 48421): with kvmem or without, the last place must be empty.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    runner = engine.core.model_executor.driver_worker.model_runner
    assert runner.lora_manager._adapter_manager.lora_index_to_id[-1] is None

    outs = engine.llm.generate(
        [{"prompt_token_ids": tokens}] * len(loras),
        SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0),
        use_tqdm=False,
        lora_request=[LoRARequest(*lora) if lora else None for lora in loras],
    )
    return [
        Turn(tokens=list(o.outputs[0].token_ids), receipt=o.kv_transfer_params["kvmem"])
        for o in outs
    ]


def test_one_batch_of_base_and_adapters_does_not_mix(host: EngineHost, make: Make) -> None:
    tokens = new_prompt()
    loras = [None, make("one", 3), make("two", 4)]
    truth = [host.run(computed, tokens, lora) for lora in loras]
    for where in ((0, 0), (0, WHOLE)):
        turns = host.run(at_once, tokens, loras)
        assert [told(turn) for turn in turns] == [where] * 3
        assert [turn.tokens for turn in turns] == [turn.tokens for turn in truth]
        host.run(Engine.forget_device)


def each_in_turn(engine: Engine, tokens: list[int], loras: list[Lora | None]) -> list[Turn]:
    return [ask(engine, tokens, lora) for lora in loras]


def test_base_and_adapters_find_their_own_kv_only(host: EngineHost, make: Make) -> None:
    tokens = new_prompt()
    loras = [None, make("one", 1), make("two", 2)]
    cold = host.run(each_in_turn, tokens, loras)
    assert [told(turn) for turn in cold] == [(0, 0)] * 3
    assert len({tuple(turn.tokens) for turn in cold}) == 3  # or it would not show
    native = host.run(each_in_turn, tokens, loras)
    assert [told(turn) for turn in native] == [(WHOLE, 0)] * 3
    host.run(Engine.forget_device)
    restored = host.run(each_in_turn, tokens, loras)
    assert [told(turn) for turn in restored] == [(0, WHOLE)] * 3
    for one, two, three in zip(restored, native, cold, strict=True):
        assert_same(one, two)
        assert_agrees(one, three)


# -- the same path, new content ------------------------------------------------------------------


def load(engine: Engine, lora: Lora, *, in_place: bool) -> None:
    from vllm.lora.request import LoRARequest

    assert engine.llm.llm_engine.add_lora(LoRARequest(*lora, load_inplace=in_place))


def remove(engine: Engine, lora: Lora) -> None:
    assert engine.llm.llm_engine.remove_lora(lora[1])


@contextmanager
def unwatched(engine: Engine) -> Iterator[None]:
    """As if an adapter were known by its id alone."""
    live = engine.half.live
    real = live._adapters
    live._adapters = None
    try:
        yield
    finally:
        live._adapters = real


def reloaded(
    engine: Engine, tokens: list[int], old: Lora, new: Lora, how: str, watched: bool
) -> tuple[Turn, Turn]:
    """The prompt by an adapter whose content was replaced: from what the device and kvmem keep."""
    ask(engine, tokens, old)
    engine.settle()
    if how == "in place":
        load(engine, new, in_place=True)
    else:
        remove(engine, old)
        load(engine, new, in_place=False)
    if not watched:
        with unwatched(engine):
            return ask(engine, tokens, new), computed(engine, tokens, new)
    return ask(engine, tokens, new), computed(engine, tokens, new)


@pytest.mark.parametrize("how", ["in place", "removed, added with its id", "added with a new id"])
def test_new_content_at_the_same_path_finds_nothing_of_the_old(
    host: EngineHost, make: Make, how: str
) -> None:
    tokens = new_prompt()
    old = make("same", 5)
    host.run(ask, tokens, old)
    new = make("same", 6, None if how.endswith("new id") else old[1])
    assert new[2] == old[2]
    turn, truth = host.run(reloaded, tokens, old, new, how, True)
    assert told(turn) == (0, 0)
    assert_agrees(turn, truth)
    # What was computed anew is found again, on the device and in the host tier.
    host.run(ask, tokens, new)
    assert told(host.run(ask, tokens, new)) == (WHOLE, 0)
    host.run(Engine.forget_device)
    assert told(host.run(ask, tokens, new)) == (0, WHOLE)


@pytest.mark.parametrize("how", ["in place", "added with a new id"])
def test_without_the_watch_the_old_content_would_answer(
    host: EngineHost, make: Make, how: str
) -> None:
    tokens = new_prompt()
    old = make("same", 7)
    host.run(computed, tokens, old)
    new = make("same", 8, None if how.endswith("new id") else old[1])
    turn, truth = host.run(replaced_unwatched, tokens, old, new, how)
    assert told(turn) == (WHOLE, 0)
    assert turn.tokens != truth.tokens


def replaced_unwatched(
    engine: Engine, tokens: list[int], old: Lora, new: Lora, how: str
) -> tuple[Turn, Turn]:
    with unwatched(engine):
        answer = reloaded(engine, tokens, old, new, how, False)
    engine.half.cache.drop("test")  # what was stored meanwhile is of nobody knows which content
    engine.forget_device()
    return answer


def replaced_while_running(
    engine: Engine, tokens: list[int], old: Lora, new: Lora
) -> tuple[Turn, Turn]:
    """A request of the old content runs on while the new one is loaded in place."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm = engine.llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=3 * BLOCK, ignore_eos=True)
    llm.add_request("runs", {"prompt_token_ids": tokens}, params, lora_request=LoRARequest(*old))
    out: Any = None
    while out is None or len(out.outputs[0].token_ids) < BLOCK // 2:
        (out,) = llm.step() or (out,)
    load(engine, new, in_place=True)
    while not out.finished:
        (out,) = llm.step() or (out,)
    longer = [*tokens, *out.outputs[0].token_ids]
    ask(engine, tokens, new)  # the prompt's own blocks are new, and those after it would be found
    return ask(engine, longer, new), computed(engine, longer, new)


def test_nobody_finds_what_a_request_of_the_old_content_goes_on_to_fill(
    host: EngineHost, make: Make
) -> None:
    old = make("same", 9)
    tokens = new_prompt()
    host.run(ask, tokens, old)
    new = make("same", 10, old[1])
    turn, truth = host.run(replaced_while_running, tokens, old, new)
    assert told(turn) == (WHOLE, 0)
    assert_agrees(turn, truth)


# -- files that change without a load ------------------------------------------------------------


def test_an_adapter_that_is_loaded_stays_itself_when_its_files_change(
    host: EngineHost, make: Make
) -> None:
    tokens = new_prompt()
    lora = make("same", 11)
    first = host.run(ask, tokens, lora)
    make("same", 12, lora[1])
    assert told(host.run(ask, tokens, lora)) == (WHOLE, 0)
    host.run(Engine.forget_device)
    turn = host.run(ask, tokens, lora)
    assert told(turn) == (0, WHOLE)
    assert_agrees(turn, first)
    assert_agrees(host.run(computed, tokens, lora), first)  # the engine serves it still


def test_an_adapter_that_made_room_is_what_is_loaded_again(host: EngineHost, make: Make) -> None:
    tokens = new_prompt()
    lora = make("same", 13)
    first = host.run(ask, tokens, lora)
    make("same", 14, lora[1])
    for n in range(LORAS_HELD):  # the engine has no room for it any more, and reads its files anew
        host.run(use_once, prompt(40, 900 + n), make(f"other {n}", 20 + n))
    turn = host.run(ask, tokens, lora)
    assert told(turn) == (0, 0)
    assert turn.tokens != first.tokens
    assert_agrees(turn, host.run(computed, tokens, lora))


def changed_after_the_lookup(
    engine: Engine, tokens: list[int], lora: Lora, seed: int, config: dict[str, Any]
) -> None:
    """The files change between a request's lookup and its first step, which loads them."""
    half = engine.half
    real = half.orders

    def orders(output: Any) -> Any:
        half.orders = real
        make_adapter(Path(lora[2]), seed=seed, config=config)
        return real(output)

    half.orders = orders
    ask(engine, tokens, lora)
    engine.settle()


def test_nothing_is_kept_of_a_step_that_loaded_other_content_than_was_looked_up(
    host: EngineHost, make: Make, smollm2: str
) -> None:
    tokens = new_prompt()
    lora = make("same", 15)
    host.run(changed_after_the_lookup, tokens, lora, 16, config_of(smollm2))
    assert host.run(Engine.stats)["published"] == 0
    turn = host.run(ask, tokens, lora)
    assert told(turn) == (0, 0)
    assert_agrees(turn, host.run(computed, tokens, lora))
    make("same", 15, lora[1])
    lora = lora[0], next(_ids), lora[2]
    assert told(host.run(ask, tokens, lora)) == (0, 0)
