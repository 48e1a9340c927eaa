"""Shadow recompute finds KV that was stored wrong, with checksums that hold, by computing it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmem import events
from tests.scheduling.engine import Engine, running
from tests.scheduling.test_steps import PROMPT, WHOLE, other, stored

pytestmark = pytest.mark.engine


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def start(
    request: pytest.FixtureRequest, config: Any, new_arena_name: Callable[[], str]
) -> Callable[..., Any]:
    def start(**options: Any) -> Any:
        settings = {"n_host": 120, "shadow_share": 1.0}
        return running(
            config, asynchronous=request.param, arena=new_arena_name(), **settings | options
        )

    return start


def told(engine: Engine) -> list[events.Shadowed]:
    return [e for e in engine.half.bus.recent() if isinstance(e, events.Shadowed)]


@pytest.mark.parametrize("groups", ["full", "hybrid", "windows", "chunks"])
def test_an_honest_hit_is_computed_and_equal(start: Callable[..., Any], groups: str) -> None:
    with start(groups=groups) as engine:
        engine.generate(PROMPT)  # the device has it, too
        turn = engine.generate(PROMPT, 4)
        tokens = turn.receipt["tokens"]
        assert (tokens["device"], tokens["host"]) == (0, 0)
        assert turn.receipt["off"]["load"] == "shadow"
        blocks = sum(e.blocks for e in told(engine))
        assert blocks > 0
        assert (sum(e.equal for e in told(engine)), sum(e.bad for e in told(engine))) == (blocks, 0)
        assert engine.half.totals.shadowed == blocks
        engine.assert_settled()


@pytest.mark.parametrize("bad", range(WHOLE))
def test_kv_that_was_stored_wrong_is_quarantined(start: Callable[..., Any], bad: int) -> None:
    with start() as engine:
        engine.faulted = True
        stored(engine)
        engine.forge(engine.slots_of(PROMPT)[bad])
        turn = engine.generate(PROMPT, 4)  # right: computed
        assert turn.receipt["tokens"]["computed"] == len(PROMPT)
        found = [e for e in engine.half.bus.recent() if isinstance(e, events.Quarantined)]
        assert [(e.reason, e.blocks) for e in found] == [("shadow", WHOLE - bad)]
        assert sum(e.bad for e in told(engine)) == 1
        assert "shadow" in engine.half.page.last_failure
        engine.forget_device()
        assert engine.generate(PROMPT, 4).receipt["tokens"]["host"] == 0  # nothing of it answers
        engine.assert_settled()


def test_the_share_is_kept(start: Callable[..., Any]) -> None:
    with start(shadow_share=0.25) as engine:
        stored(engine)
        for _ in range(3):
            engine.generate(other(40))  # no hit the first time, and of the device then
        sources = []
        for _ in range(12):
            engine.forget_device()
            sources.append(engine.generate(PROMPT).receipt.get("off", {}).get("load"))
        assert sources.count("shadow") in (3, 4)
        assert set(sources) == {None, "shadow"}
        engine.assert_settled()


def test_a_miss_is_no_hit_to_be_computed(start: Callable[..., Any]) -> None:
    with start() as engine:
        assert "off" not in engine.generate(PROMPT).receipt
        assert told(engine) == []


def test_a_reset_ends_what_is_compared(start: Callable[..., Any]) -> None:
    with start() as engine:
        stored(engine)
        one = engine.add(PROMPT, 8)
        engine.reset()
        engine.drain()
        assert engine.turns[one].tokens
        assert sum(e.bad for e in told(engine)) == 0
        engine.assert_settled()


def test_new_weights_are_not_compared_with_old_ones(start: Callable[..., Any]) -> None:
    with start() as engine:
        stored(engine)
        engine.add(PROMPT, 8)
        engine.half.live.epoch = b"another"
        engine.drain()
        assert told(engine) == []


def test_an_aborted_one_leaves_nothing(start: Callable[..., Any]) -> None:
    with start() as engine:
        stored(engine)
        one = engine.add(PROMPT, 40)
        engine.step()
        engine.abort(one)
        engine.drain()
        engine.assert_settled()


def test_a_comparison_that_fails_costs_nothing(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as engine:
        engine.faulted = True
        stored(engine)

        def compare(orders: Any) -> None:
            raise OSError("no memory")

        monkeypatch.setattr(engine.worker.worker, "compare", compare)
        assert engine.generate(PROMPT, 10).receipt["off"]["load"] == "shadow"
        engine.assert_settled()


@pytest.mark.parametrize("groups", ["full", "hybrid"])
def test_neither_the_disk_nor_the_device_brings_it_back(
    start: Callable[..., Any], tmp_path: Path, groups: str
) -> None:
    """The disk's checksum holds as well, and the device was loaded from the slot."""
    disk = {"disk_gb": 0.01, "disk_path": str(tmp_path / "disk"), "groups": groups}
    with start(shadow_share=0.0, **disk) as engine:
        engine.faulted = True
        stored(engine)
        engine.forge(engine.slots_of(PROMPT)[1])
        engine.rest_disk()
        moves = engine.half.cache._moves
        moves.drop()  # the honest copy; the forged one goes down instead
        for group, keys in enumerate(engine.chains_of(PROMPT)):
            engine.half.cache.demote(group, keys, range(len(keys)))
        engine.rest_disk()
        assert moves.disk.match(engine.chains_of(PROMPT)[0]) == WHOLE
        engine.half.shadows._share = 1.0
        engine.generate(PROMPT, 4)
        engine.half.shadows._share = 0.0
        assert moves.disk.match(engine.chains_of(PROMPT)[0]) == (1 if groups == "full" else 0)
        assert engine.generate(PROMPT, 4).receipt["tokens"]["disk"] == 0
        engine.assert_settled()
    with start(shadow_share=0.0, **disk) as engine:
        assert engine.generate(PROMPT, 4).tokens  # after a restart, too
        engine.assert_settled()
