"""bench_throughput's figures: what is served at a target, and when nothing is proved."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest

from benchmarks._corpus import generated
from benchmarks._fleet import Call
from benchmarks._throughput import Cell, Offered, cell_of, faults, marked, one_offs, served_at


def cell(requests_s: float, ttft_p95: float, **more: Any) -> Cell:
    told: dict[str, Any] = {
        "workload": "short_memory", "arm": "kvmem", "round": 0, "rate": requests_s,
        "requests_s": requests_s, "output_tokens_s": 1.0, "ttft_p50": 0.1, "ttft_p95": ttft_p95,
        "prompt_tokens": 10, "computed": 5, "loaded": 5, "wrong": 0, "load": 1.0,
    }  # fmt: skip
    return Cell(**{**told, **more})


@pytest.mark.parametrize(
    ("cells", "served"),
    [
        ([(1.0, 0.5), (2.0, 0.9)], 2.0),  # it keeps up at every rate
        ([(1.0, 0.5), (2.0, 1.5)], 1.5),  # passed in the middle
        ([(1.0, 1.5), (2.0, 2.5)], 0.0),  # late from the first
        ([(1.0, 0.5), (1.8, 1.0), (1.9, 5.0)], 1.8),
        ([(1.0, 1.1), (2.0, 0.9), (3.0, 1.1)], 2.5),  # late once, and not at a higher rate
    ],
)
def test_what_is_served_at_a_target(cells: list[tuple[float, float]], served: float) -> None:
    assert served_at([cell(*one) for one in cells], 1.0) == pytest.approx(served)


def test_a_wrong_output_or_a_tier_that_was_not_used_proves_nothing() -> None:
    assert faults([cell(1.0, 1.0), cell(1.0, 1.0, arm="vllm", loaded=0)]) == []
    (said,) = faults([cell(1.0, 1.0), cell(1.0, 1.0, arm="lmcache", wrong=3)])
    assert "lmcache: 3 outputs differ" in said
    (said,) = faults([cell(1.0, 1.0, loaded=0), cell(2.0, 1.0, loaded=0)])
    assert "kvmem: no block was loaded" in said
    # Where everything fits nothing need be loaded.
    assert faults([cell(1.0, 1.0, workload="all_fits", loaded=0)]) == []


def test_agents_ask_as_often_as_is_offered() -> None:
    agents = generated(agents=40, turns=50, seed=1, size=0.01)
    offered = Offered(agents, 16, 8.0, 7)
    gaps = [offered.gap(agent, turn) for agent in range(40) for turn in range(1, 50)]
    assert statistics.mean(gaps) == pytest.approx(40 / 8.0, rel=0.1)
    assert max(offered.gap(agent, 0) for agent in range(40)) <= 40 / 8.0
    assert gaps == [offered.gap(agent, turn) for agent in range(40) for turn in range(1, 50)]
    assert Offered(agents, 16, math.inf, 7).gap(3, 1) == 0.0


def test_cells_share_nothing_and_one_offs_neither() -> None:
    agents = generated(agents=4, turns=2, seed=1, size=0.1)
    begins = [marked(agents, n)[0].turns[1][0]["content"][:12] for n in range(3)]
    assert len(set(begins)) == 3
    assert marked(agents, 1)[0].turns[1][1:] == agents[0].turns[1][1:]
    prompts = [agent.turns[0][0]["content"] for agent in one_offs(24, 4_000, 1)]
    assert all(a[:200] != b[:200] for a, b in itertools.combinations(prompts, 2))


def test_a_cell_counts_what_differs_and_refuses_other_prompts() -> None:
    def call(output: list[int], prompt: list[int], sent_s: float) -> Call:
        return Call(
            agent=0, turn=0, sent_s=sent_s, done_s=sent_s + 2, ttft_s=0.5, prompt=prompt,
            output=output, cached=0, receipt=None,
        )  # fmt: skip

    by = "vllm:prompt_tokens_by_source_total/"
    counters = {f"{by}local_compute": 3.0, f"{by}external_kv_transfer": 4.0}
    told = cell_of(
        "all_fits", "kvmem", 0, 1.0, [call([1, 2], [7], 1.0)], [call([1, 3], [7], 0.0)], counters
    )
    assert (told.wrong, told.computed, told.loaded) == (1, 3, 4)
    assert told.requests_s == pytest.approx(0.5)
    assert told.output_tokens_s == pytest.approx(1.0)
    with pytest.raises(ValueError, match="another prompt"):
        cell_of("all_fits", "kvmem", 0, 1.0, [call([1], [8], 0.0)], [call([1], [7], 0.0)], {})
