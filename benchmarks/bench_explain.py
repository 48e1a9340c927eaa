"""Is the reason for a miss right, and what does knowing it cost?

    python -m benchmarks.bench_explain [--short] [--data FOLDER]

Two parts. The labelled set: recorded conversations, each broken in every way that there is a reason
for (`benchmarks/_explain_set.py`), and what the explainer says of the next turn. The cost: vLLM's
own scheduler with kvmem's connector in both of its roles, as in `bench_connector`, and agents that
come back turn after turn; the calls of the scheduler's half into its explainer are timed in CPU
time of the scheduler's thread and summed over requests. One turn in twenty breaks its prefix. Its
calls into its telemetry, and what vLLM asks of that after each step, are summed by themselves.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import _corpus, _explain_set, _explain_world, bench_connector
from benchmarks._math import percentile
from benchmarks._process import exit_on_sigterm
from benchmarks._report import finish
from kvmem.explain.misses.past import Pasts, Prompt

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["accuracy", "bytes_per_session", "cost"]

BLOCK = 16
FIRST_TOKENS, TURN_TOKENS, REPLY_TOKENS = 4096, 400, 40
BREAKS = 20  # one turn in so many
TIMED = ("looked_up", "finished", "step", "_evicted", "page")
TELEMETRY = ("answered", "stats")


def accuracy(folder: Path | None, most: int) -> dict[str, float]:
    """The labelled set's figures, and a line for each case that is wrong."""
    found, n = [], 0
    for talk in _explain_world.conversations(folder, most=most):
        outcomes = list(_explain_set.outcomes(talk))
        n += bool(outcomes)
        found += outcomes
    for one in found:
        if not one.right:
            print(f"wrong: {one.case} ({one.route}): {one.said}, not {one.expected}")
    return {**_explain_set.tally(found), "conversations": n}


class _Clock:
    """CPU microseconds of the scheduler's thread inside its explainer, by request or by step."""

    def __init__(self, misses: Any, telemetry: Any) -> None:
        self.us: dict[str, list[float]] = {name: [] for name in TIMED}
        self.telemetry_us: dict[str, list[float]] = {name: [] for name in TELEMETRY}
        for name, us in self.telemetry_us.items():
            setattr(telemetry, name, self._timed_into(us, getattr(telemetry, name)))
        for name in TIMED:
            setattr(misses, name, self._timed(name, getattr(misses, name)))
        self.behind_us: list[float] = []
        for name in ("look", "end"):
            explainer = misses.explainer
            setattr(explainer, name, self._timed_into(self.behind_us, getattr(explainer, name)))
        # The cache has the method itself.
        misses._half.cache.on_evicted = misses._evicted
        empty = self._timed("step", lambda: None)
        for _ in range(2000):
            empty()
        self.cost_us = statistics.median(self.us["step"])
        self.us["step"].clear()

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return self._timed_into(self.us[name], call)

    @staticmethod
    def _timed_into(us: list[float], call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time_ns()
            try:
                return call(*args, **kwargs)
            finally:
                us.append((time.thread_time_ns() - begin) / 1e3)

        return timed

    def total_us(self, timed: dict[str, list[float]]) -> float:
        return sum(sum(us) - len(us) * self.cost_us for us in timed.values())


def _request(number: int, session: str, tokens: list[int], hasher: Any) -> Request:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    sampling = SamplingParams(max_tokens=REPLY_TOKENS, ignore_eos=True, temperature=0.0)
    sampling.update_from_generation_config({}, None)
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=list(tokens),
        sampling_params=sampling,
        pooling_params=None,
        block_hasher=hasher,
        session_id=session or None,
    )


def cost(agents: int, turns: int, *, named: bool) -> dict[str, float]:
    """What the explainer costs the scheduler's thread, a request."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    with bench_connector._engine(agents, BLOCK) as engine:
        hash_fn = get_hash_fn_by_name(engine.config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        hasher = get_request_block_hasher(BLOCK, hash_fn)
        half = engine.scheduler.connector.scheduler
        clock = _Clock(half.misses, half.telemetry)
        rng = np.random.default_rng(1)
        head = rng.integers(100, 40_000, 1024).tolist()
        prompts = [head + rng.integers(100, 40_000, FIRST_TOKENS - 1024).tolist()
                   for _ in range(agents)]  # fmt: skip
        gc.collect()
        gc.disable()  # as timeit does: where a collection falls says nothing of whose garbage it is
        n = 0
        for _ in range(turns):
            requests = []
            for agent, prompt in enumerate(prompts):
                requests.append(_request(n, f"agent-{agent}" if named else "", prompt, hasher))
                engine.scheduler.add_request(requests[-1])
                n += 1
            while not all(request.is_finished() for request in requests):
                engine.step()
            for agent, request in enumerate(requests):
                added = rng.integers(100, 40_000, TURN_TOKENS).tolist()
                prompts[agent] = [*request.all_token_ids, *added]
                if (n + agent) % BREAKS == 0:
                    prompts[agent][1024 + agent] += 1
        gc.enable()
        quote_ms = []
        for prompt in prompts:  # nothing else runs: what a quote takes of the process
            begin = time.perf_counter()
            half.telemetry.quotes.quote(prompt)
            quote_ms.append((time.perf_counter() - begin) * 1e3)
        explained = len(clock.us["finished"])
        if explained != n:
            raise RuntimeError(f"{explained} of {n} requests were explained")
        return {
            "us": clock.total_us(clock.us) / n,
            "look_us": statistics.fmean(clock.us["looked_up"]) - clock.cost_us,
            "end_us": statistics.fmean(clock.us["finished"]) - clock.cost_us,
            "page_us": sum(clock.us["page"]) / n,
            "behind_us": sum(clock.behind_us) / n,
            "telemetry_us": clock.total_us(clock.telemetry_us) / n,
            "quote_ms": statistics.median(quote_ms),
            "quote_tokens": statistics.fmean(len(prompt) for prompt in prompts),
            "answered_us": statistics.median(clock.telemetry_us["answered"]) - clock.cost_us,
            "stats_us": statistics.median(clock.telemetry_us["stats"]) - clock.cost_us,
            "stats_most_us": max(clock.telemetry_us["stats"]),
            "p99_us": percentile(clock.us["looked_up"], 0.99),
            "looks": len(clock.us["looked_up"]) / n,
        }


def bytes_per_session(sessions: int = 500, blocks: int = 256) -> dict[str, float]:
    """Memory of the table of earlier prompts, a session: all of it but keys, 32 bytes a block, and
    the token ids of the last ones, which have 16 MiB for all of them."""
    import tracemalloc

    rng = np.random.default_rng(2)
    figures = {}
    for kind in ("named", "nameless"):
        prompts = []
        for at in range(sessions):
            keys = [rng.bytes(32) for _ in range(blocks)]
            ids = rng.integers(100, 40_000, blocks * BLOCK + 5).tolist()
            prompts.append(Prompt(f"request-{at}", f"session-{at}" if kind == "named" else "", b"",
                                  b"", b"", b"", keys, ids, len(ids)))  # fmt: skip
        pasts = Pasts(BLOCK)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for prompt in prompts:
            pasts.keep(prompt, None, 0, [], prompt.n_tokens, None)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert len(pasts) == sessions
        assert pasts.tokens_bytes
        figures[kind] = (held - pasts.keys_bytes - pasts.tokens_bytes) / sessions
        figures[f"{kind}_with_tokens"] = held / sessions - blocks * 32
    return figures


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer conversations and turns")
    parser.add_argument("--data", type=Path, default=None, help="the folder of traces")
    parser.add_argument("--cost-only", action="store_true", help="leave the labelled set out")
    args = parser.parse_args()
    exit_on_sigterm()
    folder = _corpus.trace_folder(args.data)
    figures: dict[str, Any] = {}
    if not args.cost_only:
        if folder is None:
            print("no folder of traces: the conversations are generated", file=sys.stderr)
        figures |= accuracy(folder, 4 if args.short else 30)
    memory = bytes_per_session()
    figures["bytes_per_session"] = round(max(memory["named"], memory["nameless"]))
    print({name: round(value) for name, value in memory.items()})
    agents, turns = (16, 4) if args.short else (32, 8)
    by_name = {named: cost(agents, turns, named=named) for named in (True, False)}
    for named, one in by_name.items():
        print("named" if named else "nameless", {k: round(v, 2) for k, v in one.items()})
    figures["us_per_request"] = round(max(one["us"] for one in by_name.values()), 2)
    telemetry = max(one["telemetry_us"] for one in by_name.values())
    figures["telemetry_us_per_request"] = round(telemetry, 2)
    figures["quote_ms"] = round(max(one["quote_ms"] for one in by_name.values()), 2)
    figures["behind_us_per_request"] = round(max(one["behind_us"] for one in by_name.values()), 1)
    finish(figures)


if __name__ == "__main__":
    main()
