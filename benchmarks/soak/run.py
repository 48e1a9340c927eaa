"""One soak from start to verdict."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks import _corpus
from benchmarks._process import leftovers, shared_memory
from benchmarks.soak import engines
from benchmarks.soak.asks import Answer, Ask, Call
from benchmarks.soak.oracle import Judge, Judgement
from benchmarks.soak.plan import Plan
from benchmarks.soak.rounds import Soak
from benchmarks.soak.traffic import library
from benchmarks.soak.verdict import Evidence, Verdict, verdict
from benchmarks.soak.watch import errors_in, growth
from tests.adapters import config_of, make_adapter

__all__ = ["run"]

_TEXT_CHARS = 400_000
_TELL_EVERY = 50  # requests of the oracle's


def run(plan: Plan, model: Path, tell: Callable[[str], None] = print) -> Verdict:
    """Plays the plan, asks the oracle, and says what was found; `tell` gets lines of progress."""
    before = shared_memory()
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(_corpus.real_text(_TEXT_CHARS))
    adapters = _adapters(plan, model)
    arena = f"soak-{os.getpid()}"
    with engines.under_test(plan, model, adapters, arena=arena) as engine:
        engine.wait_ready()
        tell(f"kvmem serves; {plan.minutes:g} minutes in {len(plan.rounds)} rounds")
        played = Soak(engine, library(ids.ids, plan), plan, tell)
        asyncio.run(played.play())
        engine.stop()
    log_errors = errors_in(engine.log.read_text(encoding="utf-8", errors="replace"))
    judgement = _judged(plan, model, adapters, played.calls, tell)
    seen = Evidence(
        judgement=judgement,
        happened=played.happened,
        failed=played.failed,
        held=played.held,
        growth=growth(played.memory),
        last_memory=played.memory[-1],
        log_errors=log_errors,
        page=played.page,
        preemptions=played.preemptions,
        left_behind=leftovers(before, (arena,)),
    )
    _explain(seen, played, tell)
    return verdict(plan, seen)


def _adapters(plan: Plan, model: Path) -> dict[str, Path]:
    """Random LoRA adapters by the name that requests give."""
    config = config_of(model)
    return {
        f"adapter-{i}": make_adapter(plan.folder / f"adapter-{i}", seed=i, config=config)
        for i in range(plan.adapters)
    }


def _judged(
    plan: Plan,
    model: Path,
    adapters: dict[str, Path],
    calls: list[Call],
    tell: Callable[[str], None],
) -> Judgement:
    with engines.oracle(plan, model, adapters) as engine:
        engine.wait_ready()
        return asyncio.run(_judge(engine, calls, tell))


async def _judge(
    engine: engines.Engine, calls: list[Call], tell: Callable[[str], None]
) -> Judgement:
    def told(done: int, of: int) -> None:
        if done % _TELL_EVERY == 0 or done == of:
            tell(f"  the oracle answered {done} of {of} distinct requests")

    async with engine.client() as client:

        async def answer(ask: Ask) -> Answer:
            given = await client.ask(ask)
            assert given is not None  # it does not give up
            return given

        return await Judge(answer, told).judge(calls)


def _explain(seen: Evidence, played: Soak, tell: Callable[[str], None]) -> None:
    """Everything that the closing line only counts."""
    tell(f"happened: {dict(sorted(seen.happened.items()))}")
    first, last = played.memory[0], played.memory[-1]
    for role, share in seen.growth.items():
        mib = [sum(m.values()) if role == "all" else m.get(role, 0) for m in (first, last)]
        tell(f"memory of {role}: {mib[0] >> 20} MiB first, {mib[1] >> 20} last, {share:+.2%}")
    for wrong in seen.judgement.wrong[:20]:
        asked = f"{wrong.ask.kind}, {len(wrong.ask.prompt)} tokens"
        tell(f"WRONG: {asked}, from token {wrong.place}: {wrong.why}")
    for what, lines in (("failed", seen.failed), ("held", seen.held), ("log", seen.log_errors)):
        for line in lines[:20]:
            tell(f"{what.upper()}: {line}")
