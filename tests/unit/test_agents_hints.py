"""Agents tell their engine what they do, without being asked to and without waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from kvmem.agents import Hint, Runtime, tool
from kvmem.agents.hinting import EngineHints
from kvmem.agents.waiting import MOST
from kvmem.hints import MOST_ACTIONS, SessionEnd, ToolEnded, ToolStarted, read_hints
from tests.fake_engine import FakeEngine, runtime

CALL = '<tool_call>\n{"name": "look", "arguments": {"key": "k"}}\n</tool_call>'


@tool
def look(key: str) -> str:
    """Looks something up."""
    return f"{key} found"


def play(engine: FakeEngine, work: Callable[[Runtime], Awaitable[Any]], **options: Any) -> None:
    async def main() -> None:
        async with runtime(engine, **options) as opened:
            await work(opened)

    asyncio.run(main())


async def one_run(opened: Runtime) -> None:
    one = opened.session("me", system="Look.", tools=[look], cache_salt="mine")
    assert (await one.run("Look k up.")).text == "Done."
    one.close()


def says(prompt: str) -> str:
    return "Done." if "found" in prompt else CALL


def actions(engine: FakeEngine) -> list[Any]:
    found = []
    for body in engine.hints:
        read = read_hints({key: body[key] for key in ("version", "actions")})
        assert not read.refused
        found += read.actions
    return found


def test_a_runs_tools_and_its_end_reach_the_engine_under_its_salt() -> None:
    engine = FakeEngine(says)
    play(engine, one_run)
    assert actions(engine) == [
        ToolStarted(session="me", tool="look"),
        ToolEnded(session="me", tool="look"),
        SessionEnd(session="me"),
    ]
    assert {body["cache_salt"] for body in engine.hints} == {"mine"}
    assert all("session_id" in body for body in engine.bodies)


def test_a_server_that_takes_none_is_asked_once_and_no_turn_is_lost() -> None:
    engine = FakeEngine(says)
    engine.hints_status = 404

    async def twice(opened: Runtime) -> None:
        await one_run(opened)
        await asyncio.sleep(0)
        await one_run(opened)

    play(engine, twice)
    assert len(engine.hints) == 1


def test_hints_can_be_left_out() -> None:
    engine = FakeEngine(says)
    play(engine, one_run, hints=False)
    assert engine.hints == []


class SlowWire:
    """Answers when told; counts what was out at once."""

    base_url = "http://engine"

    def __init__(self) -> None:
        self.go, self.bodies, self.out, self.most = asyncio.Event(), [], 0, 0

    async def post(self, path: str, body: dict[str, Any]) -> int:
        self.out += 1
        self.most = max(self.most, self.out)
        self.bodies.append(body)
        await self.go.wait()
        self.out -= 1
        return 200


def test_what_waits_is_bounded_goes_in_lots_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        wire = SlowWire()
        sender = EngineHints(wire)  # type: ignore[arg-type]
        for i in range(MOST + 500):
            sender.announce(Hint("tool_start", f"s{i}", 1, "ls"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert wire.out == 1
        assert sender.n_lost == 500
        sender.announce(Hint("tool_start", "x" * 300, 1, "ls"))  # no name of the contract
        wire.go.set()
        await sender.close()
        assert wire.most == 1
        assert sender.n_sent == MOST
        assert max(len(body["actions"]) for body in wire.bodies) == MOST_ACTIONS
        sender.announce(Hint("session_end", "late", 1))
        assert len(wire.bodies) == -(-MOST // MOST_ACTIONS)

        monkeypatch.setattr("kvmem.agents.hinting.CLOSE_S", 0.01)
        stuck = SlowWire()
        other = EngineHints(stuck)  # type: ignore[arg-type]
        other.announce(Hint("session_end", "s", 1))
        await other.close()
        assert stuck.out == 1
        assert other._sending is not None
        assert other._sending.cancelled()

    asyncio.run(main())


def test_an_engine_that_is_gone_costs_the_hint_alone() -> None:
    class Gone(FakeEngine):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path.endswith("/hints"):
                raise httpx.ConnectError("gone")
            return await super().handle_async_request(request)

    play(Gone(says), one_run)
