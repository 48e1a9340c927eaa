"""Agents on the real vLLM: turns, tools, forks, fan-out, teams, and what each found computed."""

from __future__ import annotations

import asyncio
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import pytest

from kvmem.agents import Hint, Runtime, Session, save, sync, tool
from kvmem.agents.budget import Budget
from kvmem.agents.fanout import Fanout
from kvmem.context import ChatRenderer, Undo
from kvmem.demo.server import Server, counters
from kvmem.errors import BudgetExceeded, RequestRefused, ResultInvalid, TurnTimeout
from tests.e2e.host import BLOCK

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = "You are one of a team that plans long journeys by sea. Answer briefly. "


@pytest.fixture
def server(served: Server) -> Server:
    return served


@pytest.fixture(scope="module")
def renderer(smollm2: str) -> ChatRenderer:
    import transformers

    return ChatRenderer.of(transformers.AutoTokenizer.from_pretrained(smollm2))


Work = Callable[[Runtime], Awaitable[Any]]


@pytest.fixture
def play(server: Server, renderer: ChatRenderer) -> Callable[..., Any]:
    """Runs a coroutine function with a runtime on the server."""

    def play(work: Work, **options: Any) -> Any:
        async def main() -> Any:
            settings = {"max_tokens": 12, "fields": {"temperature": 0}, **options}
            async with Runtime(server.url, renderer=renderer, **settings) as runtime:
                return await work(runtime)

        return asyncio.run(main())

    return play


def whole(n_tokens: int) -> int:
    return n_tokens // BLOCK * BLOCK


def computed(server: Server) -> dict[str, int]:
    """The engine's own counters."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return counters(text, "vllm:prompt_tokens_by_source_total", "source")


@tool
def look_up(key: Annotated[str, msgspec.Meta(max_length=12)]) -> str:
    """Looks a key up."""
    return f"the value of {key} is 42"


@tool
def forget(key: Annotated[str, msgspec.Meta(max_length=12)]) -> str:
    """Forgets a key."""
    raise KeyError(key)


class Finding(msgspec.Struct):
    place: Annotated[str, msgspec.Meta(max_length=16)]
    score: Annotated[int, msgspec.Meta(ge=0, le=9)]


def test_every_turn_finds_all_of_the_last_stepped_or_streamed(play: Any) -> None:
    async def work(runtime: Runtime) -> None:
        one = runtime.session("turns", system=SYSTEM * 8)
        known = 0
        for number in range(5):
            if number % 2:
                async with one.stream(f"Question {number}: where to?") as stream:
                    pieces = [text async for text in stream]
                reply = stream.reply
                assert "".join(pieces) == reply.text
                assert reply.first_s is not None
                assert reply.first_s < reply.seconds
            else:
                reply = await one.step(f"Question {number}: where to?", temperature=1.0, seed=3)
            prompt = reply.usage.prompt_tokens
            assert reply.usage.cached_tokens == whole(min(known, prompt - 1))
            known = prompt + reply.usage.sampled_tokens - 1
            assert (reply.agent, reply.turn) == ("turns", number + 1)
        assert one.usage.cached_tokens > 0
        assert "turns: " in repr(one)

    play(work)


def test_a_tool_is_called_by_its_schema_and_its_start_and_end_are_announced(play: Any) -> None:
    heard: list[Hint] = []

    class Ear:
        def announce(self, hint: Hint) -> None:
            heard.append(hint)

    async def work(runtime: Runtime) -> None:
        one = runtime.session("caller", system=SYSTEM * 6, tools=[look_up, forget])
        reply = await one.run("Look up 'rum'.", mode="required", allow="look_*", max_tokens=48)
        assert reply.turn == 2
        assert reply.usage.cached_tokens >= whole(one.ledger.spans[2].stop - 1) > 0
        told = one.ledger.messages()
        (call,) = told[2]["tool_calls"]
        assert call["function"]["name"] == "look_up"
        key = msgspec.json.decode(call["function"]["arguments"])["key"]
        assert told[3]["content"] == f"the value of {key} is 42"
        assert [hint.what for hint in heard] == ["tool_start", "tool_end"]
        assert {hint.session_id for hint in heard} == {"caller"}
        assert heard[0].expected_s is None
        # What a tool raises is told to the model, and stays.
        reply = await one.run("Forget 'rum'.", mode="required", allow="forget", max_tokens=48)
        (failed,) = [m for m in one.ledger.messages() if m.get("is_error")]
        assert failed["content"].startswith("Error: KeyError: ")
        assert heard[-2].tool == heard[-1].tool == "forget"
        one.close()
        one.close()
        assert [hint.what for hint in heard[4:]] == ["session_end"]
        assert heard[-1].n_tokens == one.ledger.n_tokens

    play(work, announcer=Ear())


def test_a_hinted_sessions_blocks_survive_a_crowd_and_a_dead_ones_are_gone(
    play: Any, server: Server
) -> None:
    """The host has 170-odd blocks of 32 tokens: the crowd alone fills it."""
    prompts: dict[str, list[int]] = {}

    async def work(runtime: Runtime) -> None:
        for name in ("alive", "dead"):
            one = runtime.session(f"hint-{name}", system=f"{name}: " + SYSTEM * 30)
            await one.step("Where to?")
            prompts[name] = one.ledger.tokens()
            if name == "dead":
                one.close()  # the runtime tells the engine

    play(work)
    with httpx.Client(base_url=server.url, timeout=300) as http:

        def ask(ids: list[int], **more: Any) -> Any:
            body = {"model": "smol", "prompt": ids, "max_tokens": 8, "temperature": 0, **more}
            return http.post("/v1/completions", json=body).raise_for_status().json()

        def tokens(told: Any) -> dict[str, int]:
            return told["kv_transfer_params"]["kvmem"]["tokens"]

        asked = {"do": "retain", "session": "hint-alive", "for_s": 600}
        told = http.post("/v1/kvmem/hints", json={"version": 1, "actions": [asked]}).json()
        (receipt,) = told["receipts"]
        assert receipt["status"] == "accepted"
        assert receipt["blocks"] >= len(prompts["alive"]) // BLOCK - 1
        for i in range(2):
            ask([7 + i, *range(1000 * i + 100, 1000 * i + 3100)], max_tokens=1)
        assert http.post("/reset_prefix_cache").status_code == 200
        follow = [*prompts["alive"], *prompts["alive"][40:60]]
        hit = ask(follow, session_id="hint-alive")
        assert tokens(hit)["host"] >= whole(len(prompts["alive"]) - 1)
        assert tokens(hit)["device"] == 0
        assert tokens(ask(prompts["dead"]))["host"] == 0
        assert http.post("/reset_prefix_cache").status_code == 200
        cold = ask(follow, kv_transfer_params={"kvmem": {"load": False}})
        assert tokens(cold)["computed"] == len(follow)
        assert hit["choices"][0]["text"] == cold["choices"][0]["text"]
        told = http.get("/v1/kvmem/receipts").json()["receipts"]
        done = {(one["do"], one["session"]): one["status"] for one in told}
        # Which of the orders leads is what other tests have made of it.
        assert done["session_end", "hint-dead"] in ("accepted", "deferred")
        assert done["retain", "hint-alive"] == "accepted"


def test_a_fork_finds_its_past_and_a_spawn_only_the_head(play: Any) -> None:
    lines: list[str] = []

    async def work(runtime: Runtime) -> None:
        one = runtime.session("origin", system="You lead. " + SYSTEM * 6)
        await one.step("Where to?")
        before = one.ledger.n_tokens
        fork = one.fork("fork")
        assert "the prefix of" in lines[-1]
        spawned = one.spawn("The plan is to sail. Begin.", name="spawned")
        assert "the prefix of" in lines[-1]
        reply = await fork.step("Why there?")
        assert reply.usage.cached_tokens >= whole(before - 1)
        reply = await spawned.step()
        head = spawned.ledger.spans[0].stop
        assert reply.usage.cached_tokens == whole(head)
        assert one.ledger.n_tokens == before

    play(work, tell=lines.append)


async def _cold_map(runtime: Runtime, name: str, **how: Any) -> tuple[Session, Fanout[Any]]:
    one = runtime.session(name, system=f"You are {name}. " + SYSTEM * 8)
    one.append("Here is the log of the journey. " + f"{name} saw the sea and the sky. " * 100)
    return one, await one.map([f"What happened on day {day}?" for day in range(6)], **how)


@pytest.mark.parametrize("share", ["prefix", "message"])
def test_a_cold_fan_out_computes_what_is_shared_once(play: Any, server: Server, share: str) -> None:
    before = computed(server)

    async def work(runtime: Runtime) -> None:
        one, found = await _cold_map(runtime, f"mapper-{share}", share=share)
        shared = one.ledger.n_tokens if share == "prefix" else one.ledger.spans[0].stop
        usage = [result.reply.usage for result in found if result.reply is not None]
        assert len(usage) == 6
        assert usage[0].cached_tokens < BLOCK
        for other in usage[1:]:
            assert other.cached_tokens >= whole(shared) > 0
        side = getattr(found.choice, share)
        assert found.usage.computed_tokens == side.computed_tokens
        # The engine counted the same.
        after = computed(server)
        assert after["local_compute"] - before["local_compute"] == found.usage.computed_tokens
        # The parent knows what its children made the engine compute.
        assert one.knows(shared)

    play(work)


def test_a_fan_out_is_typed_and_joins_its_parent(play: Any) -> None:
    async def work(runtime: Runtime) -> None:
        one, found = await _cold_map(runtime, "typed", schema=Finding, max_tokens=64)
        assert all(isinstance(value, Finding) for value in found.values)
        before = one.ledger.tokens()
        found.join(one, "These came back.")
        assert one.ledger.tokens()[: len(before)] == before
        assert found[0].text in one.ledger.messages()[-1]["content"]
        found.close()
        assert all(result.session.closed for result in found)

    play(work)


def test_an_answer_that_was_cut_is_no_value_and_no_turn(play: Any) -> None:
    async def work(runtime: Runtime) -> None:
        one = runtime.session("cut", system=SYSTEM)
        with pytest.raises(ResultInvalid, match=r"Agent cut, turn 1: .* cut at max_tokens") as told:
            await one.step("Where to?", schema=Finding, max_tokens=3)
        assert "max_tokens" in told.value.next_step
        assert (one.turn, len(one.ledger.spans)) == (0, 1)
        assert one.usage.sampled_tokens == 3  # they were spent

    play(work)


async def _running(server: Server, wanted: Callable[[float], bool]) -> None:
    """Until the engine's own count of running requests is as wanted."""
    async with httpx.AsyncClient() as client:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            text = (await client.get(f"{server.url}/metrics")).text
            if wanted(sum(counters(text, "vllm:num_requests_running", "model_name").values())):
                return
    raise AssertionError("the engine's requests are not as wanted after 60 s")


def test_a_cancelled_fan_out_ends_in_the_engine_and_changes_nothing(
    play: Any, server: Server
) -> None:
    async def work(runtime: Runtime) -> None:
        one = runtime.session("cancelled", system=SYSTEM * 8)
        await one.step("Where to?")
        before = one.ledger.digest
        doing = asyncio.create_task(
            one.map(["Tell all of it."] * 4, max_tokens=2000, ignore_eos=True)
        )
        await _running(server, lambda n: n == 4)
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing
        await _running(server, lambda n: n == 0)
        assert one.ledger.digest == before
        reply = await one.step("And then?")
        assert reply.usage.cached_tokens >= whole(one.ledger.spans[2].stop - 1)

    play(work)


def test_a_turn_out_of_time_names_itself_and_its_retry_finds_the_prefix(
    play: Any, server: Server
) -> None:
    async def work(runtime: Runtime) -> None:
        one = runtime.session("late", system="Late. " + SYSTEM * 8)
        with pytest.raises(TurnTimeout, match=r"^Agent late, turn 1: .* 2 s\. Give it more time"):
            await one.step("Tell all.", max_tokens=2000, ignore_eos=True, timeout_s=2)
        await _running(server, lambda n: n == 0)
        assert (one.turn, len(one.ledger.spans)) == (0, 1)
        reply = await one.step("Tell all.")
        assert reply.usage.cached_tokens == whole(reply.usage.prompt_tokens - 1) > 0

    play(work)


def test_a_stream_left_early_commits_nothing_and_the_engine_stops(
    play: Any, server: Server
) -> None:
    async def work(runtime: Runtime) -> None:
        one = runtime.session("left", system=SYSTEM)
        async with one.stream("Tell all.", max_tokens=2000, ignore_eos=True) as stream:
            async for _ in stream:
                break
        await _running(server, lambda n: n == 0)
        assert (one.turn, len(one.ledger.spans)) == (0, 1)
        await one.step("And now?")

    play(work)


def test_a_budget_of_tokens_bounds_all_children_together(play: Any) -> None:
    async def work(runtime: Runtime) -> None:
        budget = Budget(tokens=1200)
        one = runtime.session("thrifty", system=SYSTEM * 8, budget=budget)
        found = await one.map(
            [f"Tell all about day {n}." for n in range(12)],
            max_tokens=150, ignore_eos=True, on_error="keep",
        )  # fmt: skip
        assert any(isinstance(error, BudgetExceeded) for error in found.errors)
        assert any(result.error is None for result in found)
        assert budget.spent.tokens <= 1200
        assert budget.spent.tokens == found.usage.computed_tokens + found.usage.sampled_tokens

    play(work)


# Saves a team and is killed.
SAVES = """
import os, signal, sys
from pathlib import Path
from kvmem.agents import Budget, sync
from tests.e2e.test_agents import SYSTEM, look_up

with sync.Runtime(sys.argv[1], max_tokens=12, fields={"temperature": 0}) as runtime:
    team = runtime.team("crew", system=SYSTEM * 8, tools=[look_up], budget=Budget(tokens=9999))
    lead = team.session("lead")
    lead.step("Where to?")
    team.agent("cook", role="You cook.")
    team.tell("We sail tomorrow.")
    team.turn("cook")
    team.save(Path(sys.argv[2]))
    print(lead.ledger.digest, team.inner.budget.spent.tokens, flush=True)
    lead.step("This is not saved.")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_team_goes_on_where_a_killed_process_saved_it(
    play: Any, server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "team"
    done = subprocess.run(
        [sys.executable, "-c", SAVES, server.url, str(folder)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    digest, spent = done.stdout.split()
    files = list(folder.iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    async def go_on(runtime: Runtime) -> None:
        team = runtime.resume(folder, tools=[look_up])
        lead = team.sessions["lead"]
        assert (lead.ledger.digest, lead.turn) == (digest, 1)
        assert (team.budget.tokens, team.budget.spent.tokens) == (9999, int(spent))
        asked = lead.ledger.n_tokens
        reply = await lead.step("Why there?")
        assert reply.turn == 2
        assert reply.usage.cached_tokens == whole(asked - 1) > 0
        reply = await team.turn("cook")
        assert reply.usage.cached_tokens > 0
        assert len(team.said) == 3
        save(team, folder)
        assert len(list(folder.iterdir())) == 3  # what is not named any more is gone

    play(go_on)


def test_a_shared_transcript_is_computed_once_and_role_first_once_an_agent(
    play: Any,
) -> None:
    async def work(runtime: Runtime) -> None:
        spent, last = {}, {}
        for layout in ("role-first", "shared-first", "one-ledger"):
            system = f"({layout}) " + SYSTEM * 2
            team = runtime.team(layout, system=system, layout=layout)
            for name in ("lead", "cook", "mate"):
                team.agent(name, role=f"You are the {name}. Speak of your own work alone.")
            team.tell("The log says: " + "we saw the sea and the sky. " * 60)
            for name in ("lead", "cook", "mate", "lead", "cook", "mate"):
                last[layout] = await team.turn(name)
            spent[layout] = team.usage.computed_tokens
            assert [str(m["content"]).partition(":")[0] for m in team.said[1:]]
        # Three agents, a log of 400 tokens.
        assert spent["shared-first"] < 0.55 * spent["role-first"]
        assert spent["one-ledger"] < spent["shared-first"]
        for layout in ("shared-first", "one-ledger"):
            assert last[layout].usage.cached_tokens > 400

    play(work)


def test_what_an_agent_said_is_in_the_transcript_as_it_was_sampled(play: Any) -> None:
    async def work(runtime: Runtime) -> None:
        team = runtime.team("choir", system=SYSTEM, layout="shared-first")
        team.agent("cook", role="You cook.")
        team.tell("What is for supper?")
        reply = await team.turn("cook", temperature=1.0, seed=5)
        transcript = team.sessions["transcript"].ledger
        span = transcript.spans[-1]
        assert (span.source, span.sampled) == ("sampled", reply.usage.sampled_tokens)
        assert team.said[-1]["content"] == reply.text
        assert "You cook." not in str(team.said)

    play(work)


def test_an_epoch_is_adopted_and_what_it_shares_is_found(play: Any, server: Server) -> None:
    async def work(runtime: Runtime) -> None:
        one = runtime.session("epochs", system=SYSTEM * 8)
        await one.step("Where to?")
        kept = one.ledger.n_tokens
        await one.step("Why there? " + "Say it again, and slowly. " * 20)  # blocks of its own
        one.adopt(one.ledger.rewrite(Undo(1)))
        assert one.ledger.n_tokens == kept
        reply = await one.step("When?")
        assert reply.usage.cached_tokens >= whole(kept - 1)
        await one.step("How?")

    play(work)
    # The engine was told, once, that what was undone is not asked again.
    told = httpx.get(f"{server.url}/v1/kvmem/receipts", timeout=30).json()["receipts"]
    (one,) = [r for r in told if (r["do"], r["session"]) == ("supersede", "epochs")]
    assert one["status"] in ("accepted", "deferred")
    assert one["blocks"] > 0


def test_a_refusal_says_what_the_engine_says_and_is_not_tried_again(play: Any) -> None:
    async def work(runtime: Runtime) -> None:
        one = runtime.session("long", system=SYSTEM)
        with pytest.raises(RequestRefused, match=r"Agent long, turn 1: .* 400: .*4096 tokens"):
            await one.step("word " * 5000)
        assert one.turn == 0

    play(work)


def test_the_sync_face_does_the_same(server: Server, renderer: ChatRenderer) -> None:
    fields = {"temperature": 0}
    with sync.Runtime(server.url, renderer=renderer, max_tokens=12, fields=fields) as runtime:
        one = runtime.session("sync", system="In turn. " + SYSTEM * 8)
        first = one.step("Where to?")
        pieces = list(one.stream("Why there?"))
        assert len(pieces) > 1
        assert one.inner.turn == 2
        early = one.stream("And then?", max_tokens=500, ignore_eos=True)
        next(early)
        early.close()
        assert one.inner.turn == 2
        found = one.map(["the sea", "the hills"], schema=Finding, max_tokens=64)
        assert all(isinstance(value, Finding) for value in found.values)
        assert found.usage.cached_tokens >= 2 * whole(first.usage.prompt_tokens)
        one.join(found)
        child = one.fork("sync-child")
        assert child.step("Go on.").usage.cached_tokens > 0
