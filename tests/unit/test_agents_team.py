"""Teams: who hears what, what is on disk, and what a child costs."""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers")
pytest.importorskip("httpx")

from kvmem.agents import Budget, Runtime, Team, resume, save, state, tool
from kvmem.agents.choice import choose
from kvmem.agents.state import MAGIC, NAME, Saved
from kvmem.context import Ledger
from kvmem.context.file import read_checked
from kvmem.errors import ConfigError, RequestRefused
from tests.fake_engine import END, RENDERER, FakeEngine, runtime

LAYOUTS = ["role-first", "shared-first", "one-ledger"]


def play(engine: FakeEngine, work: Callable[[Runtime], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with runtime(engine, **options) as opened:
            return await work(opened)

    return asyncio.run(main())


@tool
def look(key: str) -> str:
    """Looks a key up."""
    return f"{key}: 42"


def crew(opened: Runtime, layout: Any, **options: Any) -> Team:
    team = opened.team("crew", system="Sail.", layout=layout, **options)
    for name in ("cook", "mate"):
        team.agent(name, role=f"You are the {name}.")
    team.tell("We sail tomorrow.")
    return team


# -- who hears what ------------------------------------------------------------------------------


def test_role_first_begins_with_the_role_and_says_to_others_who_spoke() -> None:
    engine = FakeEngine("Aye.")

    async def work(opened: Runtime) -> None:
        team = crew(opened, "role-first")
        await team.turn("cook")
        await team.turn("mate")
        assert team.usage.requests == 2
        first, second = (RENDERER.decode(body["prompt"]) for body in engine.bodies)
        assert "You are the cook.\n\nSail." in first
        assert "You are the mate.\n\nSail." in second
        assert second.index("We sail tomorrow.") < second.index("cook: Aye.")
        assert [m["content"] for m in team.said] == [
            "We sail tomorrow.",
            "cook: Aye.",
            "mate: Aye.",
        ]
        # Who comes later has heard it too.
        team.agent("boy", role="You are the boy.")
        await team.turn("boy")
        assert "mate: Aye." in RENDERER.decode(engine.bodies[-1]["prompt"])

    play(engine, work)


def test_shared_first_prompts_are_the_transcript_and_then_the_role() -> None:
    engine = FakeEngine("Aye.")

    async def work(opened: Runtime) -> None:
        team = crew(opened, "shared-first")
        await team.turn("cook", "Only you hear this.")
        heard = team.sessions["transcript"].ledger.tokens()
        await team.turn("mate")
        first, second = engine.bodies
        assert second["prompt"][: len(heard)] == heard
        rest = RENDERER.decode(second["prompt"][len(heard) :])
        assert "You are the mate." in rest
        assert "You are the cook." not in RENDERER.decode(second["prompt"])
        assert "Only you hear this." in RENDERER.decode(first["prompt"])
        assert "Only you hear this." not in RENDERER.decode(second["prompt"])
        assert [m["content"] for m in team.said] == [
            "We sail tomorrow.", "cook speaks.", "Aye.", "mate speaks.", "Aye.",
        ]  # fmt: skip

    play(engine, work)


def test_shared_first_shares_everything_that_role_first_cannot() -> None:
    async def common(layout: str) -> int:
        engine = FakeEngine("Aye.")

        async def work(opened: Runtime) -> None:
            team = crew(opened, layout)
            team.tell("The log says nothing new. " * 10)
            await team.turn("cook")
            await team.turn("mate")

        async with runtime(engine) as opened:
            await work(opened)
        a, b = (body["prompt"] for body in engine.bodies)
        pairs = enumerate(zip(a, b, strict=False))
        return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))

    role, shared, one = (asyncio.run(common(layout)) for layout in LAYOUTS)
    assert role < 40
    assert min(shared, one) > 250


def test_in_one_ledger_each_prompt_is_the_last_one_its_answer_and_what_is_new() -> None:
    engine = FakeEngine("Aye.")

    async def work(opened: Runtime) -> None:
        team = crew(opened, "one-ledger")
        for name in ("cook", "mate", "cook"):
            await team.turn(name, "Be quick.")
        prompts = [body["prompt"] for body in engine.bodies]
        for before, after in itertools.pairwise(prompts):
            had = [*before, *RENDERER.encode("Aye."), *END]
            assert after[: len(had)] == had
        text = RENDERER.decode(prompts[-1])
        assert text.count("You are the cook.") == text.count("You are the mate.") == 1
        assert "cook speaks." in text
        assert [member.turn for member in team.members.values()] == [2, 1]
        assert team.usage.requests == 3

    play(engine, work)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_that_fails_was_heard_by_nobody(layout: str) -> None:
    engine = FakeEngine("Aye.", faults=[400])

    async def work(opened: Runtime) -> None:
        team = crew(opened, layout)
        before = {name: one.ledger.digest for name, one in team.sessions.items()}
        with pytest.raises(RequestRefused, match=r"Agent crew/cook, turn 1"):
            await team.turn("cook")
        assert {name: one.ledger.digest for name, one in team.sessions.items()} == before
        assert len(team.said) == 1
        assert (await team.turn("cook")).turn == 1

    play(engine, work)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_member_calls_the_tools_that_it_may_and_others_hear_its_answer(
    layout: str,
) -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"key": "rum"}}\n</tool_call>'
    engine = FakeEngine(lambda prompt: "It is 42." if "rum: 42" in prompt else call)

    async def work(opened: Runtime) -> None:
        team = crew(opened, layout, tools=[look])
        team.agent("boy", role="You may not look.", allow="nothing")
        reply = await team.turn("cook")
        assert (reply.text, reply.turn) == ("It is 42.", 2)
        assert ("rum: 42" in str(team.said)) is (layout == "one-ledger")
        await team.turn("boy")
        assert engine.bodies[-1]["bad_words"] == ["<tool_call>"]

    play(engine, work)


def test_names_are_taken_once() -> None:
    async def work(opened: Runtime) -> None:
        team = crew(opened, "shared-first")
        for take in (
            lambda: team.agent("cook", role="Again."),
            lambda: team.session("transcript"),
            lambda: team.session("mate"),
        ):
            with pytest.raises(ConfigError, match=r"has a \w+ already"):
                take()
        with pytest.raises(ConfigError, match=r"no agent boy. Known: cook, mate"):
            await team.turn("boy")

    play(FakeEngine(), work)


# -- on disk -------------------------------------------------------------------------------------


async def _saved(opened: Runtime, folder: Path, layout: Any) -> Team:
    team = crew(opened, layout, tools=[look], budget=Budget(tokens=5000, seconds=500.0))
    await team.turn("cook")
    await team.session("lead").step("Plan.")
    save(team, folder)
    return team


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_team_is_the_team(layout: str, tmp_path: Path) -> None:
    async def work(opened: Runtime) -> None:
        team = await _saved(opened, tmp_path / "t", layout)
        back = opened.resume(tmp_path / "t", tools=[look])
        assert repr(back) == repr(team)
        assert back.said == team.said
        assert back.usage == team.usage
        assert back.members == team.members
        assert back.budget.spent.tokens == team.budget.spent.tokens > 0
        for name, one in team.sessions.items():
            other = back.sessions[name]
            assert (other.ledger.digest, other.turn, other.calls, other.name) == (
                one.ledger.digest, one.turn, one.calls, one.name,
            )  # fmt: skip
            assert other.known_tokens == 0  # the engine may have forgotten
        reply = await back.turn("mate")
        assert (reply.text, back.said[-1]["content"][-4:]) == ("Aye.", "Aye.")

    play(FakeEngine(), work)


def test_a_team_is_the_last_whole_one_wherever_the_process_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(opened: Runtime) -> None:
        team = await _saved(opened, tmp_path, "role-first")
        before = {name: one.ledger.digest for name, one in team.sessions.items()}
        await team.turn("mate")
        await team.sessions["lead"].step("On.")
        n_writes = len(team.sessions) + 1
        whole, whole_ledger = state.write_checked, Ledger.save
        for dies_at in range(n_writes):
            left = iter(range(dies_at))

            def write(*given: Any, real: Any = whole, left: Any = left) -> None:
                if next(left, None) is None:
                    raise OSError("the process is gone")
                real(*given)

            with monkeypatch.context() as patch:
                patch.setattr(state, "write_checked", write)
                patch.setattr(Ledger, "save", functools.partialmethod(write, real=whole_ledger))
                with pytest.raises(OSError, match="gone"):
                    save(team, tmp_path)
            back = resume(opened.asker, tmp_path, [look])
            assert {name: one.ledger.digest for name, one in back.sessions.items()} == before
        save(team, tmp_path)
        assert len(list(tmp_path.iterdir())) == n_writes

    play(FakeEngine(), work)


def test_what_cannot_be_resumed_says_why(tmp_path: Path) -> None:
    async def work(opened: Runtime) -> None:
        with pytest.raises(ConfigError, match=r"There is no team in"):
            opened.resume(tmp_path)
        await _saved(opened, tmp_path, "role-first")
        with pytest.raises(ConfigError, match=r"tools that are not given: look"):
            opened.resume(tmp_path)
        path = tmp_path / NAME
        good = path.read_bytes()
        for at in range(0, len(good), 7):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(ConfigError, match=r"team\.kvt"):
                opened.resume(tmp_path, tools=[look])
        path.write_bytes(good)
        ledger = next(tmp_path.glob("*.kvl"))
        ledger.write_bytes(ledger.read_bytes()[:-1])
        with pytest.raises(ConfigError, match=r"\.kvl is damaged"):
            opened.resume(tmp_path, tools=[look])

    play(FakeEngine(), work)


def test_the_format_page_names_the_fields_of_a_team(tmp_path: Path) -> None:
    async def work(opened: Runtime) -> None:
        await _saved(opened, tmp_path, "role-first")

    play(FakeEngine(), work)
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    section = page.partition("## A team, version 1")[2].partition("\n## ")[0]
    told = msgspec.msgpack.decode(read_checked(tmp_path / NAME, MAGIC, "team"))
    drawn = section.partition("payload  :=")[2].partition("```")[0]
    assert re.findall(r"^  (\w+)", drawn, re.MULTILINE) == list(told)
    assert list(told) == list(Saved.__struct_fields__)


# -- what a child costs --------------------------------------------------------------------------


def test_a_choice_counts_whole_blocks_and_the_shared_part_once() -> None:
    choice = choose(
        prefix_tokens=1010, head_tokens=100, known_tokens=0, tails=[20, 30, 40], block_tokens=16
    )
    # 63 blocks of the prefix once, then 2 tokens of the last one, and the tails, for each.
    assert choice.prefix.computed_tokens == 1008 + 3 * 2 + 90
    assert choice.prefix.cached_tokens == 2 * 1008
    assert choice.message.computed_tokens == 96 + 3 * 4 + 90
    assert choice.message.cached_tokens == 2 * 96
    assert choice.cheaper == "message"
    warm = choose(
        prefix_tokens=1010, head_tokens=100, known_tokens=1010, tails=[20] * 3, block_tokens=16
    )
    assert warm.prefix.computed_tokens == 3 * 22
    assert warm.prefix.cached_tokens == 3 * 1008


def test_a_choice_says_how_long_a_message_may_be() -> None:
    choice = choose(
        prefix_tokens=8000, head_tokens=800, known_tokens=8000, tails=[50], block_tokens=16
    )
    assert choice.longer_tokens == 720  # a tenth of the 7,200 that it need not read
    assert "takes less than 720 tokens" in choice.explain()
    longer = choose(
        prefix_tokens=8000, head_tokens=800, known_tokens=8000, tails=[50], block_tokens=16,
        cached_price=0.0,
    )  # fmt: skip
    assert longer.cheaper == "prefix"
    assert longer.explain().endswith("the prefix is cheaper")


@pytest.mark.parametrize("share", ["prefix", "message"])
def test_the_cost_is_told_before_anything_is_asked(share: Any) -> None:
    engine = FakeEngine()
    asked_when_told: list[int] = []

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead. " * 10)
        one.append("The log is long. " * 20)
        found = await one.map(["a", "b"], share=share)
        one.fork("f")
        one.spawn("Go.", name="s")
        assert asked_when_told == [0, 2, 2]
        assert found.choice.n == 2

    play(engine, work, tell=lambda line: asked_when_told.append(len(engine.bodies)))


def test_a_spawn_has_the_head_and_its_messages_alone() -> None:
    engine = FakeEngine()

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead.", tools=[look])
        await one.step("A secret.")
        child = one.spawn("Look up rum.", name="child")
        await child.step()
        text = RENDERER.decode(engine.bodies[-1]["prompt"])
        assert "A secret." not in text
        assert "Look up rum." in text
        assert "look" in child.tools
        assert engine.bodies[-1]["session_id"] == "child"

    play(engine, work)
