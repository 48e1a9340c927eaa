"""Blame on the real vLLM: forced continuations are the engine's own logprobs, from cached prefixes,
and a lost fact is found by `kvmem blame` over HTTP.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvmem.blame.served import ServedScorer
from kvmem.demo.server import Server
from tests.e2e.host import BLOCK, prompt

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def scorer(served: Server) -> Iterator[ServedScorer]:
    one = ServedScorer(served.url, model="smol")
    yield one
    one.close()


def whole(server: Server, ids: list[int], candidate: list[int]) -> float:
    """The engine's `prompt_logprobs` of prompt and candidate, which read no cache."""
    body = {
        "model": "smol", "prompt": [*ids, *candidate], "max_tokens": 1, "prompt_logprobs": 0,
        "add_special_tokens": False,
    }  # fmt: skip
    told = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).json()
    rows = told["choices"][0]["prompt_logprobs"][len(ids) :]
    return sum(row[str(t)]["logprob"] for row, t in zip(rows, candidate, strict=True))


def test_forced_continuations_are_the_engines_own_logprobs(
    served: Server, scorer: ServedScorer
) -> None:
    ids = prompt(10 * BLOCK + 5, 811)
    candidates = [[100], [100, 200, 300], [100, 201], [400, 5, 6, 7]]
    cold = scorer.score(ids, candidates)
    warm = scorer.score(ids, candidates)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 10 * BLOCK)
    wanted = [whole(served, ids, one) for one in candidates]
    assert cold.logprobs == pytest.approx(wanted, abs=1e-3)
    assert warm.logprobs == pytest.approx(cold.logprobs, abs=1e-3)


def test_fresh_kv_is_computed_once_and_for_this_scorer_only(scorer: ServedScorer) -> None:
    ids = prompt(6 * BLOCK + 1, 812)
    served = scorer.score(ids, [[100]])
    fresh = [scorer.score(ids, [[100]], kv="fresh") for _ in range(2)]
    assert [one.cached_tokens for one in fresh] == [0, 6 * BLOCK]
    assert fresh[0].logprobs == pytest.approx(served.logprobs, abs=1e-3)
    sampled = scorer.sample(ids, max_tokens=4)
    assert len(sampled.ids) == 4
    assert sampled.cached_tokens == 6 * BLOCK


def test_a_lost_fact_is_found_over_http(served: Server, smollm2: str, tmp_path: Path) -> None:
    from benchmarks._blame_logs import make

    # On this model a case that is answered right with the fact and wrong without it.
    case = make("dropped", 1, 0)
    runs = tmp_path / "runs"
    runs.mkdir()
    for name, context in (("lost", case.turn.served), ("kept", case.turn.full)):
        run = {
            "blame": 1, "session": name, "system": case.turn.system,
            "history": [p.message for p in case.turn.full],
            "turns": [{
                "question": case.turn.asked, "served": [p.message for p in context],
                "expected": case.turn.expected, "candidates": case.turn.candidates,
            }],
        }  # fmt: skip
        (runs / f"{name}.json").write_text(json.dumps(run))
    command = [
        sys.executable, "-m", "kvmem.cli", "blame", str(runs), "--model", smollm2,
        "--url", served.url, "--served-model", "smol", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode in (0, 1), done.stderr
    kept, lost = json.loads(done.stdout)
    (verdict,) = lost["verdicts"]
    arms = {arm["name"]: arm for arm in verdict["arms"]}
    assert set(arms) >= set("EXFNRO")
    (one,) = verdict["residency"]
    assert (one["value"], one["cause"]) == (False, "lost")
    enough = arms["O"]["right"] or arms["P"]["right"]
    assert verdict["fault"] == ("context" if enough else "both")
    assert done.returncode == 1
    # The other run, which came first, had the same history.
    assert [v["turn"] for v in kept["verdicts"]] == ["kept/0"]
    assert arms["F"]["cached_tokens"] >= (arms["F"]["prompt_tokens"] - 1) // BLOCK * BLOCK > 0
