"""How many requests a second does an engine serve, at how long a wait for the first token?

    python -m benchmarks.bench_throughput [--short] [--rounds 3] [--workloads a,b] [--arms a,b] ...

Agents on recorded conversations talk to stock vLLM servers through the OpenAI client.

    short_memory  growing histories and shared prefixes; the device has a quarter of the live set,
                  the host tier a half. Agents pause between turns for so long that all of them
                  together ask for a given rate; the rate is raised step by step, in multiples of
                  what this machine serves when it computes every prompt. What counts is the
                  requests a second that are served while p95 of the time to the first token keeps
                  to a target: twice what the mean prompt takes to be computed.
    all_fits      the same agents, the device has room for all of it twice; each asks as soon as it
                  is answered. kvmem can gain nothing here: its overhead.
    no_reuse      prompts that share nothing, all at once: the overhead again.

Arms, each on a server of its own with the same bytes and OpenMP binding, one at work at a time and
their order rotated from cell to cell; a cell's prompts begin with words of its own, so that no cell
finds what an earlier one left:

    vllm_plain  vLLM with prefix caching off (short_memory only)
    vllm        vLLM as it is
    kvmem       vLLM with kvmem
    lmcache     vLLM with LMCache's server, an L1 of the host tier's bytes, where it is installed

vLLM's own OffloadingConnector refuses to run on a CPU, so that it has no arm here. float32 and
greedy: an output that differs from vLLM's is wrong; so is a short_memory without a block loaded.
Either ends with exit code 1. Every call is kept with `--calls`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import _arms, _corpus
from benchmarks._corpus import Agent
from benchmarks._fleet import Call, Server, Template, play, wait_ready
from benchmarks._math import bootstrap_ci
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import finish
from benchmarks._throughput import (
    DTYPE,
    Budget,
    Cell,
    Offered,
    budget_of,
    cell_of,
    faults,
    marked,
    one_offs,
    served_at,
)
from kvmem.demo import model as demo_model

__all__: list[str] = []

ARMS = ("vllm_plain", "vllm", "kvmem", "lmcache")
WORKLOADS = ("short_memory", "all_fits", "no_reuse")
STEPS = (0.75, 1.5, 3.0, 6.0)  # offered, in multiples of what is served if all is computed
TARGET = 2.0  # mean prompts computed
HOPELESS = 4.0  # times the target: higher rates are not tried
ONE_OFF_CHARS = 4_000
SEED = 20_261_127


class Bench:
    """Plays cells and keeps what came back."""

    def __init__(self, args: argparse.Namespace, model: Path, folder: Path) -> None:
        self.args, self.model, self.folder = args, model, folder
        self.cells: list[Cell] = []
        self.rows: list[dict[str, Any]] = []  # every call
        self.target_s = 0.0
        self.rates: list[float] = []
        self._numbers = itertools.count()  # of cells

    @contextlib.contextmanager
    def servers(
        self, arms: Sequence[str], budget: Budget, lmcache: Path | None
    ) -> Iterator[dict[str, Server]]:
        """The arms' servers, started side by side; none works yet."""
        with contextlib.ExitStack() as stack:
            port = 0
            if "lmcache" in arms:
                assert lmcache is not None
                log = self.folder / "lmcache-server.log"
                port = stack.enter_context(
                    _arms.lmcache_server(lmcache, host_bytes=budget.host, log=log)
                )
            transfer: dict[str, Any] = {
                "kvmem": _arms.kvmem_transfer({"host_gb": budget.host / 2**30}),
                "lmcache": _arms.lmcache_transfer(port),
            }
            found = {
                arm: stack.enter_context(
                    Server(
                        self.model,
                        dtype=DTYPE,
                        device_bytes=budget.device,
                        max_model_len=budget.max_model_len,
                        transfer=transfer.get(arm),
                        log=self.folder / f"{arm}.log",
                        python=lmcache if arm == "lmcache" else None,
                        more=["--no-enable-prefix-caching"] if arm == "vllm_plain" else [],
                    )
                )
                for arm in arms
            }
            wait_ready(list(found.values()))
            yield found

    def warm_up(self, servers: dict[str, Server], budget: Budget) -> float:
        """Prompts that no agent sends, on every arm; tokens a second of vLLM's own prefill."""
        n = min(1_500, budget.max_model_len - 1)
        ids = Template(self.model).encode(_corpus.real_text(750_000)[700_000:])
        prompts = [ids[start : start + n] for start in range(0, 3 * n, n)]
        speed = {}
        for arm, server in servers.items():
            server.settle()
            speed[arm] = server.prefill_tokens_s(prompts)
        return speed["vllm"]

    def cell(
        self, workload: str, servers: dict[str, Server], agents: list[Agent], rate: float,
        number: int, skip: set[str],
    ) -> None:  # fmt: skip
        """One rate on every arm but those."""
        at = next(self._numbers)
        offered = Offered(marked(agents, at), self.args.max_tokens, rate, self.args.seed + number)
        arms = [arm for arm in servers if arm not in skip]
        turned = arms[at % len(arms) :] + arms[: at % len(arms)]
        calls: dict[str, list[Call]] = {}
        counters: dict[str, dict[str, float]] = {}
        for arm in turned:
            server = servers[arm]
            server.settle()
            before = server.counters()
            calls[arm] = play(server, offered)
            server.settle()
            counters[arm] = {k: v - before.get(k, 0.0) for k, v in server.counters().items()}
        for arm in arms:
            one = cell_of(workload, arm, number, rate, calls[arm], calls["vllm"], counters[arm])
            self.cells.append(one)
            print(
                f"  {workload:13} {arm:10} offered {rate:6.2f}/s  served {one.requests_s:6.2f}/s "
                f"{one.output_tokens_s:7.1f} tokens/s  first token p50 {one.ttft_p50:6.2f} s  "
                f"p95 {one.ttft_p95:6.2f} s  computed {one.computed / one.prompt_tokens:5.1%}  "
                f"loaded {one.loaded / one.prompt_tokens:5.1%}  wrong {one.wrong}  load "
                f"{one.load:.1f}",
                flush=True,
            )
            self.rows += [
                {"workload": workload, "arm": arm, "rate": rate, "round": number,
                 **msgspec.to_builtins(call)}
                for call in calls[arm]
            ]  # fmt: skip

    def short_memory(self, servers: dict[str, Server], agents: list[Agent], speed: float) -> None:
        """Rates one after the other; an arm that is hopelessly late is not asked for more."""
        template = Template(self.model)
        lengths = [len(template.ids(turn)) for agent in agents for turn in agent.turns]
        mean_s = statistics.mean(lengths) / speed
        self.target_s = TARGET * mean_s
        self.rates = [step / mean_s for step in self.args.steps]
        print(f"{speed:,.0f} tokens/s computed, prompts of {statistics.mean(lengths):,.0f}: the "
              f"target is {self.target_s:.2f} s", flush=True)  # fmt: skip
        for number in range(self.args.rounds):
            late: set[str] = set()
            for rate in self.rates:
                self.cell("short_memory", servers, agents, rate, number, late)
                late = {
                    one.arm
                    for one in self.of("short_memory", number)
                    if one.ttft_p95 > HOPELESS * self.target_s and one.arm != "vllm"
                }

    def of(self, workload: str, number: int, arm: str | None = None) -> list[Cell]:
        """The cells of a round, by rate."""
        return [
            one
            for one in self.cells
            if (one.workload, one.round) == (workload, number) and arm in (None, one.arm)
        ]

    # -- results -----------------------------------------------------------------------------

    def at_target(self, arm: str) -> list[float]:
        """By round; where even the lowest rate is too much, what was served at that."""
        found = []
        for number in range(self.args.rounds):
            cells = self.of("short_memory", number, arm)
            found.append(served_at(cells, self.target_s) or cells[0].requests_s)
        return found

    def full(self, workload: str, arm: str) -> list[float]:
        """Requests a second of the rounds of a workload that asks as fast as it is answered."""
        return [one.requests_s for one in self.cells if (one.workload, one.arm) == (workload, arm)]

    def result(self) -> dict[str, Any]:
        """The ratios with their intervals, and what they are of."""
        found: dict[str, Any] = {}
        arms = {(one.workload, one.arm) for one in self.cells}
        served: dict[str, dict[str, list[float]]] = {}
        for workload in WORKLOADS:
            names = [arm for arm in ARMS if (workload, arm) in arms]
            rates = {
                arm: self.at_target(arm) if workload == "short_memory" else self.full(workload, arm)
                for arm in names
            }
            if "kvmem" not in rates:
                continue
            served[workload] = {a: [round(v, 3) for v in vs] for a, vs in rates.items()}
            for arm in names:
                if arm == "kvmem":
                    continue
                ratios = [a / b for a, b in zip(rates["kvmem"], rates[arm], strict=True)]
                found[f"{workload}_vs_{arm}"] = statistics.median(ratios)
                if len(ratios) > 2:
                    found[f"{workload}_vs_{arm}_ci"] = bootstrap_ci(ratios, seed=SEED)
        late = sorted(
            {
                arm
                for arm in ARMS
                for number in range(self.args.rounds)
                if (cells := self.of("short_memory", number, arm))
                and not served_at(cells, self.target_s)
            }
        )
        return {
            **found,
            "requests_s": served,
            "target_s": self.target_s,
            "late_at_every_rate": late,
            "wrong": sum(one.wrong for one in self.cells),
            "cells": len(self.cells),
            "rounds": self.args.rounds,
        }


def _agents(args: argparse.Namespace) -> list[Agent]:
    if args.short:
        print("short: 6 generated agents, two rates, one round")
        return _corpus.generated(agents=6, turns=3, seed=args.seed, size=0.3)
    folder = _corpus.trace_folder(args.data)
    if folder is None:
        print("no folder of traces (--data, KVMEM_DATA, ../shared/data): generated agents")
    return _corpus.fleet(folder, agents=args.agents, turns=args.turns, seed=args.seed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="6 agents with short prompts")
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3, help="calls of each agent")
    parser.add_argument("--rounds", type=int, default=3, help="of every workload")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of each reply")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="which are played")
    parser.add_argument("--arms", default=",".join(ARMS), help="which play; vllm always does")
    parser.add_argument("--data", type=Path, help="the folder of traces")
    parser.add_argument("--lmcache-python", type=Path, help="a Python with LMCache and vLLM")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--calls", type=Path, help="write every call here, one JSON a line")
    args = parser.parse_args()
    args.steps = STEPS
    if args.short:
        args.rounds, args.steps = 1, STEPS[1::2]
    args.workloads = [name for name in WORKLOADS if name in args.workloads.split(",")]
    args.arms = [name for name in ARMS if name in {"vllm", *args.arms.split(",")}]
    if not args.workloads:
        parser.error(f"--workloads: some of {', '.join(WORKLOADS)}")
    return args


def main() -> None:
    """Plays all cells and prints the line."""
    args = _arguments()
    exit_on_sigterm()
    model = demo_model.ensure(print)
    template = Template(model)
    lmcache = None if args.short else _arms.lmcache_python(args.lmcache_python)
    if lmcache is None and "lmcache" in args.arms:
        print("LMCache's arm is skipped: --short, or no .venv-lmcache (`make lmcache`) and no "
              "--lmcache-python")  # fmt: skip
        args.arms.remove("lmcache")
    fleet = _agents(args)
    one_time = one_offs(8 if args.short else 24, ONE_OFF_CHARS, args.seed)
    before = shared_memory()
    with tempfile.TemporaryDirectory(prefix="kvmem-bench-") as folder:
        bench = Bench(args, model, Path(folder))
        for workload in args.workloads:
            agents = one_time if workload == "no_reuse" else fleet
            share = 0.25 if workload == "short_memory" else 2.0
            share = max(share, 0.5) if args.short else share
            budget = budget_of(marked(agents, 0), template, model, args.max_tokens, device=share)
            print(f"{workload}: device {budget.device / 1e6:,.0f} MB, host "
                  f"{budget.host / 1e6:,.0f} MB", flush=True)  # fmt: skip
            arms = [a for a in args.arms if a != "vllm_plain" or workload == "short_memory"]
            with bench.servers(arms, budget, lmcache) as servers:
                speed = bench.warm_up(servers, budget)
                if workload == "short_memory":
                    bench.short_memory(servers, agents, speed)
                else:
                    for number in range(args.rounds):
                        bench.cell(workload, servers, agents, math.inf, number, set())
    if args.calls:
        args.calls.write_text("".join(json.dumps(row) + "\n" for row in bench.rows), "utf-8")
    wrong = faults(bench.cells)
    finish({**bench.result(), "faults": wrong, "left_behind": leftovers(before)})
    if wrong:
        raise SystemExit(f"bench_throughput: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
