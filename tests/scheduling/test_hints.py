"""The order "agents" and hints under vLLM's own schedulers: what is kept, and what is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kvmem import events
from kvmem.engines.vllm.hinting import METHOD
from kvmem.policy import Agents
from tests.scheduling.engine import Engine, running
from tests.scheduling.forward import BLOCK

pytestmark = pytest.mark.engine

N_HOST = 40
LONG = 8 * BLOCK  # of a session's prompt


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def start(
    request: pytest.FixtureRequest, config: Any, new_arena_name: Callable[[], str]
) -> Callable[..., Any]:
    def start(**options: Any) -> Any:
        settings = {"eviction": "agents", "n_host": N_HOST, **options}
        return running(config, asynchronous=request.param, arena=new_arena_name(), **settings)

    return start


def talk(name: int, n_tokens: int) -> list[int]:
    """A prompt that no other one begins like."""
    return [1 + (name * 131 + i * (name + 7)) % 900 for i in range(n_tokens)]


def hint(engine: Engine, *actions: dict[str, Any], salt: str = "") -> list[dict[str, Any]]:
    """As vLLM's server hands an envelope to the engine."""
    asked = {"envelope": {"version": 1, "actions": list(actions)}, "cache_salt": salt}
    return json.loads(getattr(engine.core, METHOD)(json.dumps(asked)))["receipts"]


def crowd(engine: Engine, n: int = 10) -> None:
    """One-off prompts, more of them than there is room."""
    for i in range(n):
        engine.generate(talk(500 + i, LONG), 1)
        engine.check()


def here(engine: Engine, prompt: list[int], salt: str | None = None) -> int:
    """Its blocks in the host, counted without a use of them."""
    chains = engine.chains_of(prompt, salt)
    return engine.half.cache.match(chains, 0, len(prompt) // BLOCK * BLOCK) // BLOCK


def test_a_hinted_session_survives_and_a_dead_one_is_gone(start: Callable[..., Any]) -> None:
    with start() as engine:
        alive, dead = talk(1, LONG), talk(2, LONG)
        engine.generate(alive, 2, session="alive")
        engine.generate(dead, 2, session="dead")
        told = hint(
            engine,
            {"do": "retain", "session": "alive", "for_s": 600},
            {"do": "session_end", "session": "dead"},
        )
        assert [one["status"] for one in told] == ["accepted", "accepted"]
        crowd(engine)
        assert here(engine, dead) == 0
        assert here(engine, alive) == LONG // BLOCK
        engine.forget_device()
        turn = engine.generate([*alive, *talk(3, 5)], 4, session="alive")
        assert turn.receipt["tokens"]["host"] == LONG
        assert engine.half.totals.blocks_loaded == LONG // BLOCK
        engine.assert_settled()


def test_hints_come_with_a_request_and_receipts_with_its_answer(start: Callable[..., Any]) -> None:
    with start() as engine:
        prompt = talk(1, LONG)
        envelope = {"version": 1, "actions": [
            {"do": "pin", "for_s": 60, "tokens": 3 * BLOCK},
            {"do": "session_end", "session": "nobody"},
            {"do": "pin", "for_s": 1e9},
        ]}  # fmt: skip
        turn = engine.generate(prompt, 2, session="me", kvmem={"hints": envelope})
        told = {(one["do"], one["status"]): one for one in turn.receipt["hints"]}
        assert set(told) == {("pin", "rejected"), ("session_end", "missing"), ("pin", "accepted")}
        assert told["pin", "accepted"] == {
            "do": "pin", "status": "accepted", "session": "me", "blocks": 3, "for_s": 60.0,
        }  # fmt: skip
        crowd(engine)
        assert here(engine, prompt) >= 3
        hint(engine, {"do": "release", "session": "me"})
        engine.assert_settled()
        plain = engine.generate(prompt, 1, kvmem={})
        assert "hints" not in plain.receipt


def test_a_session_is_known_under_its_salt_only(start: Callable[..., Any]) -> None:
    with start() as engine:
        engine.generate(talk(1, LONG), 1, session="me", salt="mine")
        asked = {"do": "retain", "session": "me", "for_s": 9}
        assert hint(engine, asked)[0]["status"] == "missing"
        assert hint(engine, asked, salt="other")[0]["status"] == "missing"
        assert hint(engine, asked, salt="mine")[0]["status"] == "accepted"
        told = json.loads(getattr(engine.core, METHOD)('{"cache_salt": "mine"}'))["receipts"]
        assert [one["status"] for one in told] == ["accepted"]
        assert hint(engine, {"do": "release"})[0]["reason"] == "say which session"


def test_replies_are_part_of_what_a_branch_has(start: Callable[..., Any]) -> None:
    with start() as engine:
        prompt = talk(1, 2 * BLOCK)
        turn = engine.generate(prompt, 3 * BLOCK, session="me")
        keeping = engine.half.cache.keeping
        assert keeping.agents.keeper.n_branches == 1
        told = hint(engine, {"do": "retain", "session": "me", "for_s": 9})
        assert told[0]["blocks"] == (len(prompt) + 3 * BLOCK) // BLOCK
        engine.generate([*prompt, *turn.tokens, 7], 1, session="me")
        assert keeping.agents.keeper.n_branches == 1


def test_a_policy_that_fails_costs_no_request(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Agents, "trim", broken)
    with start() as engine:
        crowd(engine)
        engine.assert_settled()
        off = [e for e in engine.half.bus.recent() if isinstance(e, events.PolicyOff)]
        assert len(off) == 1
        assert engine.half.cache.stats()["evictions"] > 0
        told = hint(engine, {"do": "retain", "session": "me", "for_s": 9})
        assert (told[0]["status"], "off" in told[0]["reason"]) == ("rejected", True)


def test_models_with_windows_run_by_lru(config: Any, arena_name: str) -> None:
    with running(
        config, asynchronous=False, arena=arena_name, groups="windows", eviction="agents",
        n_host=24,
    ) as engine:  # fmt: skip
        crowd(engine, 4)
        assert engine.half.cache.stats()["policy"]["off"]
        engine.assert_settled()


def test_with_a_disk_both_tiers_are_asked_and_what_a_tool_ended_for_comes_up(
    start: Callable[..., Any], tmp_path: Any
) -> None:
    disk = {"disk_gb": 0.01, "disk_path": str(tmp_path / "disk")}
    with start(**disk) as engine:
        prompt = talk(1, LONG)
        engine.generate(prompt, 2, session="me")
        engine.rest_disk()
        told = hint(engine, {"do": "tool_started", "session": "me", "tool": "ls"})
        assert told[0]["status"] == "accepted"
        told = hint(engine, {"do": "demote", "session": "me"})
        assert (told[0]["status"], told[0]["blocks"]) == ("accepted", LONG // BLOCK)
        assert here(engine, prompt) == 0
        told = hint(engine, {"do": "prefetch", "session": "me"})
        assert (told[0]["status"], told[0]["blocks"]) == ("deferred", LONG // BLOCK)
        engine.rest_disk()
        assert here(engine, prompt) == LONG // BLOCK
        assert hint(engine, {"do": "prefetch", "session": "me"})[0]["status"] == "accepted"
        hint(engine, {"do": "demote", "session": "me"})
        told = hint(engine, {"do": "tool_ended", "session": "me", "tool": "ls"})
        assert told[0]["blocks"] == LONG // BLOCK
        engine.rest_disk()
        engine.forget_device()
        turn = engine.generate([*prompt, *talk(2, 5)], 2, session="me")
        assert turn.receipt["tokens"]["host"] == LONG
        crowd(engine, 30)
        engine.assert_settled()
        assert not engine.half.cache.keeping.off


def test_what_became_of_hints_and_who_leads_is_metered(start: Callable[..., Any]) -> None:
    with start() as engine:
        engine.generate(talk(1, LONG), 2, session="me")
        hint(engine, {"do": "retain", "session": "me", "for_s": 9})
        hint(engine, {"do": "retain", "session": "nobody", "for_s": 9})
        half = engine.half
        told = {(one.name, one.labels): one.value for one in half.telemetry.samples()}
        assert told["kvmem_hints_total", ("accepted",)] == 1
        assert told["kvmem_hints_total", ("missing",)] == 1
        assert told["kvmem_policy_leads", ("agents",)] == 1
        assert told["kvmem_policy_leads", ("lru",)] == 0
        assert told["kvmem_policy_off", ()] == 0
        half.cache.keeping.switch_off("broken on purpose")
        told = {(one.name, one.labels): one.value for one in half.telemetry.samples()}
        assert told["kvmem_policy_leads", ("lru",)] == 1
        assert told["kvmem_policy_off", ()] == 1
