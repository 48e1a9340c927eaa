"""What does a token ledger keep of the prefix cache that text loses, and what does it cost?

On a live vLLM with SmolLM2-135M, 24 sessions of five turns, at temperature 0 and 1: once as a
`Ledger` sends them, by ids; once as most clients do, the messages through the chat template and the
tokenizer again every turn. Cached tokens, as vLLM counts them, over the ideal: the whole blocks of
the session's last prompt and reply (a reply's last token has no KV).

Recorded conversations, where the folder of traces is, are played call by call through ledgers: a
break is a call that is not the last one and new messages.

Then without an engine: 600 encoded tokens appended to a history of 143,000, against encoding that
history again.

    python -m benchmarks.bench_ledger [--short]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

from benchmarks._corpus import generated, real_text, recorded, trace_folder
from benchmarks._report import Row, finish, paired, table
from kvmem.context import ChatRenderer, Ledger
from kvmem.context.probe import RULES

_BLOCK_TOKENS = 32  # what vLLM's CPU build takes
_HISTORY, _ADDED = 143_000, 600
_SETS = ("tau_airline", "bfcl_multi_turn", "lmc_miniswe")
_QUESTIONS = (
    "Describe the sea near your home, in plain words.",
    "List three tools that you would take there, and why.",
    "Write a short JSON object with their names and weights.",
    "Now say the same as a poem of four lines.",
    "What did I ask first? Answer in one sentence.",
)


def _tokenizer() -> tuple[str, Any]:
    import transformers

    from kvmem.demo.model import ensure

    folder = str(ensure())
    return folder, transformers.AutoTokenizer.from_pretrained(folder)


class TextClient:
    """Sends messages; their text goes through template and tokenizer every turn."""

    def __init__(self, renderer: ChatRenderer, system: str) -> None:
        self._renderer = renderer
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}]

    def ask(self, question: str) -> list[int]:
        """The prompt's ids."""
        self._messages.append({"role": "user", "content": question})
        return self._renderer.encode(self._renderer.text(self._messages, generation=True))

    def take(self, prompt: list[int], sampled: list[int]) -> None:
        """The reply comes as text."""
        text = self._renderer.decode(sampled)
        self._messages.append({"role": "assistant", "content": text})


class LedgerClient:
    """Sends ids, and keeps those that were sampled."""

    def __init__(self, renderer: ChatRenderer, system: str) -> None:
        self._ledger = Ledger.open(renderer, system=system)

    def ask(self, question: str) -> list[int]:
        """The prompt's ids."""
        self._ledger.append({"role": "user", "content": question})
        return list(self._ledger.request()["prompt"])

    def take(self, prompt: list[int], sampled: list[int]) -> None:
        """The reply comes as ids."""
        self._ledger.commit({"prompt_token_ids": prompt, "choices": [{"token_ids": sampled}]})


def cached_of_ideal(
    llm: Any, renderer: ChatRenderer, kind: type[Any], temperature: float, sessions: int, seed: int
) -> tuple[int, int]:
    """Cached tokens and the ideal, over all turns but the first."""
    from vllm import SamplingParams

    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM's prefix cache could not be emptied")
    # Each begins otherwise: what they share is not asked here.
    clients = [kind(renderer, f"You are agent {chr(65 + i)}. Be vivid.") for i in range(sessions)]
    had = [0] * sessions
    cached = ideal = 0
    for turn, question in enumerate(_QUESTIONS):
        prompts = [client.ask(question) for client in clients]
        params = [
            SamplingParams(max_tokens=48, temperature=temperature, seed=seed + 100 * turn + i)
            for i in range(sessions)
        ]
        outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for i, (client, prompt, out) in enumerate(zip(clients, prompts, outs, strict=True)):
            sampled = list(out.outputs[0].token_ids)
            best = min(had[i], len(prompt) - 1) // _BLOCK_TOKENS * _BLOCK_TOKENS
            cached += out.num_cached_tokens
            ideal += best
            had[i] = len(prompt) + len(sampled) - 1
            client.take(prompt, sampled)
    return cached, ideal


def live(folder: str, renderer: ChatRenderer, sessions: int) -> dict[str, float]:
    """The keys of the live part; prints a line for each arm."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(folder, block_size=_BLOCK_TOKENS, max_model_len=2048, enforce_eager=True)
    worst: dict[str, float] = {}
    for temperature in (0.0, 1.0):
        for name, kind in (("ledger", LedgerClient), ("text", TextClient)):
            cached, ideal = cached_of_ideal(llm, renderer, kind, temperature, sessions, 7)
            share = cached / ideal
            print(f"  {name:6} temperature {temperature:.0f}: {cached:,} of {ideal:,}, {share:.1%}")
            key = f"{name}_cached_of_ideal"
            worst[key] = min(share, worst.get(key, 1.0))
    return worst


def replay(renderer: ChatRenderer, most: int) -> dict[str, int]:
    """Calls of recorded conversations, and those that are not the call before plus something."""
    folder = trace_folder(None)
    calls = breaks = tokens = agents = 0
    played = (
        generated(agents=16, turns=5, seed=3)
        if folder is None
        else (agent for name in _SETS for agent in recorded(folder, name, most=most))
    )
    for agent in played:
        agents += 1
        one = Ledger.open(renderer, seal=False, accept=RULES)
        begun = False
        text = ""
        for messages in agent.turns:
            calls += 1
            if agent.source == "lmc_miniswe":  # flattened: one text that grows
                whole = messages[0]["content"]
                breaks += not whole.startswith(text)
                one.append_ids(renderer.encode(whole[len(text) :]), role="user")
                text = whole
                continue
            if not begun:
                first = messages[0]["content"] if messages[0]["role"] == "system" else None
                one = Ledger.open(renderer, system=first, seal=False, accept=RULES)
                begun = True
            changes = one.check(messages)
            breaks += any(change.kind != "new" for change in changes)
            one.append(*(messages[change.index] for change in changes if change.kind == "new"))
        tokens += one.n_tokens
    where = "recorded ones" if folder is not None else "no traces here, so generated ones"
    print(f"replayed {calls:,} calls of {agents} conversations, {tokens:,} tokens; {where}")
    return {"replayed_calls": calls, "replay_breaks": breaks}


def append_cost(tokenizer: Any, renderer: ChatRenderer, repetitions: int) -> tuple[Row, float]:
    """Appending against encoding again, and the median append in milliseconds."""
    text = real_text(6 * _HISTORY)
    ids = tokenizer.encode(text, add_special_tokens=False)[:_HISTORY]
    history = tokenizer.decode(ids)
    base = Ledger.open(renderer, system="You are exact.")
    for first in range(0, _HISTORY, _ADDED):
        base.append_ids(ids[first : first + _ADDED], role="user")
    added = ids[:_ADDED]
    message = {"role": "user", "content": tokenizer.decode(added)}
    calls = 200

    def append() -> None:
        for _ in range(calls):
            base.fork("f").append_ids(added, role="user", message=message)

    arms = {
        "append": append,
        "encode": lambda: tokenizer.encode(history, add_special_tokens=False),
    }
    samples = paired(arms, repetitions, clock=time.thread_time)
    samples["append"] = [seconds / calls for seconds in samples["append"]]
    row = Row.of(f"{_ADDED} onto {_HISTORY:,}", samples, ours="append", theirs="encode", unit="µs")
    return row, statistics.median(samples["append"]) * 1e3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer sessions and repetitions")
    short: bool = parser.parse_args().short
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of the tokenizer: one thread on both sides
    folder, tokenizer = _tokenizer()
    renderer = ChatRenderer.of(tokenizer)
    row, append_ms = append_cost(tokenizer, renderer, 3 if short else 9)
    print(table([row]))
    replayed = replay(renderer, 16 if short else 1_000)
    shares = live(folder, renderer, 8 if short else 24)
    finish({**shares, **replayed, "append_vs_reencode": row.ratio, "append_ms": append_ms})


if __name__ == "__main__":
    main()
