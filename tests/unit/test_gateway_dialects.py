"""Anthropic's and OpenAI's newer API before the same engine, through their own clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from benchmarks._fake_engine import Reply
from tests.gateways import SYSTEM, Start, engine_of

ANTHROPIC_TOOLS: list[Any] = [
    {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}},
]
RESPONSES_TOOLS: list[Any] = [
    {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": None},
]


def message(client: anthropic.Anthropic, stream: bool, **more: Any) -> Any:
    asked: dict[str, Any] = {"model": "fake", "max_tokens": 500, **more}
    if not stream:
        return client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        return events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tool_loop_extends_by_ids(start: Start, stream: bool) -> None:
    one = start()
    client = one.anthropic
    messages: list[Any] = [{"role": "user", "content": "What is there?"}]
    before: list[int] = []
    for turn in range(6):
        told = message(
            client, stream, system=SYSTEM["content"], messages=messages, tools=ANTHROPIC_TOOLS
        )
        prompt = one.engine.prompts[-1]
        assert prompt[: len(before)] == before
        receipt = told.usage.kvmem
        assert receipt["miss"] == ("none" if turn else "new_session")
        if turn:
            assert told.usage.cache_read_input_tokens == receipt["ideal_tokens"] > 0
        assert told.usage.input_tokens + told.usage.cache_read_input_tokens == len(prompt)
        said = one.engine.say(turn, {"tools": ANTHROPIC_TOOLS}).text
        before = [*prompt, *one.engine.encode(said), one.engine.end]
        messages.append({"role": "assistant", "content": [b.to_dict() for b in told.content]})
        if told.stop_reason == "tool_use":
            (use,) = [block for block in told.content if block.type == "tool_use"]
            assert use.input == {"q": f"b{turn}"}
            result = {"type": "tool_result", "tool_use_id": use.id, "content": "a chair"}
            messages.append({"role": "user", "content": [result]})
        else:
            assert told.content[0].text == f" The answer, number {turn}. "
            messages.append({"role": "user", "content": "Go on."})
    assert len(one.gateway.sessions) == 1


def test_cache_control_splits_usage_and_holds_the_ledger(start: Start) -> None:
    one = start(max_sessions=2)
    client = one.anthropic
    mark = {"type": "ephemeral", "ttl": "1h"}
    system = [{"type": "text", "text": SYSTEM["content"], "cache_control": mark}]
    first = message(client, False, system=system, messages=[{"role": "user", "content": "Marked"}])
    head = len(one.engine.encode(f"<|s|>system\n{SYSTEM['content']}<|e|>\n"))
    usage = first.usage
    assert usage.cache_read_input_tokens == 0
    # Up to the mark it was written; what follows it is input.
    assert usage.cache_creation_input_tokens == head
    assert usage.input_tokens + usage.cache_creation_input_tokens == len(one.engine.prompts[0])
    for n in range(4):  # others make room for one another, not the held one
        message(client, False, messages=[{"role": "user", "content": f"Other {n}"}])
    assert len(one.gateway.sessions) == 2
    again = [
        {"role": "user", "content": "Marked"},
        {"role": "assistant", "content": first.content[0].text},
        {"role": "user", "content": "More"},
    ]
    told = message(client, False, system=system, messages=again)
    assert told.usage.kvmem["miss"] == "none"
    lost = [
        {"role": "user", "content": "Other 0"},
        {"role": "assistant", "content": " The answer, number 1. "},
        {"role": "user", "content": "More"},
    ]
    assert message(client, False, messages=lost).usage.kvmem["miss"] == "new_session"


def test_marked_messages_are_pinned(start: Start) -> None:
    one = start()
    text = {"type": "text", "text": "Keep this", "cache_control": {"type": "ephemeral"}}
    message(one.anthropic, False, messages=[
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": [text]},
    ])  # fmt: skip
    (kept,) = one.gateway.sessions.all()
    assert [span.pinned for span in kept.ledger.spans] == [False, False, False, True, False]


def test_more_than_four_marks_are_refused(start: Start) -> None:
    one = start()
    block = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    with pytest.raises(anthropic.BadRequestError, match="5 cache_control marks; at most 4"):
        message(one.anthropic, False, messages=[{"role": "user", "content": [block] * 5}])
    assert one.engine.bodies == []


def test_anthropic_errors_have_its_form(start: Start) -> None:
    one = start()
    one.engine.refuse = (400, "too long for the model")
    with pytest.raises(anthropic.BadRequestError, match="too long for the model"):
        message(one.anthropic, False, messages=[{"role": "user", "content": "a"}])
    with pytest.raises(anthropic.NotFoundError):
        message(one.anthropic, False, model="none", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize("stream", [False, True])
def test_arguments_that_are_no_object_are_an_empty_one(
    start: Start, folder: Path, stream: bool
) -> None:
    engine = engine_of(folder, say=lambda n, body: Reply("a", calls=[("look", '"a"')]))
    one = start(engine=engine)
    ask: list[Any] = [{"role": "user", "content": "a"}]
    told = message(one.anthropic, stream, messages=ask, tools=ANTHROPIC_TOOLS)
    assert told.content[0].input == {}
    use = {"type": "tool_result", "tool_use_id": told.content[0].id, "content": "b"}
    ask += [{"role": "assistant", "content": [b.to_dict() for b in told.content]}]
    ask += [{"role": "user", "content": [use]}]
    again = message(one.anthropic, stream, messages=ask, tools=ANTHROPIC_TOOLS)
    assert again.usage.kvmem["miss"] == "none"


def response(one: Any, stream: bool, **more: Any) -> Any:
    asked: dict[str, Any] = {"model": "fake", **more}
    if not stream:
        return one.client.responses.create(**asked)
    with one.client.responses.stream(**asked) as events:
        return events.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chained", [False, True])
def test_responses_tool_loop_extends_by_ids(
    start: Start,
    stream: bool,
    chained: bool,
) -> None:
    one = start()
    history: list[Any] = []
    new: list[Any] = [{"role": "user", "content": "What is there?"}]
    before: list[int] = []
    previous: dict[str, str] = {}
    for turn in range(6):
        history += new
        told = response(
            one, stream, instructions=SYSTEM["content"], tools=RESPONSES_TOOLS,
            input=new if chained else history, **previous,
        )  # fmt: skip
        prompt = one.engine.prompts[-1]
        assert prompt[: len(before)] == before
        assert told.usage.kvmem["miss"] == ("none" if turn else "new_session")
        if turn:
            assert told.usage.input_tokens_details.cached_tokens > 0
        said = one.engine.say(turn, {"tools": RESPONSES_TOOLS}).text
        before = [*prompt, *one.engine.encode(said), one.engine.end]
        history += [item.to_dict() for item in told.output]
        new = [{"role": "user", "content": [{"type": "input_text", "text": "Go on."}]}]
        for item in told.output:
            if item.type == "function_call":
                assert json.loads(item.arguments) == {"q": f"b{turn}"}
                new = [{"type": "function_call_output", "call_id": item.call_id, "output": "x"}]
        if chained:
            previous = {"previous_response_id": told.id}
    assert len(one.gateway.sessions) == 1


def test_a_previous_response_outlives_a_restart(start: Start, tmp_path: Any) -> None:
    one = start(sessions=tmp_path)
    first = response(one, False, input="What is there?", tools=RESPONSES_TOOLS)
    one.front.stop()
    two = start(engine=one.engine, sessions=tmp_path)
    call = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "x"}
    second = response(
        two, False, input=[call], tools=RESPONSES_TOOLS, previous_response_id=first.id
    )
    assert second.usage.kvmem["miss"] == "none"
    # A client that may not share can't go on from it either.
    with (
        openai.OpenAI(base_url=two.url + "/v1", api_key="another", max_retries=0) as other,
        pytest.raises(openai.NotFoundError, match="There is no response"),
    ):
        other.responses.create(model="fake", input="a", previous_response_id=first.id)


def test_a_response_that_is_not_known_is_refused(start: Start) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no response resp_none"):
        response(start(), False, input="a", previous_response_id="resp_none")
