"""The gateway before the real vLLM: unmodified clients, and every turn finds all of the last."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from benchmarks.bench_gateway import tool_loop
from kvmem.demo.server import Server
from tests.e2e.host import BLOCK

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SYSTEM = "You are a vivid agent who looks around in old houses and tells of it. " * 8


@pytest.fixture
def engine(served: Server) -> Server:
    return served


class Process:
    """`kvmem gateway` as a user starts it."""

    def __init__(self, upstream: str, sessions: Path) -> None:
        command = [sys.executable, "-m", "kvmem.cli", "gateway", "--upstream", upstream]
        self._process = subprocess.Popen(
            [*command, "--port", "0", "--sessions", str(sessions)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[-1]

    def end(self, number: int = signal.SIGTERM) -> None:
        """Ends it; once more does nothing."""
        if self._process.poll() is None:
            self._process.send_signal(number)
            self._process.communicate()


@pytest.fixture
def gateway(engine: Server, tmp_path: Path) -> Iterator[Process]:
    started = Process(engine.url, tmp_path)
    yield started
    started.end()


def test_a_tool_loop_at_temperature_1_reaches_the_ideal(gateway: Process) -> None:
    cached, ideal, misses = tool_loop(gateway.url, "e2e", turns=8)
    assert cached == ideal > 0
    assert set(misses) == {"none"}


def ideal_of(had: int, prompt: int) -> int:
    return min(had, prompt - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_sessions_reach_the_ideal(gateway: Process, stream: bool) -> None:
    mark = {"type": "ephemeral"}
    system: Any = [{"type": "text", "text": f"{stream} {SYSTEM}", "cache_control": mark}]
    tools: Any = [{"name": "look", "input_schema": {
        "type": "object", "properties": {"q": {"type": "string", "maxLength": 12}},
        "required": ["q"], "additionalProperties": False}}]  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": "What is there?"}]
    had = called = 0  # some calls are cut off by max_tokens, not all
    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0) as client:
        for turn in range(4):
            asked: dict[str, Any] = {
                "model": "smol", "max_tokens": 200,
                "extra_body": {"temperature": 1.0, "seed": turn},
                "system": system, "messages": messages, "tools": tools,
                "tool_choice": {"type": "auto" if turn % 2 else "any"},
            }  # fmt: skip
            if stream:
                with client.messages.stream(**asked) as events:
                    told: Any = events.get_final_message()
            else:
                told = client.messages.create(**asked)
            usage = told.usage
            read = usage.cache_read_input_tokens
            prompt = usage.input_tokens + read + usage.cache_creation_input_tokens
            if turn:
                assert read == ideal_of(had, prompt) > 0
                assert usage.cache_creation_input_tokens == 0
            had = prompt + usage.output_tokens - 1
            messages.append({"role": "assistant", "content": [b.to_dict() for b in told.content]})
            uses = [block for block in told.content if block.type == "tool_use"]
            called += len(uses)
            results = [
                {"type": "tool_result", "tool_use_id": use.id, "content": f"{use.input}"}
                for use in uses
            ]
            messages.append({"role": "user", "content": results or "Go on."})
    assert called


def test_responses_chained_by_id_reach_the_ideal(gateway: Process) -> None:
    had = 0
    previous: dict[str, Any] = {}
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:
        for turn in range(4):
            told: Any = client.responses.create(
                model="smol", instructions="Responses. " + SYSTEM, input=f"Question {turn}?",
                max_output_tokens=40, temperature=1.0, **previous,
            )  # fmt: skip
            usage = told.usage
            if turn:
                cached = usage.input_tokens_details.cached_tokens
                assert cached == ideal_of(had, usage.input_tokens) > 0
            had = usage.input_tokens + usage.output_tokens - 1
            previous = {"previous_response_id": told.id}


def test_a_gateway_killed_in_mid_stream_goes_on_at_the_ideal(
    engine: Server, tmp_path: Path
) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Killed. " + SYSTEM},
        {"role": "user", "content": "What is there?"},
    ]
    first = Process(engine.url, tmp_path)
    had = 0
    try:
        with openai.OpenAI(base_url=first.url + "/v1", api_key="none", max_retries=0) as client:
            for _ in range(2):
                told = client.chat.completions.create(
                    model="smol", messages=messages, temperature=1.0, max_tokens=40
                )
                assert told.usage is not None
                had = told.usage.prompt_tokens + told.usage.completion_tokens - 1
                messages.append(told.choices[0].message.model_dump(exclude_none=True))
                messages.append({"role": "user", "content": "Go on."})
            stream = client.chat.completions.create(
                model="smol", messages=messages, stream=True, max_tokens=400,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            for _, _ in zip(range(3), stream, strict=False):
                continue
            first.end(signal.SIGKILL)
            with pytest.raises(openai.APIConnectionError):
                list(stream)
    finally:
        first.end(signal.SIGKILL)
    second = Process(engine.url, tmp_path)
    try:
        with openai.OpenAI(base_url=second.url + "/v1", api_key="none", max_retries=0) as client:
            again: Any = client.chat.completions.create(
                model="smol", messages=messages, temperature=1.0, max_tokens=8
            )
    finally:
        second.end()
    usage = again.usage
    assert usage.kvmem["miss"] == "none"
    # The killed turn computed the rest of the prompt, too.
    assert usage.prompt_tokens_details.cached_tokens >= ideal_of(had, usage.prompt_tokens) > 0
