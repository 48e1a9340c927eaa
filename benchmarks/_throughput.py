"""What bench_throughput plays, and what an arm's calls amount to."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks import _arms, _corpus
from benchmarks._corpus import Agent
from benchmarks._fleet import Call, Template
from benchmarks._math import live_set_blocks, percentile

__all__ = [
    "DTYPE",
    "Budget",
    "Cell",
    "Offered",
    "budget_of",
    "cell_of",
    "faults",
    "marked",
    "one_offs",
    "served_at",
]

DTYPE = "float32"


class Offered(msgspec.Struct, frozen=True):
    """Agents who together ask so many times a second, as long as answers take no time; `inf` asks
    as soon as the last answer is there. Pauses are drawn once: every arm has the same."""

    agents: list[Agent]
    max_tokens: int
    rate: float
    seed: int

    def gap(self, agent: int, turn: int) -> float:
        """Seconds before this turn; before the first, the agent's place in the queue."""
        if math.isinf(self.rate):
            return 0.0
        mean_s = len(self.agents) / self.rate
        draw = random.Random(f"{self.seed}/{agent}/{turn}").random()
        return mean_s * draw if turn == 0 else -mean_s * math.log1p(-draw)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What one arm did in one cell."""

    workload: str
    arm: str
    round: int
    rate: float
    requests_s: float
    output_tokens_s: float
    ttft_p50: float
    ttft_p95: float
    prompt_tokens: int
    computed: int
    loaded: int
    wrong: int
    load: float


def cell_of(
    workload: str, arm: str, number: int, rate: float, calls: Sequence[Call],
    right: Sequence[Call], counters: dict[str, float],
) -> Cell:  # fmt: skip
    """The figures of an arm's calls; `right`: vLLM's own answers to the same prompts.

    Raises:
        ValueError: the arms were not sent the same prompts.
    """
    answers = {(call.agent, call.turn): call for call in right}
    for call in calls:
        if call.prompt != answers[call.agent, call.turn].prompt:
            raise ValueError(f"{arm}, agent {call.agent}, turn {call.turn}: another prompt")
    seconds = max(call.done_s for call in calls) - min(call.sent_s for call in calls)
    by = "vllm:prompt_tokens_by_source_total/"
    ttft = [call.ttft_s for call in calls]
    return Cell(
        workload=workload,
        arm=arm,
        round=number,
        rate=rate,
        requests_s=len(calls) / seconds,
        output_tokens_s=sum(len(call.output) for call in calls) / seconds,
        ttft_p50=percentile(ttft, 0.5),
        ttft_p95=percentile(ttft, 0.95),
        prompt_tokens=sum(len(call.prompt) for call in calls),
        computed=round(counters.get(f"{by}local_compute", 0.0)),
        loaded=round(counters.get(f"{by}external_kv_transfer", 0.0)),
        wrong=sum(call.output != answers[call.agent, call.turn].output for call in calls),
        load=os.getloadavg()[0],
    )


def served_at(cells: Sequence[Cell], target_s: float) -> float:
    """Requests a second that an arm serves while p95 of the time to the first token is at most
    this, linear between the two rates where it is passed; 0.0 where it is longer at all rates.

    Args:
        cells: of one arm and round, by offered rate.
        target_s: seconds.
    """
    best, last = 0.0, None
    for cell in cells:
        if cell.ttft_p95 <= target_s:
            best = max(best, cell.requests_s)
        elif last is not None and last.ttft_p95 <= target_s:
            share = (target_s - last.ttft_p95) / (cell.ttft_p95 - last.ttft_p95)
            best = max(best, last.requests_s + share * (cell.requests_s - last.requests_s))
        last = cell
    return best


def faults(cells: Sequence[Cell]) -> list[str]:
    """Why the figures prove nothing; empty where they may stand."""
    found = [
        f"{one.workload}, {one.arm}: {one.wrong} outputs differ from vLLM's"
        for one in cells
        if one.wrong
    ]
    for arm in ("kvmem", "lmcache"):
        mine = [one for one in cells if (one.workload, one.arm) == ("short_memory", arm)]
        if mine and not sum(one.loaded for one in mine):
            found.append(f"short_memory, {arm}: no block was loaded")
    return found


class Budget(msgspec.Struct, frozen=True):
    """Bytes for the device and the host tier, and the longest request in tokens."""

    device: int
    host: int
    max_model_len: int


def budget_of(
    agents: Sequence[Agent], template: Template, model: Path, max_tokens: int, *, device: float
) -> Budget:
    """So much of the live set for the device, half of it for the host.

    Raises:
        SystemExit: the device can't hold the longest request.
    """
    prompts = [template.ids(agent.turns[-1]) for agent in agents]
    block = _arms.kv_bytes_per_token(model, DTYPE) * _arms.BLOCK_TOKENS
    live = live_set_blocks(prompts, _arms.BLOCK_TOKENS)
    longest = -(-(max(map(len, prompts)) + max_tokens) // _arms.BLOCK_TOKENS)
    if int(device * live) < longest + 1:
        raise SystemExit(
            f"the device's share is {int(device * live)} blocks, the longest request needs "
            f"{longest + 1}: give more --agents"
        )
    return Budget(int(device * live) * block, live // 2 * block, longest * _arms.BLOCK_TOKENS)


def marked(agents: Sequence[Agent], number: int) -> list[Agent]:
    """The same conversations with words of a cell's own before them."""
    mark = f"Run {number:04}. "
    return [
        Agent(
            agent.name,
            agent.source,
            [[{**m[0], "content": mark + m[0]["content"]}, *m[1:]] for m in agent.turns],
        )
        for agent in agents
    ]


def one_offs(n: int, chars: int, seed: int) -> list[Agent]:
    """Prompts that share nothing, a call each."""
    text = _corpus.real_text(600_000)
    starts = random.Random(seed).sample(range(0, len(text) - chars, chars), n)
    return [
        Agent(f"one-off/{i}", "one-off", [[{"role": "user", "content": text[at : at + chars]}]])
        for i, at in enumerate(starts)
    ]
