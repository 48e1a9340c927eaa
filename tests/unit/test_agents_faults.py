"""What agents do when their engine fails: retries, limits, cancellation, and whose turn it was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

pytest.importorskip("transformers")
pytest.importorskip("httpx")

from kvmem.agents import Budget, Hint, Retries, Runtime, sync, tool
from kvmem.agents.values import Where
from kvmem.errors import (
    AgentError,
    BudgetExceeded,
    ConfigError,
    EngineError,
    EngineUnavailable,
    KVMemError,
    PrefixBroken,
    RequestRefused,
    ResultInvalid,
    ToolCallInvalid,
    TurnTimeout,
)
from tests.fake_engine import END, RENDERER, FakeEngine, runtime

SOON = Retries(times=2, first_wait_s=0.0)
GONE = httpx.ConnectError("nobody listens")


def play(engine: FakeEngine, work: Callable[[Runtime], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with runtime(engine, retries=SOON, **options) as opened:
            return await work(opened)

    return asyncio.run(main())


# -- retries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [503, 429, 500, GONE, httpx.ReadError("cut")], ids=str)
def test_a_passing_fault_is_retried_with_the_same_ids(fault: Any) -> None:
    engine = FakeEngine(faults=[fault])

    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.")
        reply = await one.step("Where?")
        assert (reply.text, one.turn) == ("Aye.", 1)
        assert engine.bodies[0] == engine.bodies[1]

    play(engine, work)


def test_retries_end_and_say_whose_turn_and_what_to_do() -> None:
    engine = FakeEngine(faults=[GONE, 503, GONE])

    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.")
        before = one.ledger.digest
        with pytest.raises(EngineUnavailable) as told:
            await one.step("Where?")
        assert str(told.value).startswith("Agent planner, turn 1: http://engine failed 3 times")
        assert str(told.value).endswith("its session is as it was before.")
        assert (told.value.agent, told.value.turn, told.value.attempts) == ("planner", 1, 3)
        assert (one.ledger.digest, one.turn) == (before, 0)
        assert (await one.step("Where?")).turn == 1

    play(engine, work)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_retried(status: int) -> None:
    engine = FakeEngine(faults=[status])

    async def work(opened: Runtime) -> None:
        with pytest.raises(RequestRefused, match=f"turn 1: http://engine answered {status}: no"):
            await opened.session("planner").step("Where?")
        assert len(engine.bodies) == 1

    play(engine, work)


def test_a_retry_waits_for_as_long_as_the_server_asks_and_no_longer_than_the_limit() -> None:
    waits = Retries(first_wait_s=0.5, longest_wait_s=3.0)
    assert [waits.wait_s(n, None) for n in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, 3.0]
    assert (waits.wait_s(1, 2.0), waits.wait_s(1, 60.0)) == (2.0, 3.0)


def test_a_stream_that_breaks_goes_on_from_the_ids_that_had_come() -> None:
    engine = FakeEngine("abcdefgh", faults=["cut:3", "cut:2"])
    # What is asked to go on says the rest.
    engine.says = lambda prompt: "abcdefgh"[len(engine.bodies) * 2 and _come(engine) :]

    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.")
        async with one.stream("Where?", max_tokens=40) as stream:
            pieces = [text async for text in stream]
        assert "".join(pieces) == stream.reply.text == "abcdefgh"
        first, second, third = engine.bodies
        assert second["prompt"] == [*first["prompt"], *RENDERER.encode("abc")]
        assert third["prompt"] == [*first["prompt"], *RENDERER.encode("abcde")]
        assert [body["max_tokens"] for body in engine.bodies] == [40, 37, 35]
        span = one.ledger.spans[-1]
        assert one.ledger.tokens()[-span.sampled :] == [*RENDERER.encode("abcdefgh"), *END]

    play(engine, work)


def _come(engine: FakeEngine) -> int:
    return len(engine.bodies[-1]["prompt"]) - len(engine.bodies[0]["prompt"])


def test_a_stream_that_went_on_is_cut_at_the_same_number_of_tokens() -> None:
    engine = FakeEngine(faults=["cut:3"])
    engine.says = lambda prompt: "abcdefgh"[_come(engine) :]

    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.")
        async with one.stream("Where?", max_tokens=3) as stream:
            assert "".join([text async for text in stream]) == "abc"
        # All had come, but the end: nothing was asked again.
        assert len(engine.bodies) == 1 or engine.bodies[1]["max_tokens"] > 0

    play(engine, work)


def test_a_stream_held_to_a_grammar_does_not_go_on_in_its_middle() -> None:
    @tool
    def look(key: str) -> str:
        """Looks."""
        return key

    engine = FakeEngine("abcdefgh", faults=["cut:3"])

    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.", tools=[look])
        with pytest.raises(EngineUnavailable, match=r"the connection is gone"):
            await _streamed(one, "Where?")
        assert (len(engine.bodies), one.turn) == (1, 0)

    play(engine, work)


async def _streamed(one: Any, question: str) -> None:
    async with one.stream(question) as stream:
        async for _ in stream:
            pass


def test_an_engine_that_was_asked_something_else_is_found_out() -> None:
    engine = FakeEngine()
    honest = engine._answer

    async def lying(body: dict[str, Any], fault: Any) -> httpx.Response:
        return await honest({**body, "prompt": [*body["prompt"][:-1], 0]}, fault)

    engine._answer = lying  # type: ignore[method-assign]

    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.")
        with pytest.raises(PrefixBroken, match=r"The engine was asked"):
            await one.step("Where?")
        assert one.turn == 0

    play(engine, work)


def test_a_server_without_ids_is_named() -> None:
    class NoIds(FakeEngine):
        async def _answer(self, body: dict[str, Any], fault: Any) -> httpx.Response:
            choice = {"text": "Aye.", "finish_reason": "stop"}
            return httpx.Response(200, json={"choices": [choice]})

    async def work(opened: Runtime) -> None:
        with pytest.raises(EngineError, match=r"Agent planner, turn 1: .* no token ids"):
            await opened.session("planner").step("Where?")

    play(NoIds(), work)


# -- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["turn", "runtime", "budget"])
def test_a_turn_that_hangs_ends_in_time(how: str) -> None:
    engine = FakeEngine(faults=["hang"])
    seconds = 0.05
    options = {"timeout_s": seconds} if how == "runtime" else {}

    async def work(opened: Runtime) -> None:
        budget = Budget(seconds=seconds) if how == "budget" else None
        one = opened.session("planner", system="Plan.", budget=budget)
        kind = BudgetExceeded if how == "budget" else TurnTimeout
        with pytest.raises(kind, match=r"Agent planner, turn 1: "):
            await one.step("Where?", timeout_s=seconds if how == "turn" else None)
        assert engine.running == 0
        assert one.turn == 0

    play(engine, work, **options)


def test_the_time_of_a_turn_bounds_its_retries_too() -> None:
    engine = FakeEngine(faults=[(503, {"retry-after": "60"})])

    async def main() -> None:
        slow = Retries(longest_wait_s=60.0)
        async with runtime(engine, retries=slow) as opened:
            began = time.monotonic()
            with pytest.raises(TurnTimeout):
                await opened.session("planner").step("Where?", timeout_s=0.05)
            assert time.monotonic() - began < 30

    asyncio.run(main())


def test_what_a_stream_that_is_left_had_sampled_is_spent() -> None:
    async def work(opened: Runtime) -> None:
        budget = Budget(tokens=500)
        one = opened.session("planner", system="Plan.", budget=budget)
        prompt = one.quote("Where?").prefix.computed_tokens
        async with one.stream("Where?") as stream:
            taken = [await anext(aiter(stream))]
        assert taken == ["A"]
        assert (one.turn, budget.spent.tokens) == (0, prompt + 1)

    play(FakeEngine(), work)


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"choices": []}'])
def test_what_is_no_engine_is_said_to_be_none(body: str) -> None:
    class Page(FakeEngine):
        async def _answer(self, asked: dict[str, Any], fault: Any) -> httpx.Response:
            return httpx.Response(200, text=body)

    async def work(opened: Runtime) -> None:
        with pytest.raises(EngineError, match=r"Agent planner, turn 1: what http://engine/v1/comp"):
            await opened.session("planner").step("Where?")

    play(Page(), work)

    class Door(FakeEngine):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, text=body)

    with pytest.raises(EngineError, match=r"^The runtime: what http://engine/v1/models answers"):
        play(Door(), _nothing)


def test_a_reader_that_takes_its_time_is_not_cut_off() -> None:
    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.")
        async with one.stream("Where?", timeout_s=5.0) as stream:
            async for _ in stream:
                await asyncio.sleep(0)
        assert stream.reply.text == "Aye."

    play(FakeEngine(), work)


# -- many ----------------------------------------------------------------------------------------


def test_no_more_requests_are_out_than_the_runtime_allows() -> None:
    engine = FakeEngine()

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead.")
        await one.step("Plan.")
        await one.map([str(n) for n in range(20)])
        assert engine.most == 3

    play(engine, work, concurrency=3)


def test_a_map_has_a_limit_of_its_own() -> None:
    engine = FakeEngine()

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead.")
        await one.map([str(n) for n in range(20)], concurrency=2)
        assert engine.most == 2

    play(engine, work)


def test_the_first_child_asks_alone_until_its_first_token() -> None:
    engine = FakeEngine(faults=["wait"])

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead. " * 20)
        doing = asyncio.create_task(one.map(["a", "b", "c"]))
        await engine.arrived.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(engine.bodies) == 1
        engine.go.set()
        found = await doing
        assert [result.text for result in found] == ["Aye."] * 3
        # Now the engine has it, as far as is known: all at once.
        engine.bodies.clear()
        engine.go.clear()
        engine.faults += ["wait"] * 3
        doing = asyncio.create_task(one.map(["a", "b", "c"]))
        while len(engine.bodies) < 3:
            await asyncio.sleep(0)
        engine.go.set()
        await doing

    play(engine, work)


def test_where_the_first_child_fails_the_next_one_asks_alone() -> None:
    engine = FakeEngine(faults=[400, "wait"])

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead. " * 20)
        doing = asyncio.create_task(one.map(["a", "b", "c"], on_error="keep"))
        while len(engine.bodies) < 2:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(engine.bodies) == 2
        engine.go.set()
        found = await doing
        assert [type(result.error) for result in found] == [RequestRefused, type(None), type(None)]
        assert found.errors[0].agent == "lead/1"
        with pytest.raises(RequestRefused):
            _ = found.values

    play(engine, work)


def test_the_first_error_ends_the_others_and_is_raised_as_it_is() -> None:
    engine = FakeEngine(faults=[400, "hang", "hang"])

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead.")
        one.known_tokens = 10_000
        with pytest.raises(RequestRefused, match=r"Agent lead/"):
            await one.map(["a", "b", "c"])
        assert (engine.running, engine.ended) == (0, len(engine.bodies))

    play(engine, work)


@pytest.mark.parametrize("known", [0, 10_000], ids=["cold", "warm"])
def test_a_cancelled_map_leaves_nothing_running(known: int) -> None:
    engine = FakeEngine(faults=["hang"] * 3)

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead. " * 20)
        one.known_tokens = known
        doing = asyncio.create_task(one.map(["a", "b", "c"]))
        while len(engine.bodies) < (3 if known else 1):
            await asyncio.sleep(0)
        assert engine.running == (3 if known else 1)
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing
        assert engine.running == 0
        assert len(asyncio.all_tasks()) == 1

    play(engine, work)


def test_two_steps_of_one_session_wait_for_each_other() -> None:
    engine = FakeEngine()

    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.")
        await asyncio.gather(one.step("Where?"), one.step("Why?"))
        assert (engine.most, one.turn) == (1, 2)
        assert (
            engine.bodies[1]["prompt"][: len(engine.bodies[0]["prompt"])]
            == (engine.bodies[0]["prompt"])
        )

    play(engine, work)


def test_a_session_whose_turn_is_under_way_takes_no_messages() -> None:
    engine = FakeEngine(faults=["wait"])

    async def work(opened: Runtime) -> None:
        one = opened.session("planner", system="Plan.")
        doing = asyncio.create_task(one.step("Where?"))
        await engine.arrived.wait()
        with pytest.raises(AgentError, match=r"Agent planner, turn 1: .* under way .* appended to"):
            one.append("And why?")
        assert one.fork("other").ledger.n_tokens == one.ledger.n_tokens
        engine.go.set()
        await doing

    play(engine, work)


# -- budgets -------------------------------------------------------------------------------------


def test_children_side_by_side_do_not_pass_a_budget_together() -> None:
    engine = FakeEngine("a" * 500)

    async def work(opened: Runtime) -> None:
        budget = Budget(tokens=600)
        one = opened.session("lead", system="Lead.", budget=budget)
        found = await one.map(["a"] * 8, max_tokens=100, on_error="keep")
        assert found.errors
        assert all(isinstance(error, BudgetExceeded) for error in found.errors)
        assert 300 < budget.spent.tokens <= 600
        assert "of 600 tokens" in repr(budget)

    play(engine, work)


def test_the_last_turn_of_a_budget_samples_what_is_left() -> None:
    engine = FakeEngine("a" * 500)

    async def work(opened: Runtime) -> None:
        one = opened.session("lead", system="Lead.", budget=Budget(tokens=200))
        prompt = one.quote("Go.").prefix.computed_tokens
        reply = await one.step("Go.", max_tokens=400)
        assert reply.usage.sampled_tokens == 200 - prompt
        with pytest.raises(BudgetExceeded, match=r"Agent lead, turn 2: 200 of 200 tokens"):
            await one.step("On.")
        assert len(engine.bodies) == 1

    play(engine, work)


def test_a_failed_request_gives_back_what_was_set_aside() -> None:
    engine = FakeEngine(faults=[400])

    async def work(opened: Runtime) -> None:
        budget = Budget(tokens=300)
        one = opened.session("lead", system="Lead.", budget=budget)
        with pytest.raises(RequestRefused):
            await one.step("Go.", max_tokens=200)
        assert budget.spent.tokens == 0
        assert budget.reserve(Where("x", 1), prompt_tokens=0, max_tokens=300).max_tokens == 300

    play(engine, work)


@pytest.mark.parametrize("limit", [{"tokens": 0}, {"seconds": -1.0}])
def test_a_budget_that_allows_nothing_is_refused(limit: Any) -> None:
    with pytest.raises(ConfigError, match=r"allows nothing"):
        Budget(**limit)


# -- tools and results ---------------------------------------------------------------------------


@tool
def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    This is not for the model.
    """
    return a + b


def call(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ('{"name": "add", "arguments": {"a": "two"}}', "$.a: 'two' is not of type 'integer'"),
        ('{"name": "add", "arguments": {}}', "'a' is a required property"),
        ('{"name": "add", "arguments": {"a": 1, "c": 1}}', "'c' was unexpected"),
        ('{"name": "sub", "arguments": {}}', "there is no tool sub; known: add"),
        ('{"name": "add", "argum', "this call is no JSON"),
        ("[1]", "a call is an object with a name and arguments"),
    ],
)
def test_a_call_that_does_not_fit_is_not_made_and_the_model_is_told(
    written: str, fault: str
) -> None:
    engine = FakeEngine(lambda prompt: "Done." if "Error" in prompt else call(written))

    async def work(opened: Runtime) -> None:
        one = opened.session("adder", system="Add.", tools=[add])
        reply = await one.run("Add 1 and 1.")
        assert reply.text == "Done."
        (told,) = [m for m in one.ledger.messages() if m["role"] == "tool"]
        assert fault in told["content"]
        assert told["is_error"] is True
        assert [span.pinned for span in one.ledger.spans if span.role == "tool"] == [True]

    play(engine, work)


def test_a_model_that_never_calls_rightly_is_given_up() -> None:
    async def work(opened: Runtime) -> None:
        one = opened.session("adder", system="Add.", tools=[add])
        with pytest.raises(ToolCallInvalid, match=r"Agent adder, turn 4: 3 turns in a row .* sub"):
            await one.run("Add 1 and 1.")

    play(FakeEngine(call('{"name": "sub", "arguments": {}}')), work)


def test_a_model_that_calls_for_ever_is_stopped() -> None:
    async def work(opened: Runtime) -> None:
        one = opened.session("adder", system="Add.", tools=[add])
        with pytest.raises(AgentError, match=r"still calls tools after 2 turns") as told:
            await one.run("Add 1 and 1.", max_turns=2)
        # Its last call was not made; whoever wants goes on.
        assert [m["role"] for m in one.ledger.messages()].count("tool") == 1
        reply = await one.step(*await one.answer(told.value.tool_calls))
        assert reply.turn == 3

    play(FakeEngine(call('{"name": "add", "arguments": {"a": 1}}')), work)


def test_calls_of_one_turn_are_made_side_by_side_and_answered_in_order() -> None:
    both = asyncio.Event()
    begun: list[str] = []

    @tool
    async def meet(name: str) -> str:
        """Meets the other one."""
        begun.append(name)
        if len(begun) == 2:
            both.set()
        await both.wait()
        return f"met by {name}"

    calls = "".join(call(f'{{"name": "meet", "arguments": {{"name": "{name}"}}}}') for name in "ab")
    engine = FakeEngine(lambda prompt: "Done." if "met by" in prompt else calls)

    async def work(opened: Runtime) -> None:
        one = opened.session("host", system="Meet.", tools=[meet])
        await one.run("Go.")
        told = [m["content"] for m in one.ledger.messages() if m["role"] == "tool"]
        assert told == ["met by a", "met by b"]

    play(engine, work)


def test_a_tool_out_of_time_is_told_and_its_end_is_announced() -> None:
    @tool(timeout_s=0.02)
    async def sleep(key: str) -> str:
        """Sleeps."""
        await asyncio.Event().wait()
        return key

    heard: list[Hint] = []

    class Ear:
        def announce(self, hint: Hint) -> None:
            heard.append(hint)
            raise RuntimeError("I9: it costs the hint alone")

    asked = call('{"name": "sleep", "arguments": {"key": "k"}}')
    engine = FakeEngine(lambda prompt: "Done." if "took longer" in prompt else asked)

    async def work(opened: Runtime) -> None:
        one = opened.session("sleeper", system="Sleep.", tools=[sleep])
        assert (await one.run("Sleep.")).text == "Done."
        assert [hint.what for hint in heard] == ["tool_start", "tool_end"]
        await one.answer([*_calls(one, asked)])
        assert heard[2].expected_s is not None
        assert heard[2].expected_s >= 0.02

    play(engine, work, announcer=Ear())


def _calls(one: Any, text: str) -> Any:
    from kvmem.agents.tools import calls_in
    from kvmem.context.mask import HERMES

    return calls_in(text, one.tools, HERMES, first=0)


def test_a_tools_schema_is_its_signature_and_its_text_its_first_paragraph() -> None:
    assert add.schema["function"] == {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    assert repr(add) == "<Tool add(a, b)>"
    with pytest.raises(ConfigError, match=r"its argument a has no type"):
        tool(lambda a: a)


def test_a_schema_without_its_references_says_the_same() -> None:
    from kvmem.agents.schemas import fault_of, schema_of

    made = schema_of(_Trip)
    assert "$ref" not in str(made)
    assert fault_of({"stops": [{"name": "sea"}]}, made) == ""
    assert fault_of({"stops": [{"name": 1}]}, made).startswith("$.stops[0].name: 1 is not")


class _Place(msgspec.Struct):
    name: str


class _Trip(msgspec.Struct):
    stops: list[_Place]


class _Node(msgspec.Struct):
    inner: _Node | None = None


def test_a_type_that_contains_itself_is_refused() -> None:
    from kvmem.agents.schemas import schema_of

    with pytest.raises(ConfigError, match=r"leads into itself"):
        schema_of(_Node)


@pytest.mark.parametrize("schema", [dict[str, int], {"type": "object"}], ids=["type", "schema"])
def test_an_answer_that_does_not_fit_is_no_turn(schema: Any) -> None:
    async def work(opened: Runtime) -> None:
        one = opened.session("typed", system="Be exact.")
        with pytest.raises(ResultInvalid, match=r"Agent typed, turn 1: .* begins '\[1\]'"):
            await one.step("Go.", schema=schema)
        assert (one.turn, len(one.ledger.spans)) == (0, 1)

    play(FakeEngine("[1]"), work)


# -- the doors -----------------------------------------------------------------------------------


def test_what_cannot_be_opened_says_why() -> None:
    with pytest.raises(ConfigError, match=r"no address"):
        Runtime("engine:8000")
    with pytest.raises(ConfigError, match=r"concurrency of 0"):
        Runtime("http://engine", concurrency=0)
    with pytest.raises(AgentError, match=r"not open"):
        Runtime("http://engine").session("planner")
    with pytest.raises(ConfigError, match=r"does not have the model other.* Give one of m"):
        play(FakeEngine(), _nothing, model="other")


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with Runtime("http://engine", transport=FakeEngine(), tokenizer=str(tmp_path)):
            pass

    with pytest.raises(ConfigError, match=r"The tokenizer of .* cannot be read") as told:
        asyncio.run(main())
    assert "tokenizer=" in told.value.next_step


async def _nothing(opened: Runtime) -> None:
    assert opened.model == "m"


@pytest.mark.parametrize("field", ["prompt", "stream", "model", "return_token_ids"])
def test_a_turn_cannot_change_what_is_the_runtimes(field: str) -> None:
    async def work(opened: Runtime) -> None:
        with pytest.raises(ConfigError, match=f"{field} of the body cannot be set"):
            await opened.session("planner").step("Where?", **{field: 1})

    play(FakeEngine(), work)


def test_a_closed_session_is_not_asked() -> None:
    async def work(opened: Runtime) -> None:
        one = opened.session("planner")
        one.close()
        for ask in (one.step("Where?"), one.map(["a"])):
            with pytest.raises(AgentError, match=r"the session is closed"):
                await ask
        with pytest.raises(AgentError, match=r"the session is closed"):
            one.fork("other")

    play(FakeEngine(), work)


def test_the_sync_face_ends_its_thread_and_raises_the_same_errors() -> None:
    import threading

    engine_faults = [400]
    before = threading.active_count()
    with sync.Runtime(
        "http://engine", renderer=RENDERER, transport=FakeEngine(faults=engine_faults)
    ) as opened:
        one = opened.session("planner", system="Plan.")
        with pytest.raises(RequestRefused):
            one.step("Where?")
        assert one.step("Where?").text == "Aye."
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(AgentError, match=r"not open"):
        opened.session("planner")
    with pytest.raises(KVMemError):
        sync.Runtime("nowhere").__enter__()
    assert threading.active_count() == before
