"""What the tests of the gateway share: an engine that computes nothing, and ways to ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anthropic import Anthropic
from openai import OpenAI

from benchmarks._fake_engine import FakeEngine, Reply, Serving
from kvmem.agents.gateway.app import Gateway

TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "open", "description": "Opens."}},
]
SYSTEM = {"role": "system", "content": "You look around in the house and tell what there is."}


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


class Started:
    """An engine and the gateway before it."""

    def __init__(self, engine: FakeEngine, gateway: Gateway, front: Serving) -> None:
        self.engine, self.gateway, self.front, self.url = engine, gateway, front, front.url
        self.client = OpenAI(base_url=front.url + "/v1", api_key="a", max_retries=0)
        self.anthropic = Anthropic(base_url=front.url, api_key="a", max_retries=0)

    def close(self) -> None:
        """Its clients' connections."""
        self.client.close()
        self.anthropic.close()


Start = Callable[..., Started]


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
