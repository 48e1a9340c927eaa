"""The scorecard: what does a fleet of agents wait for, and what is computed twice?

    python -m benchmarks.bench_fleet [--short] [--throttle] [--data FOLDER] [--host-share 1] ...

16 agents on real conversations talk to a stock vLLM server through the OpenAI client, with pauses
as real agents' tools make them. The live set is the KV bytes of the longest prompts of all agents
alive (here all live to the end), shared prefixes once; the device and the host tier get shares of
it, by default a quarter and a half, so that what is kept and what is evicted counts. Arms, one
after the other on the same prompts, pauses, device bytes and OpenMP binding:

    vllm      vLLM alone
    kvmem     vLLM with kvmem, host tier of `--host-share`
    lmcache   vLLM with LMCache's server, an L1 of the same bytes, where it is installed

float32, greedy: then a token's KV does not depend on how its prompt was cut, and an output that
differs is wrong. The oracle is vLLM alone; `--oracle ample` is a run of vLLM alone with device
memory for everything.

`--throttle` makes loading as slow, for this model on this machine, as it is for an 8B model on a
GPU: 32k tokens take 2.0 s to compute and 78 ms to load over PCIe, so a token's load may take 3.9 %
of its computation, which is measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import _arms, _corpus
from benchmarks._arms import BLOCK_TOKENS
from benchmarks._fleet import Call, Load, Score, Server, Template, play, score, wait_ready
from benchmarks._math import bandwidth_for_ratio, live_set_blocks
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import finish
from kvmem.demo import model as demo_model

__all__: list[str] = []

_DTYPE = "float32"
_LOAD_OVER_COMPUTE = 0.078 / 2.0  # Llama-3-8B, 32k tokens: load at 55 GB/s over recompute
_WARM_UP_TOKENS = 1_500


class Budget(msgspec.Struct, frozen=True):
    """Bytes of each place, and of the live set they are shares of."""

    live: int
    device: int
    host: int
    max_model_len: int

    @classmethod
    def of(cls, load: Load, model: Path, args: argparse.Namespace) -> Budget:
        """The budgets of a fleet.

        Raises:
            SystemExit: the device's share can't hold the longest request.
        """
        template = Template(model)
        prompts = [template.ids(messages) for a in load.agents for messages in a.turns[-1:]]
        block = _arms.kv_bytes_per_token(model, _DTYPE) * BLOCK_TOKENS
        live = live_set_blocks(prompts, BLOCK_TOKENS) * block
        longest = -(-(max(map(len, prompts)) + load.max_tokens) // BLOCK_TOKENS)
        device = int(args.device_share * live) // block
        if device < longest + 1:
            raise SystemExit(
                f"--device-share {args.device_share} is {device} blocks; the longest request "
                f"needs {longest} and vLLM one more: give at least "
                f"{(longest + 1) * block / live + 0.005:.2f}"
            )
        host = max(1, int(args.host_share * live) // block)
        return cls(
            live=live,
            device=device * block,
            host=host * block,
            max_model_len=longest * BLOCK_TOKENS,
        )


class Arm(msgspec.Struct, frozen=True):
    """One way of serving the fleet."""

    name: str
    device_bytes: int
    transfer: dict[str, Any] | None = None
    python: Path | None = None


def _load(args: argparse.Namespace) -> Load:
    if args.short:
        agents = _corpus.generated(agents=4, turns=3, seed=args.seed, size=0.25)
        print("short: 4 generated agents")
    else:
        folder = _corpus.trace_folder(args.data)
        if folder is None:
            print("no folder of traces (--data, KVMEM_DATA, ../shared/data): generated agents")
        agents = _corpus.fleet(folder, agents=args.agents, turns=args.turns, seed=args.seed)
    return Load(
        agents=agents,
        max_tokens=args.max_tokens,
        gap_scale=0.05 if args.short else args.gap_scale,
        gap_cap_s=1.0 if args.short else args.gap_cap_s,
        seed=args.seed,
    )


def _warm_up_prompts(model: Path, at_most: int) -> list[list[int]]:
    """Prompts that no agent sends; the first one warms up."""
    n = min(_WARM_UP_TOKENS, at_most)
    ids = Template(model).encode(_corpus.real_text(750_000)[700_000:])
    return [ids[start : start + n] for start in range(0, 3 * n, n)]


def _arms_of(
    args: argparse.Namespace, budget: Budget, throttle_gb_s: float, lmcache: tuple[Path, int] | None
) -> list[Arm]:
    settings: dict[str, Any] = {"host_gb": budget.host / 2**30}
    if throttle_gb_s:
        settings["throttle_gb_s"] = throttle_gb_s
    arms = [Arm("kvmem", budget.device, transfer=_arms.kvmem_transfer(settings))]
    if lmcache is not None:
        python, port = lmcache
        arms.append(Arm("lmcache", budget.device, _arms.lmcache_transfer(port), python))
    if args.oracle == "ample":
        arms.append(Arm("ample", 2 * budget.live))
    return arms


class Run:
    """Starts servers, plays the fleet on each and keeps what came back."""

    def __init__(self, model: Path, load: Load, budget: Budget, folder: Path) -> None:
        self.model = model
        self.load = load
        self.budget = budget
        self.folder = folder
        self.calls: dict[str, list[Call]] = {}
        self.counters: dict[str, dict[str, float]] = {}
        self.prefill_tokens_s: dict[str, float] = {}

    @contextlib.contextmanager
    def started(self, arms: Sequence[Arm]) -> Iterator[dict[str, Server]]:
        """The arms' servers, started side by side; none works yet."""
        with contextlib.ExitStack() as stack:
            servers = {arm.name: stack.enter_context(self._server(arm)) for arm in arms}
            wait_ready(list(servers.values()))
            print(f"  ready: {', '.join(servers)}", flush=True)
            yield servers

    def warm_up(self, name: str, server: Server) -> None:
        """Prompts of their own, before the fleet; the best one's speed is kept."""
        prompts = _warm_up_prompts(self.model, self.budget.max_model_len - 1)
        server.settle()
        self.prefill_tokens_s[name] = server.prefill_tokens_s(prompts)

    def play(self, name: str, server: Server) -> None:
        """The fleet on one arm."""
        server.settle()
        before = server.counters()
        self.calls[name] = play(server, self.load)
        server.settle()
        after = server.counters()
        self.counters[name] = {key: value - before.get(key, 0.0) for key, value in after.items()}
        seconds = max(call.done_s for call in self.calls[name])
        print(f"  {name}: {len(self.calls[name])} calls in {seconds:.1f} s", flush=True)

    def _server(self, arm: Arm) -> Server:
        return Server(
            self.model,
            dtype=_DTYPE,
            device_bytes=arm.device_bytes,
            max_model_len=self.budget.max_model_len,
            transfer=arm.transfer,
            log=self.folder / f"{arm.name}.log",
            python=arm.python,
        )

    def scores(self, oracle: str) -> dict[str, Score]:
        """Every arm's score against the oracle's outputs."""
        return {
            name: score(calls, self.calls[oracle], self.counters[name], block_tokens=BLOCK_TOKENS)
            for name, calls in self.calls.items()
        }


def _run(run: Run, args: argparse.Namespace, lmcache: tuple[Path, int] | None) -> float:
    """Plays every arm; the throttle in GB/s, 0 for none."""
    alone = Arm("vllm", run.budget.device)
    if not args.throttle:
        with run.started([alone, *_arms_of(args, run.budget, 0.0, lmcache)]) as servers:
            for name, server in servers.items():
                run.warm_up(name, server)
                run.play(name, server)
        return 0.0
    with run.started([alone]) as servers:
        run.warm_up("vllm", servers["vllm"])
        run.play("vllm", servers["vllm"])
    per_token = _arms.kv_bytes_per_token(run.model, _DTYPE)
    speed = run.prefill_tokens_s["vllm"]
    throttle = bandwidth_for_ratio(per_token, speed, _LOAD_OVER_COMPUTE) / 1e9
    print(
        f"throttle: {speed:,.0f} tokens/s computed here, {per_token:,} bytes a token: "
        f"{throttle:.3f} GB/s makes a load take {_LOAD_OVER_COMPUTE:.1%} of the computation"
    )
    with run.started(_arms_of(args, run.budget, throttle, None)) as servers:
        for name, server in servers.items():
            run.warm_up(name, server)
            run.play(name, server)
    return throttle


def _table(scores: dict[str, Score]) -> None:
    heads = ("calls", "prompt", "computed", "ideal", "c/i", "p50 s", "p95 s", "total s", "wrong")
    print("\n" + f"{'':9}" + "".join(f"{head:>10}" for head in heads))
    for name, s in scores.items():
        counts = f"{s.calls:10}{s.prompt_tokens:10,}{s.computed:10,}{s.ideal:10,}"
        times = (
            f"{s.computed_over_ideal:10.2f}{s.ttft_p50:10.2f}{s.ttft_p95:10.2f}{s.total_s:10.1f}"
        )
        print(f"{name:9}{counts}{times}{s.wrong:10}")
    for name, s in scores.items():
        print(f"{name}: prompt tokens by source {s.by_source}, preemptions {s.preemptions}")


def _result(scores: dict[str, Score], run: Run, throttle: float) -> dict[str, Any]:
    ours = scores["kvmem"]
    return {
        "computed_over_ideal": ours.computed_over_ideal,
        "ttft_p50": {name: round(s.ttft_p50, 3) for name, s in scores.items()},
        "ttft_p95": {name: round(s.ttft_p95, 3) for name, s in scores.items()},
        "wrong": ours.wrong,
        "misses_unexplained": ours.misses_unexplained,
        "computed_over_ideal_by_arm": {
            name: round(s.computed_over_ideal, 3) for name, s in scores.items()
        },
        "wrong_by_arm": {name: s.wrong for name, s in scores.items()},
        "total_s": {name: round(s.total_s, 1) for name, s in scores.items()},
        "preemptions": {name: s.preemptions for name, s in scores.items()},
        "agents": len(run.load.agents),
        "calls": ours.calls,
        "live_bytes": run.budget.live,
        "device_bytes": run.budget.device,
        "host_bytes": run.budget.host,
        "prefill_tokens_s": {n: round(v) for n, v in run.prefill_tokens_s.items()},
        "throttle_gb_s": throttle,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="4 agents with short prompts")
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3, help="calls of each agent")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of each reply")
    parser.add_argument("--device-share", type=float, default=None, help="of the live set (0.25)")
    parser.add_argument("--host-share", type=float, default=0.5, help="of the live set")
    parser.add_argument("--gap-scale", type=float, default=0.1, help="times real agents' gaps")
    parser.add_argument("--gap-cap-s", type=float, default=10.0, help="the longest gap")
    parser.add_argument("--throttle", action="store_true", help="an 8B model's load over compute")
    parser.add_argument("--oracle", choices=("alone", "ample"), default="alone")
    parser.add_argument("--data", type=Path, help="the folder of traces")
    parser.add_argument("--lmcache-python", type=Path, help="a Python with LMCache and vLLM")
    parser.add_argument("--no-lmcache", action="store_true", help="leave LMCache out")
    parser.add_argument("--seed", type=int, default=20_261_123)
    parser.add_argument("--calls", type=Path, help="write every call here, one JSON a line")
    args = parser.parse_args()
    if args.device_share is None:
        args.device_share = 0.5 if args.short else 0.25
    return args


def main() -> None:
    """Runs the arms and prints the table and the line."""
    args = _arguments()
    exit_on_sigterm()
    model = demo_model.ensure(print)
    load = _load(args)
    budget = Budget.of(load, model, args)
    print(
        f"live set {budget.live / 1e6:,.0f} MB; device {budget.device / 1e6:,.0f} MB, "
        f"host {budget.host / 1e6:,.0f} MB"
    )
    lmcache = None if args.no_lmcache or args.short else _arms.lmcache_python(args.lmcache_python)
    if lmcache is None:
        print("LMCache's arm is skipped: no .venv-lmcache and no --lmcache-python, or not wanted")
    elif args.throttle:
        print("LMCache's arm is skipped: its tiers can't be slowed")
        lmcache = None
    before = shared_memory()
    with (
        tempfile.TemporaryDirectory(prefix="kvmem-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        run = Run(model, load, budget, Path(folder))
        served: tuple[Path, int] | None = None
        if lmcache is not None:
            log = Path(folder) / "lmcache-server.log"
            server = _arms.lmcache_server(lmcache, host_bytes=budget.host, log=log)
            served = (lmcache, stack.enter_context(server))
        throttle = _run(run, args, served)
    scores = run.scores("ample" if args.oracle == "ample" else "vllm")
    if args.calls:
        lines = ({"arm": n, **msgspec.to_builtins(c)} for n, cs in run.calls.items() for c in cs)
        args.calls.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _table(scores)
    finish({**_result(scores, run, throttle), "left_behind": leftovers(before)})


if __name__ == "__main__":
    main()
