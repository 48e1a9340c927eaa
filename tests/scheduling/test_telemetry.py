"""What an engine tells of itself, on vLLM's own schedulers: the figures of what happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kvmem.store.desk import NotAnswered, ask
from kvmem.store.live import snapshots
from kvmem.telemetry.live import Snapshot
from tests.scheduling.engine import Engine, InjectedError, running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_steps import PROMPT, WHOLE, stored

pytestmark = pytest.mark.engine


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def engine(request: pytest.FixtureRequest, config: Any, arena_name: str) -> Iterator[Engine]:
    with running(config, asynchronous=request.param, arena=arena_name, n_host=40) as engine:
        yield engine


def snapshot(engine: Engine) -> Snapshot:
    """As another process gets it."""
    engine.half.misses.settle()
    (found,) = snapshots(arena=engine.half.arena.path.name, events_since=0)
    return found


def test_the_snapshot_says_what_was_stored_found_and_missed(engine: Engine) -> None:
    stored(engine, session="s")
    engine.generate(PROMPT, session="s")
    told = snapshot(engine)
    assert told.total("kvmem_requests_total") == 2
    assert told.total("kvmem_prompt_tokens_total", "host") == WHOLE * BLOCK
    assert told.total("kvmem_prompt_tokens_total") == 2 * len(PROMPT)
    assert told.total("kvmem_missed_tokens_total", "first_time") == WHOLE * BLOCK
    assert told.total("kvmem_moved_blocks_total", "host", "in") == WHOLE
    assert told.total("kvmem_moved_blocks_total", "host", "out") == WHOLE
    host = told.tier("host")
    assert host is not None
    assert (host.on, host.blocks, host.capacity_blocks, host.leased) == (True, WHOLE, 40, 0)
    (session,) = told.sessions
    assert (session.session, session.requests, session.host) == ("s", 2, WHOLE * BLOCK)
    assert session.missed["first_time"] == WHOLE * BLOCK
    assert [turn.host for turn in told.turns] == [0, WHOLE * BLOCK]
    assert told.n_events == len(told.events)
    assert {one["event"] for one in told.events} >= {"stored", "loaded", "answered", "missed"}
    assert {cause.reason for cause in told.causes} == {"first_time", "block_floor"}


def test_a_telemetry_that_fails_costs_a_figure_and_no_request(engine: Engine) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise InjectedError("telemetry")

    engine.faulted = True
    engine.half.telemetry._emit = failing
    stored(engine)
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK
    assert "telemetry" in engine.half.page.last_failure
    assert snapshot(engine).total("kvmem_failures_total", "telemetry") == 2


def test_an_answer_that_fails_is_told_to_who_asked_and_to_the_engine(engine: Engine) -> None:
    def failing(asked: dict[str, Any]) -> Any:
        raise InjectedError("live")

    engine.faulted = True
    engine.half.telemetry._desk.answers["live"] = failing
    with pytest.raises(NotAnswered, match="InjectedError"):
        ask(engine.half.arena.path, "live")
    assert "desk" in engine.half.page.last_failure
    with pytest.raises(NotAnswered, match="nobody here knows"):
        ask(engine.half.arena.path, "what is this")
    raw = ask(engine.half.arena.path, "session", session="s")
    assert msgspec.msgpack.decode(raw)["session"] is None
