"""A quote is what then happens, on vLLM's schedulers: tokens by tier, what broke, nobody else's."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmem.errors import NotAnswered
from kvmem.store import set_switch
from kvmem.store.desk import ask
from kvmem.telemetry.quote import Quote
from tests.scheduling.engine import GROUPS, Engine, running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_steps import PROMPT, WHOLE, other, stored

pytestmark = pytest.mark.engine


@pytest.fixture
def engine(config: Any, arena_name: str) -> Iterator[Engine]:
    with running(config, asynchronous=True, arena=arena_name, n_host=40) as engine:
        yield engine


def quoted(engine: Engine, tokens: list[int], **more: Any) -> Quote:
    """As another process asks."""
    raw = ask(engine.half.arena.path, "quote", tokens=array("i", tokens).tobytes(), **more)
    return msgspec.msgpack.decode(raw, type=Quote)


SOURCES = ("prompt", "device", "host", "disk", "far", "computed")


def assert_right(engine: Engine, tokens: list[int], **more: Any) -> Quote:
    """The quote, once the prompt was sent and every token came from where the quote said."""
    told = quoted(engine, tokens, **more)
    turn = engine.generate(tokens, **more)
    assert {name: getattr(told, name) for name in SOURCES} == turn.receipt["tokens"]
    blank = {"ms": 0.0}
    assert [run | blank for run in told.misses] == [r | blank for r in turn.receipt["misses"]]
    return told


@pytest.mark.parametrize("asynchronous", [False, True], ids=["Scheduler", "AsyncScheduler"])
def test_every_token_comes_from_where_the_quote_said(
    config: Any, arena_name: str, asynchronous: bool
) -> None:
    with running(config, asynchronous=asynchronous, arena=arena_name, n_host=40) as engine:
        assert assert_right(engine, PROMPT).computed == len(PROMPT)
        assert assert_right(engine, PROMPT).device == WHOLE * BLOCK
        assert engine.forget_device()
        assert assert_right(engine, PROMPT).host == WHOLE * BLOCK
        # Some of it on the device, more of it on the host, the rest nowhere.
        long = [*PROMPT, *other(2 * BLOCK)]
        engine.generate(long)
        assert engine.forget_device()
        engine.generate(long[: 2 * BLOCK + 1])
        told = assert_right(engine, [*long, *other(3 * BLOCK, 7)])
        assert min(told.device, told.host, told.computed) > 0


def test_a_quote_changes_nothing(engine: Engine) -> None:
    stored(engine)
    engine.half.misses.settle()
    before = engine.half.cache.stats()
    n_pasts = len(engine.half.misses.explainer.pasts)
    for _ in range(3):
        quoted(engine, PROMPT, session="s")
        quoted(engine, other(100, 3), session="s")
    assert engine.half.cache.stats() == before
    assert len(engine.half.misses.explainer.pasts) == n_pasts
    engine.assert_settled()


def test_a_quote_names_the_token_that_breaks_a_session_and_the_fix(engine: Engine) -> None:
    long = other(6 * BLOCK + 3)
    stored(engine, long, session="s")
    changed = list(long)
    changed[2 * BLOCK + 5] += 1
    told = assert_right(engine, changed, session="s")
    first = told.misses[0]
    assert (first["reason"], first["token"]) == ("input_changed", 2 * BLOCK + 5)
    assert first["fix"]


def test_a_quote_sees_no_other_salts_blocks_or_prompts(engine: Engine) -> None:
    stored(engine, salt="a", session="s")
    for salt in ("b", None):
        told = quoted(engine, PROMPT, salt=salt, session="s")
        assert told.reused == 0
        assert {run["reason"] for run in told.misses} == {"first_time", "block_floor"}
    assert quoted(engine, PROMPT, salt="a", session="s").host == WHOLE * BLOCK
    assert_right(engine, PROMPT, salt="a", session="s")


def test_what_is_off_is_quoted_so(engine: Engine) -> None:
    stored(engine)
    set_switch(engine.half.arena.path, loads=False)
    told = assert_right(engine, PROMPT)
    assert told.off == {"loads": "switch"}
    assert told.misses[0]["by"] == "switch"


def test_new_weights_are_quoted(engine: Engine) -> None:
    stored(engine, session="s")
    engine.new_weights()
    assert assert_right(engine, PROMPT, session="s").reused == 0


def test_milliseconds_are_by_what_was_measured(engine: Engine) -> None:
    assert quoted(engine, PROMPT).ms is None
    stored(engine)
    engine.generate(PROMPT)
    assert engine.forget_device()
    half = engine.half
    half.misses.explainer.pace.s_per_token = 0.002
    half.totals.load_s, half.totals.tokens_hit_host = 0.5, 1000
    told = quoted(engine, PROMPT)
    assert told.load_ms == pytest.approx(WHOLE * BLOCK * 0.5)
    assert told.prefill_ms == pytest.approx((len(PROMPT) - WHOLE * BLOCK) * 2.0)
    assert told.ms == pytest.approx((told.load_ms or 0) + (told.prefill_ms or 0))
    assert told.ms_cold == pytest.approx(len(PROMPT) * 2.0)


@pytest.mark.parametrize(
    "asked", [{}, {"tokens": b""}, {"tokens": b"abc"}, {"tokens": bytes(4 * 300)},
              {"tokens": bytes(400), "salt": "s" * 600}],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(engine: Engine, asked: dict[str, Any]) -> None:
    with pytest.raises(NotAnswered):
        ask(engine.half.arena.path, "quote", **asked)
    assert engine.half.page.failures == 0


@pytest.mark.parametrize("groups", [name for name in GROUPS if name != "full"])
def test_models_with_several_groups_are_quoted_right(
    config: Any, arena_name: str, groups: str
) -> None:
    with running(config, asynchronous=True, arena=arena_name, n_host=200, groups=groups) as engine:
        long = other(6 * BLOCK + 3)
        assert_right(engine, long)
        assert_right(engine, long)
        assert engine.forget_device()
        assert assert_right(engine, long).host > 0


def test_what_the_disk_has_is_quoted_so(config: Any, arena_name: str, tmp_path: Path) -> None:
    options = {"disk_gb": 0.01, "disk_path": str(tmp_path / "disk")}
    with running(config, asynchronous=True, arena=arena_name, n_host=40, **options) as engine:
        stored(engine)
        engine.rest_disk()
        engine.half.cache._tier.clear()
        stored(engine, PROMPT[: 2 * BLOCK + 1])
        told = assert_right(engine, PROMPT)
        assert (told.host, told.disk) == (2 * BLOCK, 2 * BLOCK)
