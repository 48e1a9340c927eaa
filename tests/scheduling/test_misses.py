"""Why requests missed, on vLLM's own schedulers: what became of blocks is what is said of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kvmem import events
from kvmem.explain.misses.explainer import PAGE_BYTES
from kvmem.explain.misses.outline import Outline, OutlineSpan
from kvmem.store import set_switch
from tests.scheduling.engine import Engine, InjectedError, running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_steps import PROMPT, WHOLE, other, stored

pytestmark = pytest.mark.engine


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def engine(request: pytest.FixtureRequest, config: Any, arena_name: str) -> Iterator[Engine]:
    with running(config, asynchronous=request.param, arena=arena_name, n_host=40) as engine:
        yield engine


def reasons(turn: Any) -> list[tuple[str, int]]:
    return [(run["reason"], run["tokens"]) for run in turn.receipt["misses"]]


REST = len(PROMPT) - WHOLE * BLOCK


def test_a_new_prompt_is_there_for_the_first_time(engine: Engine) -> None:
    assert reasons(engine.generate(PROMPT)) == [
        ("first_time", WHOLE * BLOCK), ("block_floor", REST),
    ]  # fmt: skip


def test_a_prompt_that_is_found_misses_what_fills_no_block(engine: Engine) -> None:
    stored(engine)
    assert reasons(engine.generate(PROMPT)) == [("block_floor", REST)]


def test_the_end_of_a_session_that_goes_on_is_new(engine: Engine) -> None:
    turn = stored(engine, PROMPT, 30, session="s")
    following = [*PROMPT, *turn.tokens, *other(40)]
    told = engine.generate(following, session="s").receipt["misses"]
    found = (len(PROMPT) + 29) // BLOCK * BLOCK
    assert [(run["reason"], run["first"]) for run in told] == [
        ("first_time", found), ("block_floor", len(following) // BLOCK * BLOCK),
    ]  # fmt: skip


@pytest.mark.parametrize("session", ["s", None])
def test_a_changed_prompt_says_its_first_differing_token(
    engine: Engine, session: str | None
) -> None:
    long = other(6 * BLOCK + 3)
    stored(engine, long, session=session)
    changed = list(long)
    changed[2 * BLOCK + 5] += 1
    told = engine.generate(changed, session=session).receipt["misses"]
    assert [(run["reason"], run["first"], run["tokens"]) for run in told] == [
        ("input_changed", 2 * BLOCK, 4 * BLOCK), ("block_floor", 6 * BLOCK, 3),
    ]  # fmt: skip
    assert told[0]["token"] == 2 * BLOCK + 5
    assert told[0]["fix"]


def test_an_outline_names_what_changed(engine: Engine) -> None:
    long = other(6 * BLOCK + 3)
    changed = list(long)
    changed[2 * BLOCK + 5] += 1

    def outline(said: bytes) -> dict[str, Any]:
        spans = [OutlineSpan("head", BLOCK, b"", b""), OutlineSpan("tool", 90, said, said)]
        made = Outline.make(epoch=0, system=None, tools=(), spans=spans)
        return {"outline": made.text()}

    stored(engine, long, session="s", kvmem=outline(b"a"))
    told = engine.generate(changed, session="s", kvmem=outline(b"b")).receipt["misses"]
    first = told[0]
    assert (first["reason"], first["role"], first["message"]) == ("input_changed", "tool", 0)


def test_an_outline_that_is_none_is_told_and_changes_nothing(engine: Engine) -> None:
    turn = engine.generate(PROMPT, kvmem={"outline": "x"})  # type: ignore[dict-item]
    assert "outline" in turn.receipt["error"]
    assert reasons(turn)[0][0] == "first_time"


def test_a_block_that_gave_way_says_for_whom(engine: Engine) -> None:
    stored(engine)
    ids = []
    for seed in range(2, 12):
        ids.append(engine.add(other(6 * BLOCK, seed)))
        engine.drain()
    assert engine.forget_device()
    told = engine.generate(PROMPT).receipt["misses"]
    assert told[0]["reason"] == "evicted"
    assert (told[0]["tier"], told[0]["policy"]) == ("host", "s3fifo")
    assert told[0]["for_request"] in ids
    assert told[0]["at_s"] > 0


def test_another_salt_is_told_nothing_of_whom_it_made_room_for(engine: Engine) -> None:
    stored(engine, salt="a")
    for seed in range(2, 12):
        engine.generate(other(6 * BLOCK, seed), salt="b")
    assert engine.forget_device()
    told = engine.generate(PROMPT, salt="a").receipt["misses"]
    assert told[0]["reason"] == "evicted"
    assert "for_request" not in told[0]
    assert "at_s" not in told[0]


def test_a_session_with_another_salt_says_so(engine: Engine) -> None:
    stored(engine, session="s", salt="a")
    assert reasons(engine.generate(PROMPT, session="s", salt="b"))[0] == (
        "salt_changed", WHOLE * BLOCK,
    )  # fmt: skip
    assert reasons(engine.generate(PROMPT, session="t", salt="c"))[0][0] == "first_time"


def test_a_load_that_fails_its_check_is_quarantined(engine: Engine) -> None:
    stored(engine)
    engine.corrupt(engine.slots_of(PROMPT)[1])
    turn = engine.generate(PROMPT)
    assert turn.receipt["miss"] == "load_failed"
    assert {reason for reason, _ in reasons(turn)} == {"quarantined", "block_floor"}


def test_what_is_off_says_who_was_against_it(engine: Engine) -> None:
    stored(engine)
    told = engine.generate(PROMPT, kvmem={"load": False}).receipt["misses"]
    assert (told[0]["reason"], told[0]["by"]) == ("disabled_by_request", "request")
    assert told[0]["tokens"] == WHOLE * BLOCK
    assert engine.forget_device()
    set_switch(engine.half.arena.path, loads=False)
    told = engine.generate(PROMPT).receipt["misses"]
    assert (told[0]["reason"], told[0]["by"]) == ("disabled_by_request", "switch")


def test_a_new_prompt_is_new_although_loads_are_off(engine: Engine) -> None:
    told = reasons(engine.generate(PROMPT, kvmem={"load": False}))
    assert [reason for reason, _ in told] == ["first_time", "block_floor"]


def test_what_was_not_to_be_stored_says_so_when_it_is_missed(engine: Engine) -> None:
    stored(engine, session="s", kvmem={"store": False})
    told = engine.generate(PROMPT, session="s").receipt["misses"]
    assert (told[0]["reason"], told[0]["by"]) == ("disabled_by_request", "request")


def test_new_weights_are_told(engine: Engine) -> None:
    stored(engine, session="s")
    engine.new_weights()
    assert reasons(engine.generate(PROMPT, session="s"))[0] == ("weights_changed", WHOLE * BLOCK)


def test_a_reset_is_told(engine: Engine) -> None:
    stored(engine)
    assert engine.reset()
    assert reasons(engine.generate(PROMPT))[0] == ("cleared", WHOLE * BLOCK)


def test_a_prompt_that_another_is_just_storing_is_pending(engine: Engine) -> None:
    engine.eager = False
    engine.check_stores = False
    keys = engine.chains_of(PROMPT)[0]
    engine.half.cache.reserve("other", 0, keys, range(len(keys)))
    told = engine.generate(PROMPT)
    assert reasons(told)[0] == ("pending", WHOLE * BLOCK)


# -- to others -----------------------------------------------------------------------------------


def test_runs_go_out_as_events(engine: Engine) -> None:
    told: list[events.Event] = []
    engine.half.bus.subscribe(told.append)
    i = engine.add(PROMPT)
    engine.drain()
    engine.half.misses.settle()
    missed = [one for one in told if isinstance(one, events.Missed)]
    assert [(one.request_id, one.reason, one.tokens) for one in missed] == [
        (i, "first_time", WHOLE * BLOCK), (i, "block_floor", REST),
    ]  # fmt: skip


def test_the_last_request_of_all_is_told_without_another(engine: Engine) -> None:
    told = threading.Event()
    engine.half.bus.subscribe(lambda one: told.set() if isinstance(one, events.Missed) else None)
    engine.generate(PROMPT)
    assert told.wait(10)


def test_the_page_has_the_last_requests_and_the_dearest_causes(engine: Engine) -> None:
    for seed in range(40):
        engine.generate(other(3 * BLOCK, seed % 5), session=f"s{seed}" + "x" * 200)
    engine.half.misses.settle()
    engine.half.misses.explainer._top = (0.0, [])
    raw = msgspec.msgpack.encode(engine.half.misses.page())
    assert len(raw) < PAGE_BYTES + 4000
    page = msgspec.msgpack.decode(raw)
    assert 10 < len(page["explained"]) <= 32
    assert page["explained"][-1]["session"].startswith("s39")
    assert {cause["reason"] for cause in page["causes"]} >= {"first_time", "block_floor"}


def test_an_estimate_comes_with_the_first_steps(engine: Engine) -> None:
    for seed in range(3):
        engine.generate(other(4 * BLOCK, seed), 4)
    told = engine.generate(other(4 * BLOCK, 9)).receipt["misses"]
    assert all(run["ms"] > 0 for run in told)


# -- what fails costs a reason (I9) --------------------------------------------------------------


@pytest.mark.parametrize("part", ["known", "look", "end", "evicted"])
def test_an_explainer_that_fails_costs_a_reason_and_no_request(engine: Engine, part: str) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise InjectedError(part)

    engine.faulted = True
    setattr(engine.half.misses.explainer, part, failing)
    for seed in range(10):
        turn = engine.generate(other(6 * BLOCK, seed))  # its answer is compared by the engine
        assert ("misses" in turn.receipt) is (part in ("end", "evicted"))
    engine.half.misses.settle()
    assert engine.half.page.failures > 0
    assert "explain" in (engine.half.page.last_failure or "")
    assert engine.half.totals.blocks_stored > 0
    engine.assert_settled()


def test_a_thread_that_never_comes_costs_nothing(engine: Engine) -> None:
    engine.half.misses._behind.wake = lambda **_: None  # type: ignore[method-assign]
    stored(engine)
    assert reasons(engine.generate(PROMPT)) == [("block_floor", REST)]
