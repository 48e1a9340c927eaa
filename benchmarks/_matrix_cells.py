"""The scenarios of the engine matrix that any model goes through, inside the engine's own process.

Each asks prompts whose KV must come from kvmem's host tier, and compares with the engine's own
prefix hit of the same prompts: that has the same shapes, so tokens are equal and logprobs to five
decimals. Where it can it compares with the prompt computed whole too; in float32 they agree to
rounding. A scenario answers in a few words what it saw, or raises `WrongError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks import _matrix_features, _models
from benchmarks._matrix_engine import Engine, Turn
from benchmarks._matrix_judge import (
    NO_KVMEM,
    ROUNDING,
    SHAPES,
    Twice,
    agree,
    expect,
    from_host,
    itself,
    same,
)

__all__ = ["SCENARIOS"]

Scenario = Callable[[Engine], str]


def hit(engine: Engine) -> str:
    """Prompts of several lengths, at and beside a block's border."""
    block, counts = engine.block, []
    before = engine.loaded_tokens()
    longest = min(7 * block, 700)
    for i, n in enumerate((longest + 5, longest, 3 * block + 1)):
        twice = Twice(engine, _models.prompt(n, 100 + i))
        twice.check()
        counts.append(f"{twice.restored.host} of {n}")
    loaded = engine.loaded_tokens() - before
    expect(loaded > 0, "vLLM counts no token from outside the device")
    return f"from host {', '.join(counts)}"


def reply(engine: Engine) -> str:
    """The blocks of an answer are the next turn's prompt."""
    block, told = engine.block, []
    # The last sampled token has no KV: 8 of them leave the block one short. Long answers only
    # where blocks are short.
    lengths = (8, 9, 2 * block + 9) if block <= 64 else (8, 9)
    for i, n_reply in enumerate(lengths):
        prompt = _models.prompt(4 * block - 8, 200 + i)
        first = engine.one(prompt, n_reply)
        engine.settle()
        following = [*prompt, *first.tokens, *_models.prompt(20, 300 + i)]
        native = engine.one(following, kvmem={"store": False})
        engine.forget_device()
        restored = engine.one(following, kvmem={"store": False})
        from_host(restored, "a turn after an answer")
        complete = (len(prompt) + n_reply - 1) // block * block
        expect(restored.cached <= complete, f"{restored.cached} tokens, {complete} had KV")
        expect(restored.cached >= min(native.cached, complete), "the answer was not stored")
        if restored.cached == native.cached:
            same(restored, native, "next turn from host and from the device")
        engine.forget_device()
        if engine.setup.exact_dtype:
            whole = engine.one(following, kvmem=NO_KVMEM)
            agree(restored, whole, "next turn from host and computed whole")
        told.append(f"{restored.host} of {len(following)}")
    return f"from host {', '.join(told)}"


def shared(engine: Engine) -> str:
    """A prefix that two prompts share, then each its own way."""
    block = engine.block
    prefix = _models.prompt(5 * block, 400)
    first, second = ([*prefix, *_models.prompt(2 * block + 3, 401 + i)] for i in range(2))
    engine.one(first)
    native = engine.one(second, kvmem={"store": False})
    engine.forget_device()
    restored = engine.one(second, kvmem={"store": False})
    if native.cached == 0:
        expect(restored.host <= len(prefix), "more came from host than was shared")
    else:
        from_host(restored, "a shared prefix")
    if restored.cached == native.cached:
        same(restored, native, "after a shared prefix")
    engine.forget_device()
    if engine.setup.exact_dtype:
        whole = engine.one(second, kvmem=NO_KVMEM)
        agree(restored, whole, "after a shared prefix and computed whole")
    return f"from host {restored.host}, the engine's own {native.cached} of {len(second)}"


def many(engine: Engine) -> str:
    """Eight at once, some sharing, loads beside forwards."""
    block = engine.block
    prefix = _models.prompt(3 * block, 500)
    prompts = [[*prefix, *_models.prompt(block * (i % 3 + 1) + i, 501 + i)] for i in range(8)]
    alone = [engine.one(p, 12, kvmem={"load": False}) for p in prompts]
    engine.forget_device()
    together = engine.ask(prompts, 12)
    expect(sum(t.host for t in together) > 0, "nothing came from the host tier")
    if engine.setup.exact_dtype:
        engine.forget_device()
        without = engine.ask(prompts, 12, kvmem=NO_KVMEM)
        for turn, oracle in zip(without, alone, strict=True):
            itself(turn, oracle, "one of many and alone", within=10 * SHAPES)
    for turn, oracle in zip(together, alone, strict=True):
        _in_a_batch(engine, turn, oracle)
    return f"from host {sum(t.host for t in together)} of {sum(map(len, prompts))}"


def _in_a_batch(engine: Engine, turn: Turn, oracle: Turn) -> None:
    if engine.setup.exact_dtype:
        agree(turn, oracle, "one of many and alone", within=10 * SHAPES)
    else:
        expect(len(turn.tokens) == len(oracle.tokens), "an answer is short")


def chunked(engine: Engine) -> str:
    """A prompt of many steps; a hit that ends in the middle of one."""
    prompt = _models.prompt(700, 600)
    step = engine.scheduler.scheduler_config.max_num_batched_tokens
    expect(5 * step < len(prompt), "the prompt is not chunked")
    Twice(engine, prompt).check()
    longer = [*prompt[:333], *_models.prompt(300, 601)]
    engine.forget_device()
    restored = engine.one(longer)
    expect(restored.host == 333 // engine.block * engine.block, f"{restored.host} from host")
    engine.forget_device()
    agree(restored, engine.one(longer, kvmem=NO_KVMEM), "a hit within a step")
    return f"{-(-len(prompt) // step)} steps a prompt"


def salt(engine: Engine) -> str:
    """Another salt sees nothing; its own does."""
    prompt = _models.prompt(6 * engine.block + 3, 700)
    mine = engine.one(prompt, salt="a")
    engine.forget_device()
    other = engine.one(prompt, salt="b")
    expect(other.cached == 0, f"{other.cached} tokens of another tenant's")
    engine.forget_device()
    again = engine.one(prompt, salt="a")
    from_host(again)
    agree(again, mine, "with its own salt")
    return f"from host {again.host}, {other.cached} under another salt"


def load_off(engine: Engine) -> str:
    """A request may do without."""
    prompt = _models.prompt(6 * engine.block + 3, 800)
    cold = engine.one(prompt)
    engine.forget_device()
    off = engine.one(prompt, kvmem={"load": False})
    expect(off.cached == 0, "it loaded all the same")
    same(off, cold, "without loads")
    return "computed"


_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


def structured(engine: Engine) -> str:
    """A grammar masks tokens of an answer whose prompt came from the host tier."""
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(json=_SCHEMA, disable_any_whitespace=True)
    twice = Twice(
        engine,
        _models.prompt(6 * engine.block + 3, 900),
        60,
        structured_outputs=grammar,
        ignore_eos=False,
    )
    twice.check()
    text = "".join(twice.restored.text.split())
    expect(text.startswith('{"name":'), f"no JSON: {text!r}")
    return f"{len(text)} characters of JSON, from host {twice.restored.host}"


def parallel(engine: Engine) -> str:
    """Three samples of one prompt, each a request of its own inside."""
    prompt = _models.prompt(6 * engine.block + 3, 1000)
    wishes: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 7}
    before = engine.loaded_tokens()
    cold = engine.one(prompt, **wishes)
    engine.forget_device()
    expect(engine.loaded_tokens() == before, "a new prompt was loaded")
    restored = engine.one(prompt, **wishes)
    loaded = engine.loaded_tokens() - before
    expect(loaded > 0, "nothing came from the host tier")
    agree(restored, cold, "three samples", within=10 * SHAPES)
    third = len(cold.tokens) // 3
    expect(cold.tokens[:third] != cold.tokens[third : 2 * third], "the samples are one")
    return f"from host {loaded} for three"


def prompt_logprobs(engine: Engine) -> str:
    """They need the whole prompt computed; what it stored serves the next request."""
    prompt = _models.prompt(6 * engine.block + 3, 1100)
    cold = engine.one(prompt, prompt_logprobs=0)
    engine.forget_device()
    again = engine.one(prompt, prompt_logprobs=0)
    expect(len(again.prompt_logprobs) == len(prompt) - 1, "some prompt logprobs are missing")
    apart = max(
        abs(a - b) for a, b in zip(again.prompt_logprobs, cold.prompt_logprobs, strict=True)
    )
    expect(apart <= ROUNDING, f"prompt logprobs differ by {apart:.2g}")
    engine.forget_device()
    plain = engine.one(prompt)
    from_host(plain)
    agree(plain, cold, "after a request with prompt logprobs")
    return f"from host {again.host} with them, {plain.host} without"


def seeded(engine: Engine) -> str:
    """Temperature 1 with a seed: the same samples from the same logits."""
    twice = Twice(engine, _models.prompt(6 * engine.block + 3, 1200), 24, temperature=1.0, seed=11)
    twice.check()
    greedy = engine.one(_models.prompt(6 * engine.block + 3, 1200), 24)
    expect(greedy.tokens != twice.restored.tokens, "the samples are the greedy ones")
    return f"from host {twice.restored.host}"


def abort(engine: Engine) -> str:
    """Aborts while a load is under way, in a prefill, in a decode: nothing stays, nobody errs."""
    block = engine.block
    for i, steps in enumerate((0, 1, 2, 5)):
        prompt = _models.prompt(10 * block + 7, 1300 + i)
        cold = engine.one(prompt)
        engine.forget_device()
        engine.start(f"gone-{i}", prompt, 50)
        for _ in range(steps):
            engine.step()
        engine.abort(f"gone-{i}")
        engine.settle()
        restored = engine.one(prompt)
        agree(restored, cold, f"after an abort at step {steps}")
    return "at steps 0, 1, 2 and 5"


def reset_device(engine: Engine) -> str:
    """A plain reset leaves kvmem what it has."""
    prompt = _models.prompt(6 * engine.block + 3, 1400)
    engine.one(prompt)
    engine.forget_device()
    restored = engine.one(prompt)
    from_host(restored)
    return f"from host {restored.host} after it"


def reset_all(engine: Engine) -> str:
    """A reset that reaches connectors leaves nothing to answer."""
    prompt = _models.prompt(6 * engine.block + 3, 1500)
    cold = engine.one(prompt)
    expect(engine.forget_everything(), "the reset failed")
    again = engine.one(prompt)
    expect(again.cached == 0, f"{again.cached} tokens from before the reset")
    same(again, cold, "computed again")
    return f"computed; the reason told is {again.report.get('miss')!r}"


def control(engine: Engine) -> str:
    """vLLM alone, without kvmem: whether it runs this setup, and agrees with itself."""
    longest = min(7 * engine.block, 700)
    prompt = _models.prompt(longest + 5, 100)
    if engine.setup.options.get("runner") == "pooling":
        engine.embed(prompt)
        return json.dumps({"runs": True})
    cold, native = engine.one(prompt), engine.one(prompt)
    if engine.setup.exact_dtype:
        agree(native, cold, "vLLM's own hit and its whole prefill")
    return json.dumps({"runs": True, "cached": native.cached})


SCENARIOS: dict[str, Scenario] = {
    **_matrix_features.SCENARIOS,
    **{
        scenario.__name__: scenario
        for scenario in (
            hit, reply, shared, many, chunked, salt, load_off, structured, parallel,
            prompt_logprobs, seeded, abort, reset_device, reset_all, control,
        )
    },
}  # fmt: skip
