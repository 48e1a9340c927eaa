"""The gateway before an engine that computes nothing: sessions, reasons, failures, limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from benchmarks._fake_engine import FakeEngine, Reply, Serving
from kvmem.agents.gateway.app import Gateway
from kvmem.agents.gateway.settings import Settings
from tests import tiny_tokenizers

TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "open", "description": "Opens."}},
]
SYSTEM = {"role": "system", "content": "You look around in the house and tell what there is."}
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizers.tokenizer().save_pretrained(path)
    return path


def say(number: int, body: dict[str, Any]) -> Reply:
    """Text that no tokenizer would cut as it was sampled is not needed: the ids are compared."""
    if body.get("tools") and number % 2 == 0:
        arguments = json.dumps({"q": f"b{number}"})
        return Reply(f"<call>look {arguments}</call>", calls=[("look", arguments)])
    return Reply(f" The answer, number {number}. ")


def engine_of(folder: Path, **more: Any) -> FakeEngine:
    """Renders by transformers itself, with what vLLM does to messages and tools before."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def render(messages: Any, tools: Any = None, **template: Any) -> list[int]:
        told = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, list):
                content = "\n".join(part["text"] for part in content)
            one = {**message, "content": content or ""}
            for call in one.get("tool_calls") or ():
                arguments = json.loads(call["function"]["arguments"])
                call["function"] = {**call["function"], "arguments": arguments}
            told.append(one)
        empty = {"description": None, "parameters": None}
        tools = [{**t, "function": {**empty, **t["function"]}} for t in tools or ()]
        tools = [
            {"type": "function", "function": {
                k: t["function"][k] for k in ("name", "description", "parameters")}}
            for t in tools
        ]  # fmt: skip
        text = tokenizer.apply_chat_template(
            told, tools=tools or None, tokenize=False, add_generation_prompt=True, **template
        )
        return list(tokenizer.encode(text, add_special_tokens=False))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    made = {"say": say, **more}
    return FakeEngine(str(folder), render, encode, encode("<|e|>")[0], **made)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts engine and gateway; what it gives has `engine`, `url`, `client` and `gateway`."""
    running: list[Any] = []

    def start(*, engine: FakeEngine | None = None, upstream: str | None = None,
              **settings: Any) -> Any:  # fmt: skip
        made = engine or engine_of(folder)
        if upstream is None:
            behind = Serving(made)
            running.append(behind.__enter__())
            upstream = behind.url
        gateway = Gateway(Settings(upstreams=(upstream,), **settings))
        front = Serving(gateway, lifespan="on")
        running.append(front.__enter__())

        class Started:
            engine = made
            url = front.url
            client = OpenAI(base_url=front.url + "/v1", api_key="a", max_retries=0)

        Started.gateway = gateway  # type: ignore[attr-defined]
        Started.stop = lambda: (running.remove(front), front.__exit__(None, None, None))  # type: ignore[attr-defined]
        return Started

    yield start
    for one in reversed(running):
        one.__exit__(None, None, None)


def ask(one: Any, messages: list[Any], **more: Any) -> Any:
    return one.client.chat.completions.create(model="fake", messages=messages, **more)


def streamed(one: Any, messages: list[Any], **more: Any) -> tuple[dict[str, Any], Any]:
    """The message and usage of a stream, put together as clients do."""
    text, calls, usage = "", [], None
    with one.client.chat.completions.create(
        model="fake", messages=messages, stream=True, stream_options={"include_usage": True}, **more
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                calls += [c.model_dump(exclude={"index"}) for c in choice.delta.tool_calls or ()]
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    return ({**message, "tool_calls": calls} if calls else message), usage


def whole(one: Any, messages: list[Any], **more: Any) -> tuple[dict[str, Any], Any]:
    told = ask(one, messages, **more)
    return told.choices[0].message.model_dump(exclude_none=True), told.usage


@pytest.mark.parametrize("how", [whole, streamed])
@pytest.mark.parametrize("named", [{}, {"session_id": "s"}, {"prompt_cache_key": "k"}])
def test_every_turn_of_a_tool_loop_extends_the_last_by_ids(
    start: Start, how: Any, named: dict[str, str]
) -> None:
    one = start()
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "What is there?"}]
    before: list[int] = []
    for turn in range(6):
        message, usage = how(one, messages, tools=TOOLS, extra_body=named)
        prompt = one.engine.prompts[-1]
        told = usage.kvmem
        if turn:
            assert prompt[: len(before)] == before
            assert told["miss"] == "none"
            assert told["committed_tokens"] == len(before)
            assert usage.prompt_tokens_details.cached_tokens == told["ideal_tokens"] > 0
            assert told["found_by"] == (next(iter(named)) if named else "prefix")
        else:
            assert told["miss"] == "new_session"
        said = one.engine.say(turn, {"tools": TOOLS}).text
        before = [*prompt, *one.engine.encode(said), one.engine.end]
        messages.append(message)
        for call in message.get("tool_calls") or ():
            arguments = json.loads(call["function"]["arguments"])
            # As many frameworks do: other blanks, an id of their own.
            call["function"]["arguments"] = json.dumps(arguments, separators=(",", ":"))
            call["id"] = f"mine-{turn}"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "a chair"})
        if not message.get("tool_calls"):
            message["content"] = message["content"].strip()
            messages.append({"role": "user", "content": [{"type": "text", "text": "Go on."}]})
    assert len(one.gateway.sessions) == 1


def test_the_first_prompt_is_the_servers_own_rendering(start: Start) -> None:
    one = start()
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}
    messages: list[Any] = [
        SYSTEM,
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "größe"},
    ]
    ask(one, messages, tools=TOOLS)
    assert one.engine.prompts[0] == one.engine.render(json.loads(json.dumps(messages)), TOOLS)
