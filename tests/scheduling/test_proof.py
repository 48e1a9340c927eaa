"""No prompt is answered from kvmem before the proof at start, nor ever after one that failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmem import events
from kvmem.engines.vllm import worker
from tests.scheduling.engine import running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_disk import PROMPT, WHOLE, at_rest
from tests.scheduling.test_steps import stored

DISK_GB = 0.01
pytestmark = pytest.mark.engine


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def start(
    request: pytest.FixtureRequest,
    config: Any,
    new_arena_name: Callable[[], str],
    tmp_path: Path,
) -> Callable[..., Any]:
    def start(**options: Any) -> Any:
        settings = {"disk_gb": DISK_GB, "disk_path": str(tmp_path / "disk"), "n_host": 40}
        return running(
            config, asynchronous=request.param, arena=new_arena_name(), **settings | options
        )

    return start


@pytest.mark.parametrize("groups", ["full", "hybrid", "windows", "chunks"])
def test_the_first_prompt_after_a_restart_waits_for_the_proof(
    start: Callable[..., Any], groups: str
) -> None:
    with start(groups=groups, n_host=120) as engine:
        stored(engine, PROMPT)
        at_rest(engine)
    with start(groups=groups, n_host=120) as engine:
        assert engine.half.proofs.wanted
        turn = engine.generate(PROMPT, 4)
        assert turn.receipt["tokens"]["disk"] == WHOLE * BLOCK
        assert not engine.half.proofs.wanted
        told = [e for e in engine.half.bus.recent() if isinstance(e, events.Proof)]
        assert [(e.tier, e.error) for e in told] == [("disk", ""), ("host", "")]
        engine.assert_settled()


def test_a_proof_that_gets_lost_is_asked_for_again(start: Callable[..., Any]) -> None:
    with start() as engine:
        half = engine.worker.worker
        real, lost = half.acks, []

        def acks() -> Any:
            told = real()
            if told is not None and told.proofs and len(lost) < 3:
                lost.append(told.proofs)
                told.proofs = []
            return told

        half.acks = acks
        stored(engine, PROMPT)
        assert engine.generate(PROMPT, 4).receipt["tokens"]["host"] == WHOLE * BLOCK
        assert len(lost) == 3
        engine.assert_settled()


def test_a_proof_that_failed_costs_the_hits_and_nothing_else(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "prove", lambda *_: "block 4 of tensor 1 came back as another")
    with start() as engine:
        engine.faulted = True
        stored(engine, PROMPT)
        turn = engine.generate(PROMPT, 20)
        assert (turn.receipt["tokens"]["host"], turn.receipt["tokens"]["disk"]) == (0, 0)
        assert (turn.receipt["miss"], turn.receipt["off"]["load"]) == ("load_off", "proof")
        assert "block 4 of tensor 1" in engine.half.page.last_failure
        engine.assert_settled()


def test_a_proof_that_raises_is_one_that_failed(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any) -> str:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(worker, "prove", raises)
    with start() as engine:
        engine.faulted = True
        stored(engine, PROMPT)
        assert engine.generate(PROMPT, 4).receipt["off"]["load"] == "proof"
        assert "no such kernel" in engine.half.page.last_failure
        engine.assert_settled()


def test_a_proof_that_never_comes_holds_nobody_up(start: Callable[..., Any]) -> None:
    with start() as engine:
        engine.worker.worker._acks.proofs = []
        half = engine.worker.worker
        real = half.acks

        def acks() -> Any:
            told = real()
            if told is not None:
                told.proofs = []
            return told

        half.acks = acks
        now = [0.0]
        engine.half.proofs._clock = lambda: now[0]
        stored(engine, PROMPT)
        waits = engine.add(PROMPT, 4)
        for _ in range(50):
            engine.step()
        assert engine.turns[waits].tokens == []
        now[0] += 6.0
        engine.drain()
        assert engine.turns[waits].receipt["off"]["load"] == "proof"
        engine.assert_settled()
