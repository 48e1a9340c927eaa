"""Does a fan-out compute what its workers share once, and what do a team's layouts save?

On a live `kvmem serve` with SmolLM2-135M in float32, blocks of 32 tokens: a session of 4,000 tokens
that the engine has never seen gets 8 tasks. Ideal: the prefix once and each worker's own tail.
Three arms, each with another prefix, their order rotated: `map`; forks that ask all at once,
without the first one going ahead; and, as most frameworks do it, 8 sessions with a system prompt of
their own before the same text. What was computed the engine itself counts
(vllm:prompt_tokens_by_source).

Then recorded group chats, where the folder of traces is, through teams of each layout: prompt
tokens computed, on a stand-in for an engine that keeps every whole block of 16 tokens.

    python -m benchmarks.bench_fanout [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import transformers

from benchmarks._corpus import real_text, trace_folder
from benchmarks._layouts import SET, chats, computed_tokens
from benchmarks._report import finish
from kvmem.agents import Runtime, Session
from kvmem.context import ChatRenderer
from kvmem.demo.model import ensure
from kvmem.demo.server import Server, counters

_WORKERS, _PREFIX_TOKENS, _BLOCK_TOKENS = 8, 4_000, 32
_TASKS = [f"Say in one sentence what part {n} of this text is about." for n in range(_WORKERS)]
_SYSTEM = "You are one of a team of agents who read a text together. Answer in one sentence."
_CHARS = 24_000  # more than 4,000 tokens of the text


def _serve(folder: str, log: Path) -> Server:
    command = [
        sys.executable, "-m", "kvmem.cli", "serve", folder,
        "--kvmem-host-gb", "1", "--kvmem-arena", f"fanout-{os.getpid()}",
        "--dtype", "float32", "--block-size", str(_BLOCK_TOKENS), "--max-model-len", "8192",
        "--num-gpu-blocks-override", "1400", "--enforce-eager", "--served-model-name", "smol",
        "--enable-prompt-tokens-details",
    ]  # fmt: skip
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "HF_HUB_OFFLINE": "1",
    }
    return Server(command, log=log, environ=environ)


def _text(renderer: ChatRenderer, number: int) -> str:
    """Text of 4,000 tokens and somewhat more that no other number begins like."""
    whole = real_text(_CHARS * (number + 1))[-_CHARS:]
    return f"Text number {number}.\n{whole}"


def _prefix(runtime: Runtime, renderer: ChatRenderer, number: int) -> Session:
    """A session of exactly 4,000 tokens."""
    words = _text(renderer, number).split(" ")

    def session(n_words: int, filled: int = 0) -> Session:
        one = runtime.session(f"lead-{number}", system=_SYSTEM, seal=False)
        one.append(" ".join(words[:n_words]) + " sea" * filled)
        return one

    low, high = 1, len(words)
    while low < high:  # the most words that fit
        middle = (low + high + 1) // 2
        fits = session(middle).ledger.n_tokens <= _PREFIX_TOKENS - 8
        low, high = (middle, high) if fits else (low, middle - 1)
    one = session(low, _PREFIX_TOKENS - session(low).ledger.n_tokens)
    if one.ledger.n_tokens != _PREFIX_TOKENS:
        raise RuntimeError(f"the prefix has {one.ledger.n_tokens} tokens")
    return one


def _computed(server: Server) -> int:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return counters(text, "vllm:prompt_tokens_by_source_total", "source")["local_compute"]


Arm = Callable[[Runtime, ChatRenderer, int], Awaitable[int]]


async def _map(runtime: Runtime, renderer: ChatRenderer, number: int) -> int:
    lead = _prefix(runtime, renderer, number)
    found = await lead.map(_TASKS)
    told = sum(r.reply.usage.prompt_tokens - _PREFIX_TOKENS for r in found if r.reply is not None)
    return _PREFIX_TOKENS + told


async def _at_once(runtime: Runtime, renderer: ChatRenderer, number: int) -> int:
    lead = _prefix(runtime, renderer, number)
    forks = [lead.fork(f"at-once-{number}-{i}") for i in range(_WORKERS)]
    replies = await asyncio.gather(
        *(fork.step(task) for fork, task in zip(forks, _TASKS, strict=True))
    )
    return _PREFIX_TOKENS + sum(r.usage.prompt_tokens - _PREFIX_TOKENS for r in replies)


async def _role_first(runtime: Runtime, renderer: ChatRenderer, number: int) -> int:
    lead = _prefix(runtime, renderer, number)
    text = lead.ledger.messages()[1]
    workers = [
        runtime.session(f"worker-{i}", system=f"You are worker {i}. {_SYSTEM}", seal=False)
        for i in range(_WORKERS)
    ]
    for worker in workers:
        worker.append(text)
    replies = await asyncio.gather(
        *(worker.step(task) for worker, task in zip(workers, _TASKS, strict=True))
    )
    # Against the ideal of the same tasks on one prefix.
    tails = [
        r.usage.prompt_tokens - w.ledger.spans[1].stop
        for r, w in zip(replies, workers, strict=True)
    ]
    return _PREFIX_TOKENS + sum(tails)


_ARMS: dict[str, Arm] = {"map": _map, "at_once": _at_once, "role_first": _role_first}


def live(folder: str, renderer: ChatRenderer, rounds: int) -> dict[str, Any]:
    """The keys of the live part; prints a line for each arm and round."""
    shares: dict[str, list[float]] = {name: [] for name in _ARMS}
    seconds: dict[str, list[float]] = {name: [] for name in _ARMS}

    async def play(server: Server) -> None:
        fields = {"temperature": 0, "ignore_eos": True}
        async with Runtime(
            server.url, renderer=renderer, max_tokens=8, fields=fields, tell=lambda line: None
        ) as runtime:
            await runtime.session("warm-up").step("Good day.")
            names = list(_ARMS)
            for number in range(rounds):
                turn = number % len(names)
                for place, name in enumerate(names[turn:] + names[:turn]):
                    before, began = _computed(server), time.monotonic()
                    ideal = await _ARMS[name](runtime, renderer, number * len(names) + place)
                    seconds[name].append(time.monotonic() - began)
                    computed = _computed(server) - before
                    shares[name].append(computed / ideal)
                    print(
                        f"  {name:10} computed {computed:6,} of ideally {ideal:,} in "
                        f"{seconds[name][-1]:.1f} s",
                        flush=True,
                    )

    with (
        tempfile.TemporaryDirectory() as temporary,
        _serve(folder, Path(temporary) / "server.log") as server,
    ):
        asyncio.run(play(server))
    ratios = [a / b for a, b in zip(seconds["role_first"], seconds["map"], strict=True)]
    return {
        "computed_vs_ideal": max(shares["map"]),
        "at_once_vs_ideal": max(shares["at_once"]),
        "role_first_vs_ideal": max(shares["role_first"]),
        "role_first_s_vs_map": statistics.median(ratios),
    }


def layouts(renderer: ChatRenderer, most: int) -> dict[str, Any]:
    """The keys of the recorded chats."""
    folder = trace_folder(None)
    keys = {"shared_first_saved": None, "one_ledger_saved": None, "chat_calls": 0}
    if folder is None or not (folder / f"{SET}.jsonl.gz").exists():
        print("  no recorded group chats here: layouts left out")
        return keys
    played = list(chats(folder, most))
    told = computed_tokens(renderer, played)
    for layout, (computed, prompt) in told.items():
        print(f"  {layout:12} computed {computed:9,} of {prompt:,} prompt tokens")
    base = told["role-first"][0]
    return {
        "shared_first_saved": 1 - told["shared-first"][0] / base,
        "one_ledger_saved": 1 - told["one-ledger"][0] / base,
        "chat_calls": sum(map(len, played)),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one round, 16 chats")
    short: bool = parser.parse_args().short
    folder = str(ensure())
    renderer = ChatRenderer.of(transformers.AutoTokenizer.from_pretrained(folder))
    told = layouts(renderer, 16 if short else 1_000)
    fanned = live(folder, renderer, 1 if short else 3)
    finish({**fanned, **told, "workers": _WORKERS, "prefix_tokens": _PREFIX_TOKENS})


if __name__ == "__main__":
    main()
