"""A far store below the host tier, under vLLM's own schedulers: what another engine has stored is
fetched before it is promised, for every kind of group, and a store that fails costs no request."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmem import events
from kvmem.errors import ConfigError
from tests.far_stores import MemoryStore
from tests.scheduling.engine import Engine, running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_steps import PROMPT, WHOLE, other, stored

pytestmark = pytest.mark.engine


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    one = MemoryStore()
    monkeypatch.setattr("kvmem.store.far.open.check_url", lambda url, environment: lambda: one)
    # What a step of this folder's engines costs has nothing to do with what a model's costs.
    monkeypatch.setattr("kvmem.cache.Cache.computes", lambda cache, s_per_token: None)
    return one


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def start(
    request: pytest.FixtureRequest,
    config: Any,
    new_arena_name: Callable[[], str],
    store: MemoryStore,
) -> Callable[..., Any]:
    def start(**options: Any) -> Any:
        settings = {"far": "redis://a.host", "n_host": 40} | options
        return running(config, asynchronous=request.param, arena=new_arena_name(), **settings)

    return start


@pytest.fixture
def engine(start: Callable[..., Any]) -> Iterator[Engine]:
    with start() as engine:
        until_on(engine)
        yield engine


def until_on(engine: Engine) -> None:
    far = engine.half.far
    if far._trial is not None:
        far._trial.result(30)
    assert far.on
    ticks = itertools.count()  # a request waits as long as the store takes: time hardly passes
    engine.half.cache._far._clock = lambda: next(ticks) * 1e-5


def at_rest(engine: Engine) -> None:
    engine.rest_disk()


def only_far(engine: Engine, prompt: list[int] = PROMPT) -> None:
    stored(engine, prompt)
    at_rest(engine)
    engine.half.cache._tier.clear()
    engine.half.cache._far._known.clear()


def test_what_one_engine_stored_another_one_finds(start: Callable[..., Any]) -> None:
    with start() as engine:
        until_on(engine)
        reply = stored(engine, PROMPT, 2 * BLOCK).tokens
        at_rest(engine)
    with start() as engine:
        until_on(engine)
        turn = engine.generate([*PROMPT, *reply], 20)
        told = turn.receipt["tokens"]
        assert told["far"] == (len(PROMPT) + 2 * BLOCK - 1) // BLOCK * BLOCK
        assert (told["host"], told["disk"]) == (0, 0)
        assert turn.receipt["far_ms"] > 0
        engine.assert_settled()


def test_what_is_half_in_the_host_is_told_apart(engine: Engine) -> None:
    only_far(engine)
    stored(engine, PROMPT[: 2 * BLOCK + 1])
    told = engine.generate(PROMPT, 4).receipt["tokens"]
    assert (told["host"], told["far"]) == (2 * BLOCK, 2 * BLOCK)
    engine.assert_settled()


def test_what_the_disk_has_comes_from_the_disk(start: Callable[..., Any], tmp_path: Any) -> None:
    with start(disk_gb=0.01, disk_path=str(tmp_path / "disk")) as engine:
        until_on(engine)
        stored(engine, PROMPT[: 2 * BLOCK + 1])
        at_rest(engine)
        cache = engine.half.cache
        cache._moves.demote = lambda *_: None  # the rest goes far only
        only_far(engine)
        turn = engine.generate(PROMPT, 4)
        told = turn.receipt["tokens"]
        assert (told["host"], told["disk"], told["far"]) == (0, 2 * BLOCK, 2 * BLOCK)
        engine.assert_settled()


@pytest.mark.parametrize("groups", ["hybrid", "windows", "chunks"])
def test_all_groups_come(start: Callable[..., Any], groups: str) -> None:
    with start(groups=groups, n_host=120) as engine:
        until_on(engine)
        only_far(engine)
        told = engine.generate(PROMPT, 20).receipt["tokens"]
        assert told["far"] == WHOLE * BLOCK
        engine.assert_settled()


def test_others_run_while_a_request_waits(engine: Engine, store: MemoryStore) -> None:
    only_far(engine)
    store.gate.clear()
    waits = engine.add(PROMPT, 4)
    one = engine.add(other(BLOCK - 1), 10)  # no whole block to ask for
    engine.step_until(lambda: engine.turns[one].finish_reason is not None)
    assert engine.turns[waits].tokens == []
    store.gate.set()
    engine.drain()
    assert engine.turns[waits].receipt["tokens"]["far"] == WHOLE * BLOCK
    engine.assert_settled()


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing(
    engine: Engine, store: MemoryStore
) -> None:
    only_far(engine)
    store.gate.clear()
    one = engine.add(PROMPT, 4)
    for _ in range(3):
        engine.step()
    engine.abort(one)
    store.gate.set()
    engine.drain()
    at_rest(engine)
    engine.assert_settled()


def test_bytes_that_are_not_the_block_are_computed(engine: Engine, store: MemoryStore) -> None:
    only_far(engine)
    blocks = [name for name in store.values if not name.endswith(b":mark")]
    assert len(blocks) == WHOLE
    store.values[blocks[2]] = store.values[blocks[1]]  # another prompt's
    told = engine.generate(PROMPT, 20).receipt
    assert told["tokens"]["far"] in (2 * BLOCK, 0)
    found = [e for e in engine.half.bus.recent() if isinstance(e, events.Quarantined)]
    assert [e.tier for e in found] == ["far"]
    engine.assert_settled()
    at_rest(engine)
    engine.half.cache._tier.clear()
    assert engine.forget_device()
    assert engine.generate(PROMPT).receipt["tokens"]["far"] == WHOLE * BLOCK  # stored anew


def test_a_store_that_fails_costs_no_request(engine: Engine, store: MemoryStore) -> None:
    only_far(engine)
    store.error = OSError("it broke")
    told = engine.generate(PROMPT, 10).receipt["tokens"]
    assert (told["far"], told["computed"]) == (0, len(PROMPT))
    engine.assert_settled()
    found = [e for e in engine.half.bus.recent() if isinstance(e, events.TierOff)]
    assert [e.tier for e in found] == ["far"]


def test_a_reset_reaches_the_store(start: Callable[..., Any]) -> None:
    with start() as engine:
        until_on(engine)
        stored(engine)
        at_rest(engine)
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)
        assert engine.generate(PROMPT).receipt["tokens"]["far"] == 0


def test_another_salt_finds_nothing(engine: Engine) -> None:
    stored(engine, PROMPT, salt="one")
    at_rest(engine)
    engine.half.cache._tier.clear()
    assert engine.generate(PROMPT, 4, salt="other").receipt["tokens"]["far"] == 0


def test_approximate_prompts_go_to_no_far_store(
    start: Callable[..., Any], store: MemoryStore
) -> None:
    with start(approximate_salt="near/") as engine:
        until_on(engine)
        stored(engine, PROMPT, salt="near/a")
        at_rest(engine)
        assert engine.half.cache.stats()["far"]["written"] == 0


def test_a_setting_that_names_no_store_stops_the_start(
    config: Any, new_arena_name: Callable[[], str]
) -> None:
    with (
        pytest.raises(ConfigError, match="has no scheme 'ftp'"),
        running(config, asynchronous=False, arena=new_arena_name(), far="ftp://x"),
    ):
        pass
