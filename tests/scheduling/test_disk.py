"""A disk below the host tier, under vLLM's own schedulers: blocks that only the disk has come up
before they are promised, requests wait without blocking others, and a restart begins warm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmem import events
from tests.scheduling.engine import Engine, running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_steps import PROMPT, WHOLE, other, stored

pytestmark = pytest.mark.engine
DISK_GB = 0.01


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


@pytest.fixture
def engine(start: Callable[..., Any]) -> Iterator[Engine]:
    with start() as engine:
        yield engine


def at_rest(engine: Engine) -> None:
    """Until nothing is on its way between host and disk."""
    engine.rest_disk()


def only_on_disk(engine: Engine, prompt: list[int] = PROMPT) -> None:
    stored(engine, prompt)
    at_rest(engine)
    engine.half.cache._tier.clear()


def flip(folder: Path, depth: int) -> None:
    """A bit of the only block that has so many before it, wherever it lies (docs/formats.md)."""
    table = (folder / "table.kvd").read_bytes()
    unit_bytes = int.from_bytes(table[24:32], "little")
    records = [table[at : at + 128] for at in range(4096, len(table), 128)]
    (place, stored), *more = [
        (int.from_bytes(one[112:116], "little"), int.from_bytes(one[116:120], "little"))
        for one in records
        if any(one[64:72]) and int.from_bytes(one[104:108], "little") == depth
    ]
    assert not more
    with (folder / "data.kvd").open("r+b") as data:
        data.seek(place * unit_bytes + 128 + stored // 2)
        byte = data.read(1)
        data.seek(-1, 1)
        data.write(bytes([byte[0] ^ 1]))


def test_a_prompt_comes_up_from_the_disk(engine: Engine) -> None:
    only_on_disk(engine)
    turn = engine.generate(PROMPT, 30)
    told = turn.receipt["tokens"]
    assert (told["disk"], told["host"], told["computed"]) == (WHOLE * BLOCK, 0, 5)
    assert turn.receipt["miss"] == "none"
    assert turn.receipt["disk_ms"] > 0
    engine.assert_settled()


def test_what_is_half_in_the_host_is_told_apart(engine: Engine) -> None:
    only_on_disk(engine)
    stored(engine, PROMPT[: 2 * BLOCK + 1])
    told = engine.generate(PROMPT, 4).receipt["tokens"]
    assert (told["host"], told["disk"]) == (2 * BLOCK, 2 * BLOCK)
    engine.assert_settled()


@pytest.mark.parametrize("groups", ["hybrid", "windows", "chunks"])
def test_all_groups_come_up(start: Callable[..., Any], groups: str) -> None:
    with start(groups=groups, n_host=120) as engine:
        only_on_disk(engine)
        told = engine.generate(PROMPT, 20).receipt["tokens"]
        assert told["disk"] == WHOLE * BLOCK
        engine.assert_settled()


def test_a_restart_begins_warm(start: Callable[..., Any]) -> None:
    with start() as engine:
        reply = stored(engine, PROMPT, 2 * BLOCK).tokens
        at_rest(engine)
    with start() as engine:
        turn = engine.generate([*PROMPT, *reply], 20)
        assert turn.receipt["tokens"]["disk"] == (len(PROMPT) + 2 * BLOCK - 1) // BLOCK * BLOCK
        engine.assert_settled()


def test_approximate_blocks_on_the_disk_answer_nobody_where_the_setting_is_gone(
    start: Callable[..., Any],
) -> None:
    with start(approximate_salt="near/") as engine:
        assert not stored(engine, PROMPT, salt="near/a").receipt["exact"]
        at_rest(engine)
        assert engine.half.cache.stats()["disk"]["written"] == WHOLE
    with start() as engine:
        turn = engine.generate(PROMPT, 4, salt="near/a")
        assert turn.receipt["exact"]
        assert turn.receipt["tokens"]["computed"] == len(PROMPT)
        engine.assert_settled()
    with start(approximate_salt="near/") as engine:  # they are still there
        matched = engine.half.cache._moves.disk.stats()["published"]
        assert matched >= WHOLE


def test_others_run_while_a_request_waits_for_the_disk(engine: Engine) -> None:
    only_on_disk(engine)
    moves = engine.half.cache._moves
    real, moves.poll = moves.poll, lambda: None  # the disk does not answer
    waits = engine.add(PROMPT, 4)
    one = engine.add(other(30), 10)
    engine.step_until(lambda: engine.turns[one].finish_reason is not None)
    assert engine.turns[waits].tokens == []
    moves.poll = real
    engine.drain()
    assert engine.turns[waits].receipt["tokens"]["disk"] == WHOLE * BLOCK
    engine.assert_settled()


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing(engine: Engine) -> None:
    only_on_disk(engine)
    moves = engine.half.cache._moves
    real, moves.poll = moves.poll, lambda: None
    one = engine.add(PROMPT, 4)
    for _ in range(3):
        engine.step()
    engine.abort(one)
    moves.poll = real
    engine.drain()
    at_rest(engine)
    engine.assert_settled()
    assert engine.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK


def test_a_block_that_was_damaged_on_the_disk_is_computed(engine: Engine) -> None:
    only_on_disk(engine)
    flip(engine.half.disk.folder, 2)
    told = engine.generate(PROMPT, 20).receipt
    assert told["tokens"]["disk"] == 2 * BLOCK
    assert told["miss"] != "none"
    found = [e for e in engine.half.bus.recent() if isinstance(e, events.Quarantined)]
    assert [e.tier for e in found] == ["disk"]
    engine.assert_settled()
    at_rest(engine)
    engine.half.cache._tier.clear()
    assert engine.forget_device()
    assert engine.generate(PROMPT).receipt["tokens"]["disk"] == WHOLE * BLOCK  # stored anew


def test_a_disk_that_fails_costs_no_request(start: Callable[..., Any], tmp_path: Path) -> None:
    with start() as engine:
        only_on_disk(engine)
        engine.half.disk._failed("Input/output error")
        told = engine.generate(PROMPT, 10).receipt["tokens"]
        assert (told["disk"], told["host"]) == (0, 0)
        engine.assert_settled()


def test_a_reset_is_a_reset_after_a_restart_too(start: Callable[..., Any]) -> None:
    with start() as engine:
        stored(engine)
        at_rest(engine)
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    with start() as engine:
        assert engine.generate(PROMPT).receipt["tokens"]["disk"] == 0


def test_more_prompts_than_both_tiers_hold(start: Callable[..., Any]) -> None:
    with start(n_host=12) as engine:
        slot_bytes = engine.half.disk._store.slot_bytes
    with start(n_host=12, disk_gb=(4096 + 25 * (slot_bytes + 256)) / 2**30) as engine:
        assert engine.half.disk.room == 25
        prompts = [other(5 * BLOCK + 3, seed) for seed in range(8)]
        for _ in range(3):
            for prompt in [*prompts, *reversed(prompts)]:
                engine.generate(prompt, 3)
                engine.forget_device()
                at_rest(engine)
        stats = engine.half.cache.stats()
        assert stats["evictions"] > 0
        assert stats["disk"]["evictions"] > 0
        assert stats["disk"]["read"] > 0
        assert engine.half.cache.check_integrity() == []
        engine.assert_settled()
