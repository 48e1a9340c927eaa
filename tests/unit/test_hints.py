"""Hints: what is no hint is refused by itself, wishes have budgets, and nobody names another's."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvmem import events, hints
from kvmem.cache import Cache
from kvmem.cache.sessions import EVENTS, FORK_S, MOST_RECEIPTS, MOST_S, MOST_TOOLS
from kvmem.hints import MOST_ACTIONS, Receipt, envelope_of, of_header, read_hints
from kvmem.policy.keeper import OVER
from tests.blocks import BLOCKS, chain
from tests.unit.test_keeping import Clock, turn

ME, OTHER_SALT = (b"", "me"), (b"salt", "me")


def one(**action: Any) -> hints.Hints:
    return read_hints({"version": 1, "actions": [action]})


# -- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ({"do": "steal"}, "steal"),
        ({"do": "pin"}, "for_s"),
        ({"do": "pin", "for_s": 1e12}, "for_s"),
        ({"do": "pin", "for_s": -1}, "for_s"),
        ({"do": "pin", "for_s": float("nan")}, "for_s"),
        ({"do": "pin", "for_s": 9, "tokens": 0}, "tokens"),
        ({"do": "pin", "for_s": 9, "tokens": True}, "tokens"),
        ({"do": "retain", "for_s": 9, "priority": 101}, "priority"),
        ({"do": "retain", "until": "doomsday"}, "until"),
        ({"do": "fork"}, "child"),
        ({"do": "fork", "child": ""}, "child"),
        ({"do": "tool_started", "tool": "x" * 65}, "tool"),
        ({"do": "release", "session": "x" * 257}, "session"),
        ({"do": "release", "sesion": "x"}, "sesion"),
        ({"for_s": 9}, "do"),
        (7, "object"),
        (None, "object"),
    ],
)
def test_an_action_that_is_none_is_rejected_by_itself(action: Any, said: str) -> None:
    read = read_hints({"version": 1, "actions": [{"do": "session_end"}, action]})
    assert read.actions == (hints.SessionEnd(),)
    (receipt,) = read.refused
    assert receipt.status == "rejected"
    assert said in receipt.reason
    assert len(receipt.reason) <= 200


@pytest.mark.parametrize(
    "envelope",
    [
        None, 3, "retain", [], {}, {"version": 1}, {"version": "1", "actions": []},
        {"version": 2, "actions": []}, {"version": 1, "actions": {}},
        {"version": 1, "actions": [], "more": 1},
        {"version": 1, "actions": [{"do": "release"}] * (MOST_ACTIONS + 1)},
    ],
)  # fmt: skip
def test_an_envelope_that_is_none_is_rejected_as_a_whole(envelope: Any) -> None:
    read = read_hints(envelope)
    assert read.actions == ()
    assert [(one.do, one.status) for one in read.refused] == [("?", "rejected")]


def test_no_bytes_make_it_raise() -> None:
    draw = random.Random(3)
    words: list[Any] = ["do", "pin", "for_s", 1, -1, 1e300, None, True, "", [], {}, "é" * 300]
    for _ in range(2000):
        made = {str(draw.choice(words)): draw.choice(words) for _ in range(draw.randint(0, 4))}
        read = read_hints({"version": 1, "actions": [made, draw.choice(words)]})
        assert len(read.actions) + len(read.refused) == 2


def test_an_envelope_comes_back_as_it_was_sent() -> None:
    sent = [
        hints.Retain(session="s", for_s=3.0), hints.Pin(for_s=2.0, tokens=9), hints.Demote(),
        hints.Prefetch(), hints.Release(), hints.Supersede(session="s"), hints.Fork(child="c"),
        hints.SessionEnd(), hints.ToolStarted(tool="ls"), hints.ToolEnded(),
    ]  # fmt: skip
    assert read_hints(envelope_of(sent)).actions == tuple(sent)


def test_a_header_says_the_same() -> None:
    read = read_hints(of_header('retain; for_s=2.5; priority=7, tool_started; tool="ls", fork'))
    assert read.actions == (hints.Retain(for_s=2.5, priority=7), hints.ToolStarted(tool="ls"))
    assert [one.do for one in read.refused] == ["fork"]


# -- what is done --------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> Cache:
    return Cache(100, BLOCKS, eviction="agents", clock=clock)


def prompt(cache: Cache, name: str, n: int = 10, who: Any = None, *, told: bool = False) -> None:
    """A session's whole turn."""
    keys, request = chain(name, n), f"{name} {n}"
    who = who or (b"", name)
    assert cache.keeping is not None
    agent = cache.sessions.agent_of(who, told=told)
    ref = cache.keeping.used(request, keys, agent)
    assert ref is not None
    cache.sessions.sent(who, ref, told=told)
    turn(cache, request, keys)


def here(cache: Cache, name: str, n: int = 10) -> int:
    return cache.match([chain(name, n)], 0, n)


def do(cache: Cache, action: hints.AnyAction, name: str = "me") -> Receipt:
    return cache.sessions.do(action, (b"", name))


def crowd(cache: Cache, clock: Clock, n: int = 40) -> None:
    """One-off prompts of others, twice as many blocks as there is room."""
    for _ in range(n):
        clock.now_s += 0.1
        turn(cache, f"crowd {clock.now_s}", chain(f"crowd {clock.now_s}", 5))
    assert cache.check_integrity() == []


def test_what_is_retained_outlasts_a_crowd_and_what_is_not_does_not(
    cache: Cache, clock: Clock
) -> None:
    prompt(cache, "me")
    prompt(cache, "you")
    receipt = do(cache, hints.Retain(for_s=60.0))
    assert (receipt.status, receipt.blocks, receipt.for_s) == ("accepted", 10, 60.0)
    crowd(cache, clock)
    clock.now_s += 20.0
    crowd(cache, clock, 20)
    assert (here(cache, "me"), here(cache, "you")) == (10, 0)
    clock.now_s += 60.0
    crowd(cache, clock)
    assert here(cache, "me") == 0


def test_retained_until_the_tool_ended_is_until_the_next_prompt(cache: Cache) -> None:
    prompt(cache, "me", told=True)
    assert do(cache, hints.Retain(until="tool_ended")).for_s == MOST_S
    assert cache.sessions.stats()["retained"] == 10
    do(cache, hints.ToolEnded())
    assert cache.sessions.stats()["retained"] == 10
    prompt(cache, "me", 14, told=True)
    assert cache.sessions.stats()["retained"] == 0


def test_a_session_that_ended_goes_first(cache: Cache, clock: Clock) -> None:
    for name in ("gone", "stays"):
        prompt(cache, name, 40)
    clock.now_s += 1.0
    assert do(cache, hints.SessionEnd(), "gone").status == "accepted"
    prompt(cache, "new", 50)
    assert (here(cache, "gone", 40), here(cache, "stays", 40)) == (10, 40)
    assert do(cache, hints.SessionEnd(), "gone").status == "missing"


def test_a_pin_holds_whoever_leads_and_ends_by_itself(cache: Cache, clock: Clock) -> None:
    prompt(cache, "me", 20)
    receipt = do(cache, hints.Pin(for_s=50.0))
    assert (receipt.status, receipt.blocks) == ("accepted", 20)
    assert cache.keeping is not None
    cache.keeping.agents.duel.second = True
    crowd(cache, clock)
    assert here(cache, "me", 20) == 20
    clock.now_s += 60.0
    cache.settle()
    assert (cache.sessions.stats()["pinned"], cache.stats()["leases"]) == (0, 0)
    crowd(cache, clock)
    assert here(cache, "me", 20) == 0


def test_pins_have_a_budget_and_none_holds_more_than_it_says(cache: Cache) -> None:
    prompt(cache, "me", 60)
    prompt(cache, "you", 30)
    receipt = do(cache, hints.Pin(for_s=1e4))
    assert (receipt.status, receipt.blocks, receipt.for_s) == ("clipped", 25, MOST_S)
    assert do(cache, hints.Pin(for_s=9.0), "you").status == "rejected"
    receipt = do(cache, hints.Pin(for_s=9.0, tokens=5))
    assert (receipt.status, receipt.blocks) == ("accepted", 5)
    receipt = do(cache, hints.Pin(for_s=9.0), "you")
    assert (receipt.status, receipt.blocks) == ("clipped", 20)
    assert cache.sessions.stats()["pinned"] == 25
    assert do(cache, hints.Release(), "you").status == "accepted"
    assert do(cache, hints.Release()).status == "accepted"
    assert (cache.sessions.stats()["pinned"], cache.stats()["leases"]) == (0, 0)


def test_what_is_retained_has_a_budget(cache: Cache) -> None:
    prompt(cache, "me", 40)
    prompt(cache, "you", 40)
    assert do(cache, hints.Retain(for_s=9.0)).status == "accepted"
    assert do(cache, hints.Retain(for_s=9.0), "you").status == "rejected"
    assert do(cache, hints.Fork(child="x"), "you").status == "rejected"
    assert do(cache, hints.Retain()).status == "rejected"
    do(cache, hints.Release())
    assert do(cache, hints.Retain(for_s=1e4), "you").status == "clipped"


def test_a_fork_holds_the_prompt_until_the_child_comes(cache: Cache) -> None:
    prompt(cache, "me", 20)
    receipt = do(cache, hints.Fork(child="child"))
    assert (receipt.status, receipt.for_s) == ("accepted", FORK_S)
    assert cache.sessions.stats()["retained"] == 20
    prompt(cache, "me", 30, who=(b"", "child"))
    assert cache.sessions.stats()["retained"] == 0


def test_a_fork_holds_the_prompt_until_the_last_child_comes(cache: Cache) -> None:
    prompt(cache, "me", 20)
    do(cache, hints.Fork(child="one"))
    do(cache, hints.Fork(child="two"))
    prompt(cache, "me", 30, who=(b"", "one"))
    assert cache.sessions.stats()["retained"] == 20
    prompt(cache, "me", 31, who=(b"", "two"))
    assert cache.sessions.stats()["retained"] == 0


def test_a_fork_does_not_shorten_what_was_asked_for(cache: Cache, clock: Clock) -> None:
    prompt(cache, "me", 20)
    do(cache, hints.Retain(for_s=600.0))
    clock.now_s = 5.0
    receipt = do(cache, hints.Fork(child="child"))
    assert (receipt.status, receipt.blocks, receipt.for_s) == ("accepted", 20, 595.0)
    prompt(cache, "me", 30, who=(b"", "child"))
    assert cache.sessions.stats()["retained"] == 20
    # Nor does one before it.
    prompt(cache, "you", 10)
    do(cache, hints.Fork(child="other"), "you")
    do(cache, hints.Retain(for_s=600.0), "you")
    prompt(cache, "you", 12, who=(b"", "other"))
    assert cache.sessions.stats()["retained"] == 30


def test_what_was_superseded_is_worth_nothing(cache: Cache) -> None:
    prompt(cache, "me")
    assert do(cache, hints.Supersede(session="me")).status == "accepted"
    assert cache.keeping is not None
    assert cache.keeping.agents.keeper._kind[0] == OVER


def test_a_prompt_that_does_not_extend_the_last_ends_it_where_somebody_says_whose_it_is(
    cache: Cache,
) -> None:
    keeper = cache.keeping.agents.keeper  # type: ignore[union-attr]
    prompt(cache, "one", who=(b"", "quiet"))
    prompt(cache, "two", who=(b"", "quiet"))  # by the name alone: sub-agents may share it
    assert keeper._kind[:2] == ["?", "?"]
    do(cache, hints.ToolStarted(tool="ls"), "quiet")
    prompt(cache, "three", who=(b"", "quiet"))
    prompt(cache, "four", who=(b"", "quiet"))
    assert keeper._kind[2:4] == [OVER, "?"]


def test_a_tool_by_its_name_and_no_more_than_some_names(cache: Cache) -> None:
    prompt(cache, "me")
    keeper = cache.keeping.agents.keeper  # type: ignore[union-attr]
    assert do(cache, hints.ToolStarted(tool="ls")).status == "accepted"
    assert keeper._kind[0] == "tool:ls"
    for i in range(MOST_TOOLS):
        receipt = do(cache, hints.ToolStarted(tool=f"t{i}"))
    assert (receipt.status, keeper._kind[0]) == ("clipped", "tool")
    assert do(cache, hints.ToolStarted(tool="user")).status == "clipped"


@pytest.mark.parametrize(
    "action",
    [hints.Pin(for_s=9.0), hints.Retain(for_s=9.0), hints.SessionEnd(), hints.Demote(),
     hints.Prefetch(), hints.Release(), hints.Supersede(), hints.Fork(child="c"),
     hints.ToolStarted(tool="ls"), hints.ToolEnded()],
)  # fmt: skip
def test_another_salts_session_is_as_unknown_as_none(cache: Cache, action: hints.AnyAction) -> None:
    prompt(cache, "me")
    foreign = cache.sessions.do(action, OTHER_SALT)
    unknown = cache.sessions.do(action, (b"", "nobody"))
    assert foreign.status == unknown.status == "missing"
    assert (foreign.reason, foreign.blocks) == (unknown.reason, unknown.blocks)
    assert cache.sessions.receipts(b"salt") == [foreign]
    assert foreign not in cache.sessions.receipts(b"")[:-1]
    assert here(cache, "me") == 10
    assert cache.stats()["leases"] == 0


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_an_engine_without_the_order_says_so(eviction: str) -> None:
    cache = Cache(10, BLOCKS, eviction=eviction)
    receipt = do(cache, hints.Retain(for_s=9.0))
    assert (receipt.status, eviction in receipt.reason) == ("rejected", True)


def test_what_cannot_be_done_here_is_rejected_with_the_reason(cache: Cache) -> None:
    prompt(cache, "me")
    assert "disk" in do(cache, hints.Demote()).reason
    assert "disk" in do(cache, hints.Prefetch()).reason
    assert "device" in do(cache, hints.Prefetch(to="device")).reason
    assert {r.status for r in cache.sessions.receipts(b"")} == {"rejected"}


def test_while_lru_leads_a_hint_is_deferred(cache: Cache) -> None:
    prompt(cache, "me")
    assert cache.keeping is not None
    cache.keeping.agents.duel.second = True
    assert do(cache, hints.ToolStarted(tool="ls")).status == "deferred"


@pytest.mark.parametrize("lru", [True, False])
def test_what_is_retained_outlasts_a_crowd_whoever_leads(cache: Cache, lru: bool) -> None:
    prompt(cache, "me")
    prompt(cache, "other")
    assert cache.keeping is not None
    cache.keeping.agents.duel.second = lru
    told = do(cache, hints.Retain(for_s=9.0))
    assert (told.status, told.blocks) == ("accepted", 10)
    for i in range(16):
        prompt(cache, f"crowd-{i}")
        cache.keeping.agents.duel.second = lru
    assert here(cache, "me") == 10
    assert here(cache, "other") == 0
    do(cache, hints.Release())
    for i in range(16):
        prompt(cache, f"more-{i}")
        cache.keeping.agents.duel.second = lru
    assert here(cache, "me") == 0


def test_a_flood_of_refusals_is_bounded_and_told_as_a_figure(cache: Cache, clock: Clock) -> None:
    told: list[events.Event] = []
    cache.bus.subscribe(told.append)
    for i in range(1000):
        cache.sessions.keep(b"", Receipt(do="pin", status="rejected", reason=f"{i}"))
    assert len(told) == EVENTS
    assert len(cache.sessions.receipts(b"")) == MOST_RECEIPTS
    clock.now_s += 2.0
    cache.sessions.keep(b"", Receipt(do="pin", status="rejected", reason="last"))
    assert told[-1] == events.HintRefused(
        do="pin", status="rejected", reason="last", untold=1000 - EVENTS
    )


def test_sessions_are_bounded_and_the_oldest_loses_its_pin(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmem.cache.sessions.MOST_SESSIONS", 5)
    prompt(cache, "me")
    do(cache, hints.Pin(for_s=99.0))
    for i in range(5):
        prompt(cache, f"s{i}")
    stats = cache.sessions.stats()
    assert (stats["sessions"], stats["pinned"], cache.stats()["leases"]) == (5, 0, 0)


def test_requests_without_a_sessions_name_are_bounded_too(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmem.cache.sessions.MOST_SESSIONS", 5)
    assert cache.keeping is not None
    for i in range(20):
        ref = cache.keeping.used(f"r{i}", chain(f"r{i}", 4), None)
        receipt = cache.sessions.do(hints.ToolStarted(tool="t"), (b"", f"request r{i}"), ref)
        assert receipt.status in ("accepted", "deferred")
    assert cache.sessions.stats()["sessions"] == 5


def test_pins_made_again_and_again_leave_no_ends(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmem.cache.sessions.MOST_ENDS", 10)
    prompt(cache, "me")
    for _ in range(200):
        assert do(cache, hints.Pin(for_s=99.0)).status == "accepted"
    assert len(cache.sessions._ends) <= 11
    assert cache.stats()["leases"] == 1


def test_a_reset_lets_go_of_what_was_retained(cache: Cache) -> None:
    prompt(cache, "me", 40)
    assert do(cache, hints.Retain(for_s=99.0)).status == "accepted"
    cache.drop("reset")
    assert cache.sessions.stats()["retained"] == 0
    prompt(cache, "you", 40)
    assert do(cache, hints.Retain(for_s=99.0), "you").status == "accepted"


def test_a_branch_that_another_takes_over_is_forgotten_by_the_first(cache: Cache) -> None:
    assert cache.keeping is not None
    for i in range(50):
        prompt(cache, "same", who=(b"", f"agent {i}"), told=True)
    assert len(cache.keeping.agents.keeper._branch_of) == 1
