"""What does the gateway keep of the prefix cache that text loses, and what does it cost?

On a live vLLM with SmolLM2-135M: a loop of 20 turns with tools at temperature 1 by the unmodified
`openai` client, once through the gateway, once straight to vLLM. Cached tokens, as vLLM counts
them, over the ideal: the whole blocks of the session's last prompt and reply (a reply's last token
has no KV).

What it costs is measured before a server of this benchmark's own that streams like vLLM and
computes nothing: an engine on a CPU is too noisy. Gateway, server and clients are processes that
share this machine's cores. Latency is that of a whole request whose answer is one token, the arms
in turn; the cost of a token is what longer answers add, in CPU time of the gateway's process.

    python -m benchmarks.bench_gateway [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._report import finish

_BLOCK_TOKENS = 32  # what vLLM's CPU build takes
_STREAMS = (1, 16, 64)
_TURNS = 20
_PACE_S = 0.002  # between tokens, so that each comes by itself
_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Lets you {name} something.",
            "parameters": {
                "type": "object",
                "properties": {"q": {"type": "string", "maxLength": 20}},
                "required": ["q"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("look", "open")
]


def tool_loop(url: str, name: str, turns: int = _TURNS) -> tuple[int, int, list[str]]:
    """Cached tokens, the ideal, and the reasons of misses; over all turns but the first.

    Every other turn must call a tool, so that there are results; the rest may.
    """
    from openai import OpenAI

    messages: list[Any] = [
        {"role": "system", "content": f"You are agent {name}, who looks around vividly. " * 20},
        {"role": "user", "content": "What is there?"},
    ]
    had = cached = ideal = 0
    misses = []
    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        for turn in range(turns):
            told = client.chat.completions.create(
                model="smol", messages=messages, tools=_TOOLS, temperature=1.0, seed=turn,
                max_tokens=60, tool_choice="auto" if turn % 2 else "required",
            )  # fmt: skip
            usage, said = told.usage, told.choices[0].message
            assert usage is not None
            details = usage.prompt_tokens_details
            if turn:
                cached += (details.cached_tokens if details else None) or 0
                ideal += min(had, usage.prompt_tokens - 1) // _BLOCK_TOKENS * _BLOCK_TOKENS
                misses.append(dict(usage.model_extra or {}).get("kvmem", {}).get("miss", ""))
            had = usage.prompt_tokens + usage.completion_tokens - 1
            messages.append(said.model_dump(exclude_none=True))
            for call in said.tool_calls or ():
                text = f"Result {turn} of {call.function.name}: {call.function.arguments}"  # type: ignore[union-attr]
                messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
            if not said.tool_calls:
                messages.append({"role": "user", "content": "Go on."})
    return cached, ideal, misses


@contextlib.contextmanager
def process(*command: str) -> Iterator[tuple[str, int]]:
    """A server of which the first line ends with its address: that, and its pid."""
    one = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    assert one.stdout is not None
    try:
        yield one.stdout.readline().split()[-1], one.pid
    finally:
        one.terminate()
        one.communicate()


def gateway(upstream: str, sessions: str) -> Any:
    """The gateway in a process."""
    return process(
        "kvmem.cli", "gateway", "--upstream", upstream, "--port", "0", "--sessions", sessions
    )


def live(folder: str) -> dict[str, float]:
    """The keys of the live part."""
    from kvmem.demo.server import Server

    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
        "--served-model-name", "smol", "--dtype", "float32", "--enforce-eager",
        "--block-size", str(_BLOCK_TOKENS), "--max-model-len", "8192",
        "--enable-prompt-tokens-details", "--enable-auto-tool-choice",
        "--tool-call-parser", "hermes",
    ]  # fmt: skip
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    found = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        Server(command, log=Path(scratch) / "log", environ=environ) as behind,
        gateway(behind.url, scratch + "/sessions") as (front, _),
    ):
        for name, url in (("gateway", front), ("direct", behind.url)):
            cached, ideal, misses = tool_loop(url, name)
            print(f"  {name:8} {cached:,} of {ideal:,} ({cached / ideal:.2%}) {set(misses)}")
            found[f"{name}_cached_of_ideal"] = round(cached / ideal, 4)
    return found


# -- what it costs -------------------------------------------------------------------------------


def engine(folder: str) -> None:
    """The server that streams and computes nothing; `max_tokens` tokens each time."""
    import socket

    import uvicorn

    from benchmarks._fake_engine import FakeEngine, Reply
    from kvmem.agents.gateway.tokenizer import FolderTokenizer

    tokenizer = FolderTokenizer(Path(folder))

    def render(messages: Any, tools: Any = None) -> list[int]:
        if messages[0]["content"].startswith("You are agent"):
            return [1]  # the straight arm: what rendering costs the engine is left out
        for message in messages:
            message["content"] = message.get("content") or ""
            if isinstance(message["content"], list):
                message["content"] = "\n".join(p["text"] for p in message["content"])
        text = tokenizer.apply_chat_template(messages, tools, add_generation_prompt=True)
        return tokenizer.encode(text)

    word = tokenizer.encode(" word")
    app = FakeEngine(
        folder, render, lambda text: word * (len(text) // 5), word[0],
        lambda n, body: Reply(" word" * body.get("max_tokens", 1)), models=("smol",),
        counts_cache=False, pace_s=_PACE_S,
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="critical",
                            access_log=False, lifespan="off", ws="none")  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


def _conversation(n: int) -> list[dict[str, Any]]:
    """About 1,000 tokens."""
    return [
        {"role": "system", "content": f"You are agent {n}. " + "Be exact and brief. " * 120},
        {"role": "user", "content": "Where to, and why? " * 40},
    ]


def _body(messages: list[dict[str, Any]], max_tokens: int) -> bytes:
    body = {"model": "smol", "messages": messages, "stream": True, "max_tokens": max_tokens}
    return json.dumps(body).encode()


async def _request(upstream: Any, body: bytes) -> tuple[float, float]:
    """Seconds to the first byte of the body, and to its end."""
    began = time.perf_counter()
    answer = await upstream.ask(
        "POST", "/v1/chat/completions", body, {"content-type": "application/json"}
    )
    if answer.status != 200:
        raise RuntimeError((await answer.read()).decode())
    first = None
    while await answer.piece():
        first = first or time.perf_counter()
    answer.close()
    return (first or began) - began, time.perf_counter() - began


async def _rounds(url: str, streams: int, rounds: int, max_tokens: int) -> list[float]:
    """Seconds of every request: `streams` sessions at a time, each a turn longer every round."""
    from kvmem.agents.gateway.wire import Upstream

    upstream = Upstream(url, timeout_s=60.0)
    sessions = [_conversation(n) for n in range(streams)]
    found = []
    for number in range(rounds):
        bodies = [_body(messages, max_tokens) for messages in sessions]
        told = await asyncio.gather(*(_request(upstream, body) for body in bodies))
        found += [end for _, end in told]
        for messages in sessions:
            messages.append({"role": "assistant", "content": " word" * max_tokens})
            messages.append({"role": "user", "content": f"And then, after {number}? " * 10})
    upstream.close()
    return found


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def _quantile(samples: list[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def latency(front: str, behind: str, requests: int) -> dict[str, float]:
    """What a request takes longer through the gateway, by streams at once."""
    found = {}
    for streams in _STREAMS:
        rounds = max(4, requests // streams)
        arms: dict[str, list[float]] = {front: [], behind: []}
        for url in (front, behind):
            asyncio.run(_rounds(url, streams, 2, 1))
        for _ in range(4):
            for url, samples in arms.items():
                samples.extend(asyncio.run(_rounds(url, streams, rounds // 4, 1)))
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            ours, theirs = (_quantile(samples, share) * 1e3 for samples in arms.values())
            print(f"  {streams:3} streams {name}: {ours:.2f} ms, straight {theirs:.2f} ms")
            found[f"overhead_{name}_ms_{streams}"] = round(ours - theirs, 3)
    found["overhead_p50_ms"] = found["overhead_p50_ms_1"]
    found["overhead_p99_ms"] = found["overhead_p99_ms_1"]
    return found


def per_token(front: str, pid: int, repetitions: int) -> float:
    """CPU microseconds of the gateway's process for each token that a longer answer has."""
    streams, rounds, short, long = 16, 2, 1, 401
    costs = []
    for _ in range(repetitions):
        spent = {}
        for tokens in (short, long):
            before = _cpu_s(pid)
            asyncio.run(_rounds(front, streams, rounds, tokens))
            spent[tokens] = _cpu_s(pid) - before
        costs.append((spent[long] - spent[short]) / (streams * rounds * (long - short)) * 1e6)
    return round(statistics.median(costs), 2)


async def _fill(url: str, sessions: int) -> None:
    from kvmem.agents.gateway.wire import Upstream

    upstream = Upstream(url, timeout_s=60.0)
    for n in range(sessions):
        await _request(upstream, _body(_conversation(1000 + n), 1))
    upstream.close()


def costs(folder: str, *, short: bool) -> dict[str, float]:
    """The keys of the part without vLLM."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        process("benchmarks.bench_gateway", "--engine", folder) as (behind, _),
    ):
        with gateway(behind, scratch + "/a") as (front, pid):
            found = latency(front, behind, 128 if short else 512)
            found["us_per_token"] = per_token(front, pid, 3 if short else 7)
        with gateway(behind, scratch + "/b") as (front, pid):
            asyncio.run(_fill(front, 1_000))
            found["idle_sessions_mb"] = round(_mb(pid), 1)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer requests")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine(arguments.engine)
        return
    from kvmem.demo.model import ensure

    folder = str(ensure())
    found = costs(folder, short=arguments.short)
    finish({**live(folder), **found})


if __name__ == "__main__":
    main()
