"""What does an engine pay for sharing its cache with others, through a node?

    python -m benchmarks.bench_node [--short]

A question is a prompt of 1,000 blocks, found whole and leased, all its keys sent: over the socket
of a node in a process of its own, and in the same rounds of a cache in this process. Questions
follow one another as in a step of a busy scheduler; then once more with a pause before each, when
both sides have gone to sleep.

Blocks are stored and loaded, their bytes copied and checksummed, over the node's shared memory and
over an arena of this process's own, in turns.

Two engines then get the same new prompts at the same moments, and each block that is stored is
counted: one flight computes, the other waits for it.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks._node import GROUPS, NAMESPACE, Device, chain, fork, serve, until
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import Row, finish, paired, table
from kvmem.cache import Cache
from kvmem.node import Link, NodeCache, Settings
from kvmem.node.attaching import hello_of
from kvmem.store import Arena

__all__: list[str] = []

BLOCKS = 1000
PROMPTS = 20
PAUSE_S = 0.003
BLOCK_BYTES, MOVED = 256 << 10, 128
SMALL_BYTES = 1 << 10
TOKENS = GROUPS[0].block_tokens


@contextmanager
def node(host_gb: float) -> Iterator[Path]:
    """A node in a process of its own; its folder."""
    with tempfile.TemporaryDirectory(prefix="kvmem-node-") as name:
        settings = Settings(path=Path(name), host_gb=host_gb, scrub_mb_s=0.0)
        pid = fork(lambda: serve(settings))
        try:
            if not until((Path(name) / "node.sock").exists, 30.0):
                raise RuntimeError("the node did not start")
            yield Path(name)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def client(folder: Path, block_bytes: int) -> NodeCache:
    """An engine's client."""
    return NodeCache(
        folder,
        hello_of(
            namespace=NAMESPACE, slot_bytes=block_bytes, ranks=1, groups=GROUPS, label="bench"
        ),
    )


def fill(cache: Any, chains: list[list[bytes]]) -> None:
    """Stores these prompts, without any bytes."""
    for at, keys in enumerate(chains):
        room = cache.reserve(f"fill{at}", 0, keys, range(len(keys)))
        sums = np.ones(len(room.slots), np.uint64)
        if cache.publish(room.slots, room.generations, sums) != len(keys):
            raise RuntimeError("there is no room for the prompts")
        cache.release(f"fill{at}")


def ask(cache: Any, chains: list[list[bytes]], n: int, pause_s: float) -> list[float]:
    """Seconds from the question to the lease, of n prompts one after the other."""
    found = []
    for i in range(n):
        keys = chains[i % len(chains)]
        if pause_s:
            time.sleep(pause_s)
        begun = time.perf_counter()
        grant = cache.acquire(f"r{i}", [keys], start=0, limit=BLOCKS * TOKENS)
        found.append(time.perf_counter() - begun)
        if grant.n_blocks != BLOCKS:
            raise RuntimeError(f"{grant.n_blocks} of {BLOCKS} blocks were found")
        cache.release(f"r{i}")
    return found


def round_trips(rounds: int) -> dict[str, float]:
    """Microseconds of a question."""
    chains = [chain(seed, BLOCKS) for seed in range(PROMPTS)]
    n_slots = (PROMPTS + 1) * BLOCKS
    own = Cache(n_slots, GROUPS)
    with node(n_slots * (SMALL_BYTES + 128) / 2**30 + 0.01) as folder:
        shared = client(folder, SMALL_BYTES)
        for cache in (own, shared):
            fill(cache, chains)
            ask(cache, chains, 200, 0.0)
        found: dict[str, list[float]] = {"own": [], "node": [], "idle": []}
        for _ in range(rounds):
            found["own"] += ask(own, chains, 100, 0.0)
            found["node"] += ask(shared, chains, 100, 0.0)
            found["idle"] += ask(shared, chains, 20, PAUSE_S)
        shared.close()
    us = {name: np.array(seconds) * 1e6 for name, seconds in found.items()}
    return {
        "round_trip_p50_us": float(np.percentile(us["node"], 50)),
        "round_trip_p99_us": float(np.percentile(us["node"], 99)),
        "in_process_p50_us": float(np.percentile(us["own"], 50)),
        "in_process_p99_us": float(np.percentile(us["own"], 99)),
        "after_a_pause_p50_us": float(np.percentile(us["idle"], 50)),
        "after_a_pause_p99_us": float(np.percentile(us["idle"], 99)),
    }


class Mover:
    """Stores and loads blocks as a connector's two halves do, in one process."""

    def __init__(self, cache: Any, arena: Arena, device: Device) -> None:
        self.cache = cache
        self.copier = device.copier(arena.buffer)
        self.ids = np.arange(MOVED, dtype=np.int32)
        self.seed = 1 << 20
        self.number = 0

    def store(self) -> None:
        """A prompt that is not there."""
        self.seed += 1
        keys = self.keys = chain(self.seed, MOVED)
        request = f"s{self.seed}"
        begun = self.cache.acquire(request, [keys], start=0, limit=MOVED * TOKENS)
        room = self.cache.reserve(request, 0, keys, range(MOVED))
        status, sums = self.copier.store(self.ids, room.slots, room.generations, b"".join(keys))
        n = self.cache.publish(room.slots, room.generations, sums)
        self.cache.hold(request, 0, keys, MOVED)
        self.cache.release(request)
        if n != MOVED or status.any() or begun.n_blocks:
            raise RuntimeError(f"{n} of {MOVED} blocks were stored")

    def load(self) -> None:
        """The one that was stored last."""
        self.number += 1
        request = f"l{self.number}"
        (part,) = self.cache.acquire(request, [self.keys], start=0, limit=MOVED * TOKENS).parts
        status = self.copier.load(
            self.ids, part.slots, part.generations, b"".join(self.keys), np.ones(MOVED, np.uint8)
        )
        self.cache.release(request)
        if status.any():
            raise RuntimeError("a block did not come back as it was")


def throughput(rounds: int) -> dict[str, float]:
    """Bytes a second through the node over those in this process."""
    n_slots = 4 * MOVED
    device = Device(MOVED, BLOCK_BYTES)
    device.blocks[:] = np.random.default_rng(1).integers(0, 256, device.blocks.shape, np.uint8)
    arena = Arena.create(
        f"bench-{os.getpid()}", n_slots=n_slots, slot_bytes=BLOCK_BYTES, namespace=NAMESPACE
    )
    try:
        own = Mover(Cache(n_slots, GROUPS), arena, device)
        with node(n_slots * (BLOCK_BYTES + 128) / 2**30 + 0.01) as folder:
            cache = client(folder, BLOCK_BYTES)
            like = msgspec.structs.replace(
                hello_of(namespace=NAMESPACE, slot_bytes=BLOCK_BYTES, ranks=1, groups=GROUPS,
                         label=""),
                role="worker", token=cache.attachment.token,
            )  # fmt: skip
            link = Link(folder, like, lambda: None)
            shared = Mover(cache, link.arena, device)
            found, cpu = {}, {}
            for what in ("store", "load"):
                arms: dict[str, Callable[[], None]] = {
                    "in process": getattr(own, what), "node": getattr(shared, what),
                }  # fmt: skip
                found[what] = paired(arms, rounds, warm_up=4)
                cpu[what] = paired(arms, rounds, clock=time.thread_time)
            shared.copier = None  # type: ignore[assignment] the memory goes with it
            link.close()
            cache.close()
    finally:
        arena.close(unlink=True)
    result = {}
    rows = [
        Row.of(what, seconds, ours="node", theirs="in process", unit="ms")
        for what, seconds in found.items()
    ]
    print(table(rows))
    for row in rows:
        result[f"{row.name}_gb_s"] = MOVED * BLOCK_BYTES / 1e6 / row.ours
        result[f"{row.name}_vs_in_process"] = row.ratio
        result[f"{row.name}_cpu_vs_in_process"] = Row.of(
            row.name, cpu[row.name], ours="node", theirs="in process"
        ).ratio
    result["throughput_vs_in_process"] = min(
        result["store_vs_in_process"], result["load_vs_in_process"]
    )
    return result


def shared_prefix(prompts: int) -> dict[str, float]:
    """Two engines get the same prompts at once; blocks computed over blocks there are."""
    computed = [0, 0]
    length, step = 64, 16
    with node(0.05) as folder:
        engines = [client(folder, SMALL_BYTES) for _ in range(2)]
        barrier = threading.Barrier(2)

        def play(at: int) -> None:
            cache = engines[at]
            for seed in range(prompts):
                keys, request = chain((1 << 30) + seed, length), f"r{seed}"
                barrier.wait()
                while True:
                    grant = cache.acquire(request, [keys], start=0, limit=length * TOKENS)
                    if not grant.coming:
                        break
                    cache.settle(0.02)
                for stop in range(grant.stop // TOKENS + step, length + 1, step):
                    time.sleep(0.002)  # the model computes a step
                    room = cache.reserve(request, 0, keys, range(stop - step, stop))
                    computed[at] += step
                    cache.publish(room.slots, room.generations, np.ones(len(room.slots), np.uint64))
                cache.release(request)

        threads = [threading.Thread(target=play, args=(at,)) for at in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for cache in engines:
            cache.close()
    return {"computed_vs_distinct": sum(computed) / (prompts * length)}


def main() -> None:
    """Prints the table and the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds")
    args = parser.parse_args()
    exit_on_sigterm()
    before = shared_memory()
    result = {
        **round_trips(10 if args.short else 100),
        **throughput(20 if args.short else 100),
        **shared_prefix(20 if args.short else 100),
    }
    finish({**result, "left_behind": leftovers(before)})


if __name__ == "__main__":
    main()
