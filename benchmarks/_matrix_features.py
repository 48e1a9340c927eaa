"""The scenarios of the engine matrix for features that an engine is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import _models
from benchmarks._matrix_engine import Engine
from benchmarks._matrix_judge import NO_KVMEM, SHAPES, Twice, agree, expect, from_host

__all__ = ["SCENARIOS"]

_ANSWER = 80  # tokens: what fits together at first must not fit to the end


def preempted(engine: Engine) -> str:
    """More than the device holds at once."""
    return _crowded(engine, None)


def priorities(engine: Engine) -> str:
    """The same under --scheduling-policy priority, the last the most urgent."""
    return _crowded(engine, list(range(8, 0, -1)))


def _crowded(engine: Engine, order: list[int] | None) -> str:
    prompts = [_models.prompt(7 * engine.block + i, 1600 + i) for i in range(8)]
    alone = [engine.one(p, _ANSWER, kvmem={"load": False}) for p in prompts]
    engine.forget_device()
    before = engine.counter("vllm:num_preemptions")
    together = engine.ask(prompts, _ANSWER, priorities=order)
    n = engine.counter("vllm:num_preemptions") - before
    expect(n > 0, "nobody was preempted")
    expect(sum(t.host for t in together) > 0, "nothing came from the host tier")
    for turn, oracle in zip(together, alone, strict=True):
        agree(turn, oracle, "preempted and alone", within=10 * SHAPES)
    return f"{n} preemptions, from host {sum(t.host for t in together)}"


def speculated(engine: Engine) -> str:
    """Drafts are accepted and rejected; only what was accepted is stored."""
    block = engine.block
    drafts, accepted = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
    before = engine.counter(drafts), engine.counter(accepted)
    for i in range(4):
        prompt = _models.prompt(7, 1700 + i) * (block // 2)
        first = engine.one(prompt, 4 * block + 1)
        engine.settle()
        following = [*prompt, *first.tokens, *_models.prompt(9, 1750 + i)]
        engine.forget_device()
        restored = engine.one(following)
        from_host(restored, "a turn after drafts")
        engine.forget_device()
        agree(restored, engine.one(following, kvmem=NO_KVMEM), "a turn after drafts")
    n, good = engine.counter(drafts) - before[0], engine.counter(accepted) - before[1]
    expect(0 < good < n, f"{good} of {n} drafts accepted: both kinds are needed")
    return f"{good} of {n} drafts accepted"


def _adapter(engine: Engine, name: str, number: int, path: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path))


def _made(engine: Engine, name: str, seed: int) -> Path:
    return _models.adapter(engine.model, engine.model.parent / "adapters" / name, seed=seed)


def adapter_hit(engine: Engine) -> str:
    """One adapter's prompt from the host tier."""
    adapter = _adapter(engine, "a", 1, _made(engine, "a", 1))
    twice = Twice(engine, _models.prompt(6 * engine.block + 3, 1800), adapter=adapter)
    twice.check()
    return f"from host {twice.restored.host}"


def adapters_apart(engine: Engine) -> str:
    """One prompt for the base and two adapters: each gets its own KV back."""
    prompt = _models.prompt(6 * engine.block + 3, 1900)
    users = [
        None,
        *(_adapter(engine, n, i + 1, _made(engine, n, i + 1)) for i, n in ((0, "a"), (1, "b"))),
    ]
    cold = [engine.one(prompt, adapter=user) for user in users]
    expect(all(turn.cached == 0 for turn in cold), "one was served another's KV")
    expect(len({tuple(t.tokens) for t in cold}) == 3, "the adapters answer alike")
    engine.forget_device()
    for user, oracle in zip(users, cold, strict=True):
        restored = engine.one(prompt, adapter=user)
        from_host(restored)
        agree(restored, oracle, "base" if user is None else f"adapter {user.lora_name}")
    return "base, a and b from host"


def adapter_changed(engine: Engine) -> str:
    """New content at an adapter's path: what the old one stored must not answer."""
    prompt = _models.prompt(6 * engine.block + 3, 2000)
    path = _made(engine, "c", 3)
    old = engine.one(prompt, adapter=_adapter(engine, "c", 3, path))
    elsewhere = _adapter(engine, "d", 4, _made(engine, "d", 4))
    wanted = engine.one(prompt, adapter=elsewhere)
    expect(old.tokens != wanted.tokens, "old and new content answer alike")
    engine.llm.llm_engine.remove_lora(3)
    _made(engine, "c", 4)
    new = engine.one(prompt, adapter=_adapter(engine, "c", 5, path))
    agree(new, wanted, "new content at the same path")
    return f"{new.cached} tokens cached of the old content"


def embedded(engine: Engine) -> str:
    """An embedding of a prompt that was seen before is the one computed whole."""
    prompt = _models.prompt(6 * engine.block + 3, 2100)
    cold, n_cold = engine.embed(prompt)
    engine.forget_device()
    again, n_again = engine.embed(prompt)
    expect(n_cold == 0, f"a new prompt had {n_cold} tokens cached")
    apart = max(abs(a - b) for a, b in zip(cold, again, strict=True))
    expect(apart <= SHAPES, f"embeddings differ by {apart:.2g}")
    return f"from host {n_again} of {len(prompt)}"


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        preempted, priorities, speculated, adapter_hit, adapters_apart, adapter_changed, embedded,
    )
}  # fmt: skip
