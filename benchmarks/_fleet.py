"""A fleet of agents on a stock vLLM server, and what their answers say.

The client is the `openai` package as it is. Replies are the recorded ones (an agent's next prompt
does not depend on what the engine answered), so every arm is sent the same prompts; gaps are drawn
once and are the same too. Without streaming, since vLLM puts `kv_transfer_params` into whole
responses only: the time to the first token is the client's own time for the request less the
server's `generation_time_ms`, which is first token to last.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from benchmarks import _arms
from benchmarks._corpus import Agent, Message
from benchmarks._math import SeenPrefixes, gap_s, ideal_cached_tokens, percentile
from benchmarks._process import Child, free_port
from kvmem.engines.vllm.launch import allowed_plugins

__all__ = [
    "MODEL",
    "Call",
    "Load",
    "Score",
    "Server",
    "Template",
    "as_openai",
    "call_of",
    "ideals_of",
    "play",
    "score",
    "wait_ready",
]

MODEL = "smollm2"
_START_S = 300.0
# What kvmem's receipt may give as the reason for a block that it did not have.
_REASONS = frozenset(
    ("evicted", "pending", "abandoned", "quarantined", "cleared", "load_off", "load_failed")
)


class Load(msgspec.Struct, frozen=True):
    """What the fleet does: gaps are real agents' times `gap_scale`, at most `gap_cap_s`."""

    agents: list[Agent]
    max_tokens: int
    gap_scale: float
    gap_cap_s: float
    seed: int

    def gap(self, agent: int, turn: int) -> float:
        """Seconds that an agent waits before this turn; before its first, its place in a queue."""
        draw = random.Random(f"{self.seed}/{agent}/{turn}").random()
        if turn == 0:
            return draw * self.gap_scale * len(self.agents)
        return min(self.gap_cap_s, self.gap_scale * gap_s(draw))


class Call(msgspec.Struct, frozen=True):
    """One request and its answer; times are seconds since the fleet's start."""

    agent: int
    turn: int
    sent_s: float
    done_s: float
    ttft_s: float
    prompt: list[int]
    output: list[int]
    cached: int
    receipt: dict[str, Any] | None


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """What one arm did.

    `computed` is the engine's own count of prompt tokens it ran through the model, `ideal` what a
    cache that forgets nothing would have left to compute, given the order of this very run.
    `misses_unexplained` are calls that computed what was there when they were sent, without a
    reason in kvmem's receipt.
    """

    calls: int
    prompt_tokens: int
    computed: int
    ideal: int
    computed_over_ideal: float
    by_source: dict[str, int]
    ttft_p50: float
    ttft_p95: float
    total_s: float
    wrong: int
    misses_unexplained: int
    preemptions: int


class Template:
    """The model's chat template and tokenizer, for budgets in bytes before any server runs."""

    def __init__(self, model: Path) -> None:
        source = (model / "chat_template.jinja").read_text(encoding="utf-8")
        # The settings of the transformers library, whose templates these are.
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(source)
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that the server makes of `messages`."""
        text = self._template.render(messages=messages, add_generation_prompt=True)
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text` alone."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


class Server(Child):
    """vLLM's own OpenAI server in a child process; a context manager."""

    def __init__(
        self,
        model: Path,
        *,
        dtype: str,
        device_bytes: int,
        max_model_len: int,
        transfer: Mapping[str, Any] | None,
        log: Path,
        python: Path | None = None,
        hints: bool = False,
    ) -> None:
        """Starts it; `hints`: with kvmem's own routes, which vLLM adds only if they are named."""
        self.port = free_port()
        command = [
            *(str(python or sys.executable), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", MODEL, "--dtype", dtype),
            *("--block-size", str(_arms.BLOCK_TOKENS), "--max-model-len", str(max_model_len)),
            *("--kv-cache-memory-bytes", str(device_bytes), "--enforce-eager"),
            *("--enable-prompt-tokens-details", "--enable-per-request-metrics"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        env = _arms.environment_of()
        plugins = allowed_plugins(os.environ) if hints else None
        if hints and plugins is None:
            raise SystemExit(
                "kvmem's routes can't be added to vLLM's server here: set VLLM_PLUGINS"
            )
        if plugins is not None:
            env["VLLM_PLUGINS"] = plugins
        super().__init__(command, log=log, env=env)

    def is_ready(self) -> bool:
        """Whether the server takes requests.

        Raises:
            ChildError: it ended.
        """
        self.check()
        return _ok(f"http://127.0.0.1:{self.port}/health")

    def client(self) -> AsyncOpenAI:
        """An OpenAI client of this server, that never asks twice."""
        return AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="none",
            max_retries=0,
            timeout=1_200,
        )

    def counters(self) -> dict[str, float]:
        """The server's Prometheus counters, by name and labels but for the engine's and model's."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode()
        totals: dict[str, float] = {}
        for name, labels, value in re.findall(r"^(vllm:\w+_total)(?:{(.*)})? (\S+)$", text, re.M):
            source = re.search(r'source="(\w+)"', labels)
            key = f"{name}/{source[1]}" if source else name
            totals[key] = totals.get(key, 0.0) + float(value)
        return totals

    def prefill_tokens_s(self, prompts: Sequence[list[int]]) -> float:
        """Tokens a second of cold prompts, the best of them; every arm's store keeps them."""
        return asyncio.run(self._prefill(prompts))

    async def _prefill(self, prompts: Sequence[list[int]]) -> float:
        best = 0.0
        async with self.client() as client:
            for prompt in prompts:
                start = time.perf_counter()
                await client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
                seconds = time.perf_counter() - start
                best = max(best, len(prompt) / seconds)
        return best


def wait_ready(servers: Sequence[Server]) -> None:
    """Returns when all of them take requests.

    Raises:
        ChildError: one of them ended, or was not ready in time.
    """

    def ready() -> bool:
        answers = [server.is_ready() for server in servers]  # every one is looked at
        return all(answers)

    servers[0].until(ready, seconds=_START_S, what="a vLLM server")


def play(server: Server, load: Load) -> list[Call]:
    """All agents' calls, in the order they were sent."""
    return asyncio.run(_play(server, load))


async def _play(server: Server, load: Load) -> list[Call]:
    start = time.perf_counter()
    async with server.client() as client, asyncio.TaskGroup() as tasks:
        agents = [
            tasks.create_task(_agent(client, load, i, start)) for i in range(len(load.agents))
        ]
    return sorted((call for task in agents for call in task.result()), key=lambda call: call.sent_s)


async def _agent(client: AsyncOpenAI, load: Load, index: int, start: float) -> list[Call]:
    calls = []
    for turn, messages in enumerate(load.agents[index].turns):
        await asyncio.sleep(load.gap(index, turn))  # the tool runs
        sent = time.perf_counter() - start
        response = await client.chat.completions.create(
            model=MODEL,
            messages=as_openai(messages),
            temperature=0.0,
            max_completion_tokens=load.max_tokens,
            extra_body={"return_token_ids": True},
        )
        done = time.perf_counter() - start
        calls.append(call_of(index, turn, sent, done, response.model_dump()))
    return calls


def as_openai(messages: Sequence[Message]) -> list[Any]:
    """The messages as the API wants them: a tool's answer names the call it answers."""
    return [{**m, "tool_call_id": "0"} if m["role"] == "tool" else m for m in messages]


def call_of(agent: int, turn: int, sent: float, done: float, response: dict[str, Any]) -> Call:
    details = response["usage"].get("prompt_tokens_details") or {}
    return Call(
        agent=agent,
        turn=turn,
        sent_s=sent,
        done_s=done,
        ttft_s=done - sent - response["metrics"]["generation_time_ms"] / 1e3,
        prompt=response["prompt_token_ids"],
        output=response["choices"][0]["token_ids"],
        cached=details.get("cached_tokens") or 0,
        receipt=(response.get("kv_transfer_params") or {}).get("kvmem"),
    )


def score(
    calls: Sequence[Call],
    oracle: Sequence[Call],
    counters: Mapping[str, float],
    *,
    block_tokens: int,
) -> Score:
    """What an arm's calls amount to.

    Args:
        calls: of the arm, in the order they were sent.
        oracle: the same prompts' calls of the arm whose outputs are right.
        counters: what the server's counters rose by.
        block_tokens: of the cache.

    Raises:
        ValueError: the arms were not sent the same prompts.
    """
    ideals, owed = ideals_of(calls, block_tokens)
    computed = round(counters.get("vllm:prompt_tokens_by_source_total/local_compute", 0))
    prompt_tokens = sum(len(call.prompt) for call in calls)
    ideal = prompt_tokens - sum(ideals)
    return Score(
        calls=len(calls),
        prompt_tokens=prompt_tokens,
        computed=computed,
        ideal=ideal,
        computed_over_ideal=computed / ideal,
        by_source={
            name.partition("/")[2]: round(value)
            for name, value in counters.items()
            if name.startswith("vllm:prompt_tokens_by_source_total/")
        },
        ttft_p50=percentile([call.ttft_s for call in calls], 0.5),
        ttft_p95=percentile([call.ttft_s for call in calls], 0.95),
        total_s=max(call.done_s for call in calls),
        wrong=_wrong(calls, oracle),
        misses_unexplained=sum(
            _unexplained(call, tokens) for call, tokens in zip(calls, owed, strict=True)
        ),
        preemptions=round(counters.get("vllm:num_preemptions_total", 0)),
    )


def ideals_of(calls: Sequence[Call], block_tokens: int) -> tuple[list[int], list[int]]:
    """Of each call's prompt, the tokens that nobody need compute again, and those that were
    there for sure when it was sent.

    The first counts a prompt as seen from the moment it was sent, even while it waits or is being
    computed; the second only once its answer came. Replies count from then on, and a reply's last
    token has no KV.
    """
    sent, there = SeenPrefixes(block_tokens), SeenPrefixes(block_tokens)
    answered = sorted(calls, key=lambda call: call.done_s)
    ideals, owed, done = [], [], 0
    for call in calls:
        while answered[done].done_s < call.sent_s:
            tokens = answered[done].prompt + answered[done].output[:-1]
            sent.add(tokens)
            there.add(tokens)
            done += 1
        ideals.append(ideal_cached_tokens(sent, call.prompt))
        owed.append(ideal_cached_tokens(there, call.prompt))
        sent.add(call.prompt)
    return ideals, owed


def _unexplained(call: Call, owed: int) -> bool:
    """Whether what was there was computed again and kvmem gives no reason for it."""
    return call.cached < owed and (call.receipt or {}).get("miss") not in _REASONS


def _wrong(calls: Sequence[Call], oracle: Sequence[Call]) -> int:
    right = {(call.agent, call.turn): call for call in oracle}
    wrong = 0
    for call in calls:
        other = right[call.agent, call.turn]
        if call.prompt != other.prompt:
            raise ValueError(f"agent {call.agent}, turn {call.turn}: the arms' prompts differ")
        wrong += call.output != other.output
    return wrong


def _ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
