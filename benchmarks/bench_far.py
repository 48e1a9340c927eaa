"""How near do far stores come to their own clients, what is a far hit worth, and what do faults do?

    python -m benchmarks.bench_far [--short] [--faults]

Moves: blocks between an arena's slots and a store, against the store's own client that moves the
same bytes: as many values of the same size, in chunks as large, over as many connections, in the
same process and the same rounds. Ours besides asks which are there already, takes and compares the
checksums of all bytes on both ways, and puts them into slots. Latency: from asking for one block
until it is in its slot, and for one batch of 1,000 names.

First token: an engine with the demo's model answers a prompt of real text and ends; another one,
with an empty host and no disk, has it from the store, and is compared with a prompt that nobody has
seen.

Faults (alone with --faults): two hosts store and ask while a real server is killed, restarted,
stopped, slowed and filled, and while its values are garbage or each other's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks import _arms, _far_faults
from benchmarks._arms import BLOCK_TOKENS, Engine
from benchmarks._disk import NAMESPACE, key_of
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._redis import RedisServer, cluster
from benchmarks._report import Row, finish, paired, table
from benchmarks.bench_ttft import Prompts, native_dtype
from kvmem import events
from kvmem._core import SlotShares, xxh3_64
from kvmem.demo import model as demo_model
from kvmem.store import Arena
from kvmem.store.far import Far, check_url
from kvmem.store.far.tier import BATCH_BYTES, THREADS
from kvmem.types import Move, Moved

__all__: list[str] = []

SIZES = {"64kib": (64 << 10, 512), "1mib": (1 << 20, 48)}
NAMES = 1000
WAIT_S = 30.0


class Rig:
    """An arena full of blocks above a far store, and the same bytes for the store's own client."""

    def __init__(self, url: str, block_bytes: int, n: int) -> None:
        self.n, self.block_bytes = n, block_bytes
        self.arena = Arena.create(
            "bench-far", n_slots=n, slot_bytes=block_bytes, namespace=NAMESPACE, label="benchmark"
        )
        shares = SlotShares(np.frombuffer(self.arena.buffer, np.uint8))
        draw = np.random.default_rng(1)
        self.blocks = [draw.integers(0, 256, block_bytes, np.uint8) for _ in range(n)]
        self.keys = [key_of(i) for i in range(n)]
        self.generations = [1] * n
        for i, block in enumerate(self.blocks):
            sums = np.array([xxh3_64(block)], np.uint64)
            if shares.put(i, 1, 0, self.keys[i], block, sums):
                raise RuntimeError("a block was not stored")
        self.far = Far(check_url(url, {}), self.arena, NAMESPACE, events.Bus())
        self.own = _OwnClient(url, [block.tobytes() for block in self.blocks])
        while not self.far.on:
            if self.far._trial is None:
                raise RuntimeError("the store does not work")
            self.far._trial.result(WAIT_S)

    def move(self, numbers: Sequence[int], *, write: bool) -> None:
        """Block i of its slot to the store, anew, or from the store into its slot."""
        waiting, under_way = list(reversed(numbers)), 0
        if not write:
            for i in numbers:
                self.generations[i] += 1
        while waiting or under_way:
            while waiting:
                i = waiting[-1]
                move = Move(i, 0, self.keys[i], i, self.generations[i], 0, 0)
                if not (self.far.write(move, force=True) if write else self.far.read(move)):
                    break  # the queue is full
                waiting.pop()
                under_way += 1
            self.far.wait(WAIT_S, under_way if not waiting else 1)
            for moved in self.far.poll():
                if not isinstance(moved, Moved) or moved.fault:
                    raise RuntimeError(f"a block did not move: {moved}")
                under_way -= 1

    def probe(self, keys: list[bytes]) -> None:
        """Which of them are there."""
        if not self.far.probe(0, 0, keys):
            raise RuntimeError("the queue is full")
        self.far.wait(WAIT_S)
        self.far.poll()

    def check(self) -> None:
        """Every slot has its block."""
        data = np.frombuffer(self.arena.buffer, np.uint8)
        for i, block in enumerate(self.blocks):
            at = self.arena.data_of(i)
            if not np.array_equal(data[at : at + self.block_bytes], block):
                raise RuntimeError(f"block {i} came back changed")

    def close(self) -> None:
        self.far.close()
        self.own.close()
        self.arena.close(unlink=True)


class _OwnClient:
    """redis-py moving the same values, over as many connections and in chunks as large."""

    def __init__(self, url: str, values: list[bytes]) -> None:
        made = redis.RedisCluster if "+cluster" in url else redis.Redis
        self._client = made.from_url(url.replace("+cluster", ""))
        self._values = values
        self._names = [b"own:%d" % i for i in range(len(values))]
        each = max(1, BATCH_BYTES // len(values[0]))
        each = min(each, -(-len(values) // THREADS))
        starts = range(0, len(values), each)
        self._chunks = [range(at, min(at + each, len(values))) for at in starts]
        self._threads = ThreadPoolExecutor(THREADS)

    def put(self) -> None:
        list(self._threads.map(self._put, self._chunks))

    def get(self) -> None:
        list(self._threads.map(self._get, self._chunks))

    def _put(self, chunk: range) -> None:
        pipe = self._client.pipeline(transaction=False)
        for i in chunk:
            pipe.set(self._names[i], self._values[i])
        pipe.execute()

    def _get(self, chunk: range) -> None:
        pipe = self._client.pipeline(transaction=False)
        for i in chunk:
            pipe.get(self._names[i])
        if any(len(one) != len(self._values[0]) for one in pipe.execute()):
            raise RuntimeError("a value is gone")

    def get_one(self) -> None:
        self._client.get(self._names[0])

    def exists(self, names: list[bytes]) -> None:
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.exists(name)
        pipe.execute()

    def close(self) -> None:
        self._threads.shutdown()
        self._client.close()


@contextmanager
def _single(folder: Path) -> Iterator[str]:
    server = RedisServer(folder)
    try:
        yield server.url
    finally:
        server.close()


@contextmanager
def _cluster(folder: Path) -> Iterator[str]:
    with cluster(folder) as nodes:
        yield nodes[0].url.replace("redis://", "redis+cluster://")


BACK_ENDS: dict[str, Callable[[Path], Any]] = {"redis": _single, "cluster": _cluster}


def moves(folder: Path, rounds: int) -> dict[str, float]:
    """GB/s and latencies of each back end, ours and its own client's."""
    result: dict[str, float] = {}
    ratios, cpu, rows = [], [], []
    for name, back_end in BACK_ENDS.items():
        for size, (block_bytes, n) in SIZES.items():
            own_folder = folder / f"{name}-{size}"
            own_folder.mkdir()
            with back_end(own_folder) as url:
                rig = Rig(url, block_bytes, n)
                try:
                    for what, row in _of(rig, rounds).items():
                        rows.append(Row.of(f"{name} {size} {what}", row, ours="ours",
                                           theirs="own client", unit="ms"))  # fmt: skip
                        ours = statistics.median(row["ours"])
                        if what.endswith("CPU"):
                            cpu.append(rows[-1].ratio)
                        elif what in ("put", "get"):
                            ratios.append(rows[-1].ratio)
                            result[f"{name}_{what}_{size}_gb_s"] = n * block_bytes / ours / 1e9
                        else:
                            result[f"{name}_{what}_{size}_ms"] = ours * 1e3
                    rig.check()
                finally:
                    rig.close()
    print(table(rows))
    return {"worst_vs_own_client": min(ratios), "worst_cpu_vs_own_client": min(cpu), **result}


def _of(rig: Rig, rounds: int) -> dict[str, dict[str, list[float]]]:
    every = range(rig.n)
    names = [key_of(1 << 20 | i) for i in range(NAMES)]
    put = {"ours": lambda: rig.move(every, write=True), "own client": rig.own.put}
    get = {"ours": lambda: rig.move(every, write=False), "own client": rig.own.get}
    return {
        "put": paired(put, rounds),
        "get": paired(get, rounds),
        # What other programs do to a machine shows less in them; the server's is not in them.
        "put CPU": paired(put, rounds, clock=time.process_time),
        "get CPU": paired(get, rounds, clock=time.process_time),
        "one": paired(
            {"ours": lambda: rig.move([0], write=False), "own client": rig.own.get_one}, 4 * rounds
        ),
        "probe": paired(
            {"ours": lambda: rig.probe(names), "own client": lambda: rig.own.exists(names)}, rounds
        ),
    }


def first_token(model: Path, folder: Path, length: int, rounds: int) -> dict[str, float]:
    """Seconds to the first token: cold, and of a prompt that only the store has."""
    prompts = Prompts(model, (2 * rounds + 3) * length)
    whole = (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    old = [prompts.take(length) for _ in range(rounds)]
    warm_up = prompts.take(200)
    found: dict[str, list[float]] = {"cold": [], "far": []}
    (folder / "server").mkdir()
    with _single(folder / "server") as url:
        settings: dict[str, Any] = {
            "model": str(model), "dtype": native_dtype(), "block_size": BLOCK_TOKENS,
            "max_model_len": 8_192, "kv_cache_memory_bytes": 1 << 30, "enforce_eager": True,
            "disable_log_stats": False,
            "kv_transfer_config": _arms.kvmem_transfer({"host_gb": 1.0, "far": url}),
        }  # fmt: skip
        with Engine(Path(sys.executable), settings, log=folder / "before.log") as engine:
            engine.wait_ready()
            engine.generate(warm_up)
            tokens = [engine.generate(prompt).token for prompt in old]
            engine.settle()
            _until_stored(url, rounds * whole // BLOCK_TOKENS)
        with Engine(Path(sys.executable), settings, log=folder / "after.log") as engine:
            engine.wait_ready()
            engine.generate(prompts.take(200))
            for prompt, token in zip(old, tokens, strict=True):
                hit = engine.generate(prompt)
                told = (hit.report or {})["kvmem"]["tokens"]
                if told["far"] != whole or hit.token != token:
                    raise RuntimeError(f"{whole} tokens should have come from far: {hit}")
                found["far"].append(hit.ttft_s)
                found["cold"].append(engine.generate(prompts.take(length)).ttft_s)
    cold, far = (statistics.median(found[what]) for what in ("cold", "far"))
    print(f"{length:,} tokens: cold {cold * 1e3:.0f} ms, far {far * 1e3:.0f} ms")
    return {"cold_vs_far_ttft": cold / far, "far_ttft_s": far}


def _until_stored(url: str, n_blocks: int) -> None:
    until = time.monotonic() + WAIT_S
    with redis.Redis.from_url(url) as client:
        while client.dbsize() < n_blocks:
            if time.monotonic() > until:
                raise RuntimeError("the blocks did not get to the store")
            time.sleep(0.2)


def main() -> None:
    """Prints the table and the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds, a shorter prompt")
    parser.add_argument("--faults", action="store_true", help="faults only")
    args = parser.parse_args()
    exit_on_sigterm()
    before, result = shared_memory(), {}
    with tempfile.TemporaryDirectory(prefix="kvmem-far-") as name:
        folder = Path(name)
        if not args.faults:
            result |= moves(folder, rounds=5 if args.short else 15)
            result |= first_token(
                demo_model.ensure(print), folder, 1_000 if args.short else 6_000,
                rounds=2 if args.short else 5,
            )  # fmt: skip
        (folder / "faults").mkdir()
        found = _far_faults.run(folder / "faults", rounds=5 if args.short else 50)
    print(f"faults: {found.done}")
    finish(
        {
            **result,
            "wrong": found.wrong,
            "engine_failures": found.failures,
            "leaked_slots": found.leaked,
            "faults": sum(found.done.values()),
            "faults_seen": found.seen,
            "answered_blocks": found.answered,
            "left_behind": leftovers(before),
        }
    )


if __name__ == "__main__":
    main()
