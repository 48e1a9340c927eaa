"""What do a hundred engines find in their nodes and in a far store, and what has each shard to do?

    python -m benchmarks.bench_scale [--short] [--data FOLDER]

A simulation, no measurement: the real sessions of weka_a with their times, 400 at once, on 100
engines in hosts of eight that share a node each, and one store in shards below. A host keeps
prompts whole from their beginning and lets the one go that was used least lately; the store keeps
all. Three ways to send a request to a host: any, the session's own, and the one that has the most
of the prompt (`kvmem where`) unless it has more to do than twice the mean. docs/scale.md has the
sums beside it.
"""

from __future__ import annotations

import argparse
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._corpus import trace_folder
from benchmarks._report import finish
from kvmem.explain.replay import Forest, Prompt
from kvmem.explain.replay.arrange import poisson
from kvmem.explain.replay.traces import read_trace

__all__: list[str] = []

ENGINES, ENGINES_A_HOST, ACTIVE = 100, 8, 400
KV_BYTES = 128 << 10  # a token's, of a model with 32 layers and 8 heads of 128 in bfloat16
HOST_BYTES = 512 << 30
SHARDS = 16
SEED = 20_261_127
BUSY = 2.0
FORGET_S = 60.0  # how fast a host's past work stops counting


class Host:
    """A node: runs of blocks, each below the one before it in a path."""

    def __init__(self, capacity: int, sizes: list[int]) -> None:
        self._capacity, self._sizes = capacity, sizes
        self._runs: OrderedDict[int, None] = OrderedDict()
        self.used = 0
        self.work, self._at_s = 0.0, 0.0

    def match(self, path: tuple[int, ...]) -> int:
        """How many of the path's runs are here, from its beginning."""
        for i, run in enumerate(path):
            if run not in self._runs:
                return i
        return len(path)

    def use(self, path: tuple[int, ...]) -> None:
        """The whole path is here now; its beginning leaves last (I2)."""
        for run in reversed(path):
            if run not in self._runs:
                self.used += self._sizes[run]
            self._runs[run] = None
            self._runs.move_to_end(run)
        while self.used > self._capacity and self._runs:
            run, _ = self._runs.popitem(last=False)
            self.used -= self._sizes[run]

    def does(self, blocks: int, now_s: float) -> None:
        """It computes so many blocks."""
        self.work = self.load(now_s) + blocks
        self._at_s = now_s

    def load(self, now_s: float) -> float:
        """Blocks that it computed lately."""
        return float(self.work * 0.5 ** ((now_s - self._at_s) / FORGET_S))


def route(
    how: str, prompt: Prompt, path: tuple[int, ...], hosts: list[Host], draw: random.Random
) -> Host:
    """Which host gets the request."""
    if how == "any":
        return draw.choice(hosts)
    own = hosts[hash_of(prompt.agent) % len(hosts)]
    if how == "session":
        return own
    mean = sum(host.load(prompt.at_s) for host in hosts) / len(hosts)
    free = [host for host in hosts if host.load(prompt.at_s) <= BUSY * mean] or hosts
    best = max(free, key=lambda host: (host.match(path), -host.load(prompt.at_s)))
    return best if best.match(path) or own not in free else own


def hash_of(agent: str) -> int:
    """The session's, whoever of its agents asks; the same in every run."""
    return int.from_bytes(agent.partition("/")[0].encode()[-6:], "big") * 2654435761 % 2**32


def simulate(how: str, prompts: list[Prompt], forest: Forest, block_tokens: int) -> dict[str, Any]:
    """One way to route; shares of all prompt blocks, and what the shards have to do."""
    block_bytes = KV_BYTES * block_tokens
    n_hosts = -(-ENGINES // ENGINES_A_HOST)
    hosts = [Host(HOST_BYTES // block_bytes, forest.sizes) for _ in range(n_hosts)]
    draw, spread = random.Random(SEED), np.random.default_rng(SEED)
    far: set[int] = set()
    asked = host_hits = far_hits = 0
    gets, puts, lookups = (np.zeros(SHARDS, np.int64) for _ in range(3))
    moved: dict[int, int] = {}
    even = np.full(SHARDS, 1 / SHARDS)
    for prompt, path in zip(prompts, forest.paths, strict=True):
        sizes = [forest.sizes[run] for run in path]
        host = route(how, prompt, path, hosts, draw)
        n = host.match(path)
        more = n
        while more < len(path) and path[more] in far:
            more += 1
        asked += sum(sizes)
        host_hits += sum(sizes[:n])
        found, new = sum(sizes[n:more]), sum(sizes[more:])
        far_hits += found
        # A block's shard is its key's: each is asked for its own of the blocks that are not here.
        lookups += spread.multinomial(sum(sizes[n:]), even)
        gets += spread.multinomial(found, even)
        puts += spread.multinomial(new, even)
        far.update(path)
        host.use(path)
        host.does(new, prompt.at_s)
        minute = int((prompt.at_s - prompts[0].at_s) / 60)
        moved[minute] = moved.get(minute, 0) + found + new
    seconds = prompts[-1].at_s - prompts[0].at_s
    busiest = np.percentile(np.array(list(moved.values()), float), 99) * block_bytes / 60 / 1e9
    loads = np.array([host.used for host in hosts], float)
    return {
        f"{how}_host_hit_rate": host_hits / asked,
        f"{how}_with_far_hit_rate": (host_hits + far_hits) / asked,
        f"{how}_shard_get_gb_s": float(gets.mean()) * block_bytes / seconds / 1e9,
        f"{how}_shard_put_gb_s": float(puts.mean()) * block_bytes / seconds / 1e9,
        f"{how}_shard_lookups_s": float(lookups.mean()) / seconds,
        f"{how}_busy_minute_gb_s": float(busiest),
        f"{how}_shard_worst_vs_mean": float((gets + puts).max() / max(1.0, (gets + puts).mean())),
        f"{how}_host_fullest_vs_mean": float(loads.max() / max(1.0, loads.mean())),
    }


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a quarter of the sessions")
    parser.add_argument("--data", type=Path, help="the folder with weka_a.jsonl.gz")
    args = parser.parse_args()
    folder = trace_folder(args.data)
    if folder is None:
        raise SystemExit("There are no traces: give their folder by --data or KVMEM_DATA.")
    trace = read_trace(folder / "weka_a.jsonl.gz")
    calls = trace.calls
    if args.short:
        names = list(dict.fromkeys(call.session for call in calls))
        kept = set(names[: len(names) // 4])
        calls = [call for call in calls if call.session in kept]
    prompts = poisson(calls, ACTIVE, seed=SEED)
    forest = Forest(prompt.keys for prompt in prompts)
    result: dict[str, Any] = {}
    for how in ("any", "session", "where"):
        result |= simulate(how, prompts, forest, trace.block_tokens)
    finish(
        {
            **result,
            "engines": ENGINES,
            "hosts": -(-ENGINES // ENGINES_A_HOST),
            "shards": SHARDS,
            "calls": len(prompts),
            "distinct_tib": forest.n_distinct * KV_BYTES * trace.block_tokens / 2**40,
            "hours": (prompts[-1].at_s - prompts[0].at_s) / 3600,
        }
    )


if __name__ == "__main__":
    main()
