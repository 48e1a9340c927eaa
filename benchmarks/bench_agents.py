"""What is the agent-aware policy worth on a real engine, against LRU and against LMCache?

    python -m benchmarks.bench_agents [--short] [--throttle] [--arms vllm,kvmem_lru] ...

At least 16 agents of recorded conversations (`_agents`) talk to a stock vLLM server at the same
time. The live set is the KV bytes of the last prompts of all of them, shared prefixes once; the
device gets a quarter of it and the host tier a half, the same bytes in every arm:

    vllm          vLLM alone
    kvmem_lru     vLLM with kvmem, eviction: lru
    kvmem_events  eviction: agents, which sees prompts and when they come
    kvmem_hints   the same, told by the agents' orchestrator what each waits for, and when that ends
    lmcache       vLLM with LMCache's server, an L1 of the host tier's bytes, where it is installed

One arm after the other, each on an engine of its own. float32 and greedy: then a token's KV does
not depend on how its prompt was cut, and an output that differs from vLLM's alone is wrong; so is a
run in which an arm with a host tier never loaded a block. Both end it with exit code 1.

Figures are of all calls; `returning` ones are of those that extend a prompt answered before, which
is what a cache can help. `resident_at_arrival` is the share of what a returning turn could find, of
its own earlier prompts and of others', that was on the device when the engine looked it up first.
`--throttle` is bench_fleet's: loading is made as slow as it is for an 8B model on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import _arms, _corpus
from benchmarks._agents import Hinted, Team, play, team_of
from benchmarks._arms import BLOCK_TOKENS
from benchmarks._fleet import Call, Score, Server, Template, ideals_of, score, wait_ready
from benchmarks._math import bandwidth_for_ratio, live_set_blocks, percentile
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import finish
from kvmem.demo import model as demo_model

__all__: list[str] = []

_DTYPE = "float32"
_LOAD_OVER_COMPUTE = 0.078 / 2.0  # as bench_fleet: Llama-3-8B, 32k tokens, 55 GB/s over recompute
_WARM_UP_TOKENS = 1_500
_POSITIONS = 8_192  # of SmolLM2
_KVMEM = {"kvmem_lru": "lru", "kvmem_events": "agents", "kvmem_hints": "agents"}
_ARMS = ("vllm", *_KVMEM, "lmcache")


class Budget(msgspec.Struct, frozen=True):
    """Bytes of each place, and of the live set they are shares of."""

    live: int
    device: int
    host: int
    max_model_len: int

    @classmethod
    def of(cls, team: Team, template: Template, model: Path, args: argparse.Namespace) -> Budget:
        """The budgets of a team.

        Raises:
            SystemExit: the device's share can't hold the longest request.
        """
        prompts = [template.ids(messages) for messages in team.last_prompts]
        block = _arms.kv_bytes_per_token(model, _DTYPE) * BLOCK_TOKENS
        live = live_set_blocks(prompts, BLOCK_TOKENS)
        longest = -(-(max(map(len, prompts)) + team.max_tokens) // BLOCK_TOKENS)
        device = int(args.device_share * live)
        if device < longest + 1:
            raise SystemExit(
                f"--device-share {args.device_share} is {device} blocks; the longest request "
                f"needs {longest + 1}: more agents, or {(longest + 1) / live + 0.005:.2f}"
            )
        host = max(1, int(args.host_share * live))
        return cls(live * block, device * block, host * block, longest * BLOCK_TOKENS)


class Played(msgspec.Struct, frozen=True):
    """What came back of one arm."""

    calls: list[Call]
    counters: dict[str, float]
    hinted: Hinted
    prefill_tokens_s: float


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One arm's figures."""

    score: Score
    ttft: list[float]  # p50, p95, p99
    ttft_returning: list[float]
    resident: float | None
    transferred: bool


class Run:
    """Starts servers, plays the team on each and keeps what came back."""

    def __init__(self, model: Path, team: Team, budget: Budget, folder: Path) -> None:
        self.model, self.team, self.budget, self.folder = model, team, budget, folder
        self.played: dict[str, Played] = {}

    @contextlib.contextmanager
    def started(
        self, arms: Sequence[str], throttle_gb_s: float, lmcache: tuple[Path, int] | None
    ) -> Iterator[dict[str, Server]]:
        """The arms' servers, started side by side; none works yet."""
        with contextlib.ExitStack() as stack:
            servers = {
                arm: stack.enter_context(self._server(arm, throttle_gb_s, lmcache)) for arm in arms
            }
            wait_ready(list(servers.values()))
            yield servers

    def play(self, arm: str, server: Server) -> None:
        """Prompts of its own, then the team on one arm."""
        server.settle()
        speed = server.prefill_tokens_s(self._warm_up_prompts())
        server.settle()
        before = server.counters()
        calls, hinted = play(server, self.team, hinting=arm == "kvmem_hints")
        server.settle()
        counters = {key: v - before.get(key, 0.0) for key, v in server.counters().items()}
        self.played[arm] = Played(calls, counters, hinted, speed)
        seconds = max(call.done_s for call in calls)
        print(
            f"  {arm}: {len(calls)} calls in {seconds:.1f} s, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )

    def _server(self, arm: str, throttle_gb_s: float, lmcache: tuple[Path, int] | None) -> Server:
        transfer, python = None, None
        if arm in _KVMEM:
            settings: dict[str, Any] = {
                "host_gb": self.budget.host / 2**30,
                "eviction": _KVMEM[arm],
            }
            if throttle_gb_s:
                settings["throttle_gb_s"] = throttle_gb_s
            transfer = _arms.kvmem_transfer(settings)
        elif arm == "lmcache":
            assert lmcache is not None
            python, port = lmcache
            transfer = _arms.lmcache_transfer(port)
        return Server(
            self.model,
            dtype=_DTYPE,
            device_bytes=self.budget.device,
            max_model_len=self.budget.max_model_len,
            transfer=transfer,
            log=self.folder / f"{arm}.log",
            python=python,
            hints=arm in _KVMEM,
        )

    def _warm_up_prompts(self) -> list[list[int]]:
        """Prompts that no agent sends; the first one warms up."""
        n = min(_WARM_UP_TOKENS, self.budget.max_model_len - 1)
        ids = Template(self.model).encode(_corpus.real_text(750_000)[700_000:])
        return [ids[start : start + n] for start in range(0, 3 * n, n)]

    def told(self, arm: str) -> Told:
        """An arm's figures, its outputs held against vLLM's alone."""
        played = self.played[arm]
        oracle = self.played["vllm"].calls
        found = score(played.calls, oracle, played.counters, block_tokens=BLOCK_TOKENS)
        owed = ideals_of(played.calls, BLOCK_TOKENS)[1]
        returning = [(c, n) for c, n in zip(played.calls, owed, strict=True) if c.turn]
        on_device = [_on_device(arm, call) for call, _ in returning]
        resident = None
        if None not in on_device:
            resident = sum(filter(None, on_device)) / max(1, sum(n for _, n in returning))
        return Told(
            score=found,
            ttft=_quantiles([call.ttft_s for call in played.calls]),
            ttft_returning=_quantiles([call.ttft_s for call, _ in returning]),
            resident=resident,
            transferred=found.by_source.get("external_kv_transfer", 0) > 0,
        )


def _on_device(arm: str, call: Call) -> int | None:
    """Prompt tokens that the engine itself had when it looked first; None where nobody says."""
    if arm == "vllm":
        return call.cached
    return (call.receipt or {}).get("tokens", {}).get("device")


def _quantiles(values: list[float]) -> list[float]:
    return [percentile(values, share) for share in (0.5, 0.95, 0.99)]


def _run(run: Run, args: argparse.Namespace, arms: Sequence[str], lmcache: Any) -> float:
    """Plays every arm; the throttle in GB/s, 0 for none."""
    throttle, rest = 0.0, list(arms)
    if args.throttle:
        with run.started(["vllm"], 0.0, None) as servers:
            run.play("vllm", servers["vllm"])
        rest.remove("vllm")
        per_token = _arms.kv_bytes_per_token(run.model, _DTYPE)
        speed = run.played["vllm"].prefill_tokens_s
        throttle = bandwidth_for_ratio(per_token, speed, _LOAD_OVER_COMPUTE) / 1e9
        print(f"throttle: {throttle:.3f} GB/s makes loads take {_LOAD_OVER_COMPUTE:.1%} of the "
              f"computation at {speed:,.0f} tokens/s")  # fmt: skip
    # An engine takes gigabytes: only small ones are started side by side.
    for group in [rest] if args.short else [[arm] for arm in rest]:
        with run.started(group, throttle, lmcache) as servers:
            for arm, server in servers.items():
                run.play(arm, server)
    return throttle


def _table(told: dict[str, Told]) -> None:
    heads = ("computed", "c/ideal", "resident", "p50 s", "p95 s", "p99 s", "total s", "wrong")
    print("\n" + f"{'':13}" + "".join(f"{head:>10}" for head in heads))
    for name, one in told.items():
        s, resident = one.score, "" if one.resident is None else f"{one.resident:.3f}"
        times = "".join(f"{value:10.2f}" for value in (*one.ttft, s.total_s))
        print(f"{name:13}{s.computed:10,}{s.computed_over_ideal:10.2f}{resident:>10}{times}"
              f"{s.wrong:10}")  # fmt: skip
    for name, one in told.items():
        returning = ", ".join(f"{value:.2f}" for value in one.ttft_returning)
        print(f"{name}: {one.score.by_source}; returning p50, p95, p99 {returning}")


def _ratio(told: dict[str, Told], of: str, to: str, what: str) -> float | None:
    """One arm's figure over another's, None where one of them did not run."""
    if of not in told or to not in told:
        return None
    if what == "computed":
        return told[of].score.computed / told[to].score.computed
    return getattr(told[of], what)[1] / getattr(told[to], what)[1]


def _result(told: dict[str, Told], run: Run, throttle: float) -> dict[str, Any]:
    ours = "kvmem_hints" if "kvmem_hints" in told else "kvmem_events"
    best = told.get(ours)
    return {
        "computed_tokens_vllm_over_kvmem": _ratio(told, "vllm", ours, "computed"),
        "p95_ttft_vllm_over_kvmem": _ratio(told, "vllm", ours, "ttft"),
        "hints_over_events": _ratio(told, "kvmem_events", "kvmem_hints", "ttft"),
        "computed_lru_over_kvmem": _ratio(told, "kvmem_lru", ours, "computed"),
        "computed_lmcache_over_kvmem": _ratio(told, "lmcache", ours, "computed"),
        "computed_events_over_hints": _ratio(told, "kvmem_events", "kvmem_hints", "computed"),
        "p95_ttft_lru_over_kvmem": _ratio(told, "kvmem_lru", ours, "ttft"),
        "p95_ttft_lmcache_over_kvmem": _ratio(told, "lmcache", ours, "ttft"),
        "p95_returning_vllm_over_kvmem": _ratio(told, "vllm", ours, "ttft_returning"),
        "hints_over_events_returning": _ratio(
            told, "kvmem_events", "kvmem_hints", "ttft_returning"
        ),
        "resident_at_arrival": best.resident if best is not None else None,
        "wrong": sum(one.score.wrong for one in told.values()),
        "computed": {name: one.score.computed for name, one in told.items()},
        "ideal": {name: one.score.ideal for name, one in told.items()},
        "prompt_tokens": told["vllm"].score.prompt_tokens,
        "resident": {name: _short(one.resident) for name, one in told.items()},
        "ttft": {name: [_short(t) for t in one.ttft] for name, one in told.items()},
        "ttft_returning": {n: [_short(t) for t in one.ttft_returning] for n, one in told.items()},
        "makespan_s": {name: round(one.score.total_s, 1) for name, one in told.items()},
        "misses_unexplained": {n: told[n].score.misses_unexplained for n in _KVMEM if n in told},
        "preemptions": {name: one.score.preemptions for name, one in told.items()},
        "hints": run.played["kvmem_hints"].hinted.statuses if ours == "kvmem_hints" else {},
        "agents": len(run.team.members),
        "calls": told["vllm"].score.calls,
        "live_bytes": run.budget.live,
        "device_bytes": run.budget.device,
        "host_bytes": run.budget.host,
        "prefill_tokens_s": {n: round(p.prefill_tokens_s) for n, p in run.played.items()},
        "throttle_gb_s": throttle,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def faults(told: dict[str, Told], hinted: dict[str, Hinted]) -> list[str]:
    """Why the figures prove nothing; empty where they may stand."""
    found = [
        f"{name}: {one.score.wrong} outputs differ from vLLM's alone"
        for name, one in told.items()
        if one.score.wrong
    ]
    found += [
        f"{name}: no block was loaded from the host tier"
        for name, one in told.items()
        if name != "vllm" and not one.transferred
    ]
    return found + [f"{name}: {h.failed} hints failed" for name, h in hinted.items() if h.failed]


def _arms_of(args: argparse.Namespace) -> tuple[list[str], Path | None]:
    """The arms to play, and LMCache's Python."""
    arms = [name for name in args.arms.split(",") if name]
    unknown = set(arms) - set(_ARMS)
    if unknown or "vllm" not in arms:
        raise SystemExit(f"--arms: vllm and others of {', '.join(_ARMS)}")
    if "lmcache" not in arms:
        return arms, None
    python = None if args.short else _arms.lmcache_python(args.lmcache_python)
    if args.throttle and python is not None:
        print("LMCache's arm is skipped: its tiers can't be slowed")
        python = None
    elif python is None:
        print("LMCache's arm is skipped: --short, or no .venv-lmcache (`make lmcache`) and no "
              "--lmcache-python")  # fmt: skip
    return [name for name in arms if name != "lmcache" or python is not None], python


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="6 agents with short prompts")
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--turns", type=int, default=10, help="calls of each agent at most")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of each reply")
    parser.add_argument("--device-share", type=float, default=0.25, help="of the live set")
    parser.add_argument("--host-share", type=float, default=0.5, help="of the live set")
    parser.add_argument("--gap-scale", type=float, default=0.25, help="times real agents' waits")
    parser.add_argument("--gap-cap-s", type=float, default=30.0, help="the longest wait")
    parser.add_argument("--start-s", type=float, default=60.0, help="first calls come within that")
    parser.add_argument("--lead-s", type=float, default=1.0, help="a tool's end before the prompt")
    parser.add_argument("--throttle", action="store_true", help="an 8B model's load over compute")
    parser.add_argument("--arms", default=",".join(_ARMS), help="which are played")
    parser.add_argument("--data", type=Path, help="the folder of traces")
    parser.add_argument("--lmcache-python", type=Path, help="a Python with LMCache and vLLM")
    parser.add_argument("--seed", type=int, default=20_261_127)
    parser.add_argument("--calls", type=Path, help="write every call here, one JSON a line")
    args = parser.parse_args()
    if args.short:
        short = {"agents": 6, "turns": 4, "gap_scale": 0.05, "gap_cap_s": 2.0, "start_s": 2.0,
                 "lead_s": 0.2}  # fmt: skip
        vars(args).update(short, device_share=max(args.device_share, 0.35))
    return args


def _team(args: argparse.Namespace, template: Template) -> Team:
    folder = None if args.short else _corpus.trace_folder(args.data)
    if folder is None:
        print("generated agents: --short, or no folder of traces (--data, KVMEM_DATA, "
              "../shared/data)")  # fmt: skip
    return team_of(
        folder,
        agents=args.agents,
        turns=args.turns,
        seed=args.seed,
        gap_scale=args.gap_scale,
        gap_cap_s=args.gap_cap_s,
        start_s=args.start_s,
        max_tokens=args.max_tokens,
        lead_s=args.lead_s,
        fits=lambda messages: len(template.ids(messages)) + args.max_tokens < _POSITIONS,
        size=0.25 if args.short else 1.0,
    )


def main() -> None:
    """Runs the arms and prints the table and the line."""
    args = _arguments()
    exit_on_sigterm()
    arms, python = _arms_of(args)
    model = demo_model.ensure(print)
    template = Template(model)
    team = _team(args, template)
    budget = Budget.of(team, template, model, args)
    print(f"live set {budget.live / 1e6:,.0f} MB; device {budget.device / 1e6:,.0f} MB, "
          f"host {budget.host / 1e6:,.0f} MB; {len(team.members)} agents")  # fmt: skip
    before = shared_memory()
    with (
        tempfile.TemporaryDirectory(prefix="kvmem-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        run = Run(model, team, budget, Path(folder))
        served: tuple[Path, int] | None = None
        if python is not None:
            log = Path(folder) / "lmcache-server.log"
            server = _arms.lmcache_server(python, host_bytes=budget.host, log=log)
            served = (python, stack.enter_context(server))
        throttle = _run(run, args, arms, served)
    told = {name: run.told(name) for name in run.played}
    if args.calls:
        rows = ({"arm": n, **msgspec.to_builtins(c)} for n, p in run.played.items()
                for c in p.calls)  # fmt: skip
        args.calls.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _table(told)
    wrong = faults(told, {name: played.hinted for name, played in run.played.items()})
    finish({**_result(told, run, throttle), "faults": wrong, "left_behind": leftovers(before)})
    if wrong:
        raise SystemExit(f"bench_agents: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
