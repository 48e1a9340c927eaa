"""How soon after a restart is what was on the disk ready, and what is the first request worth?

    python -m benchmarks.bench_restart [--short]

Ready: the time in which a store of so many slots is opened, its table read and checked, and its
index rebuilt with every block under its parent, as an engine does it at its start. The table is a
real one, written record by record in chains of 170 blocks; nothing of the blocks is read, so the
data file is empty. Its pages are in the page cache; at 128 bytes a slot a million of them are
0.06 s of a disk of 2 GB/s more.

First request: an engine with the demo's model answers a prompt of real text, ends, and another one
starts over the same folder. Its first answer must come from the disk whole, and be the token that
the first engine computed; it is compared with a prompt of the same length that nobody has seen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _arms
from benchmarks._arms import BLOCK_TOKENS, Engine
from benchmarks._disk import NAMESPACE, key_of
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import finish
from benchmarks.bench_ttft import Prompts, native_dtype
from kvmem import events
from kvmem._core import xxh3_64
from kvmem.cache import Cache
from kvmem.demo import model as demo_model
from kvmem.store import Arena, Disk
from kvmem.store.folders import TABLE
from kvmem.types import GroupShape

__all__: list[str] = []

SHARE_BYTES = 3_900  # a slot of one page
CHAIN_BLOCKS = 170
HEADER_BYTES, RECORD_BYTES = 4096, 128
RECORD = np.dtype(
    [
        ("key", "V32"), ("parent", "V32"), ("generation", "<u8"), ("payload", "<u8"),
        ("published", "<u8"), ("sequence", "<u8"), ("share_length", "<u4"), ("group", "<u4"),
        ("depth", "<u4"), ("codec", "<u4"), ("place", "<u4"), ("stored_length", "<u4"),
        ("checksum", "<u8"),
    ]
)  # fmt: skip


def budget_for(n_slots: int) -> int:
    """A disk_gb, in bytes, that holds so many of these blocks and what is kept beside them."""
    return HEADER_BYTES + (n_slots + 16) * (HEADER_BYTES + 2 * RECORD_BYTES)


def write_table(folder: Path, n_slots: int) -> None:
    """Fills the records of a store that is there and closed (docs/formats.md, "record")."""
    keys = [key_of(i) for i in range(n_slots)]
    records = np.zeros(n_slots, RECORD)
    number = np.arange(n_slots)
    records["key"] = np.frombuffer(b"".join(keys), "V32")
    parents = [bytes(32) if i % CHAIN_BLOCKS == 0 else keys[i - 1] for i in range(n_slots)]
    records["parent"] = np.frombuffer(b"".join(parents), "V32")
    records["generation"], records["published"] = 1, 7
    records["sequence"] = number + 1
    records["share_length"] = records["stored_length"] = SHARE_BYTES
    records["depth"] = number % CHAIN_BLOCKS
    records["place"] = number
    raw = records.tobytes()
    for i in range(n_slots):
        body = raw[RECORD_BYTES * i : RECORD_BYTES * i + 120]
        records["checksum"][i] = xxh3_64(body) ^ i
    with (folder / TABLE).open("r+b") as table:
        table.seek(HEADER_BYTES)
        table.write(records.tobytes())


def ready_s(root: Path, n_slots: int, rounds: int) -> list[float]:
    """Seconds until every block of such a store answers, each round."""
    disk_bytes, taken = budget_for(n_slots), []
    arena = Arena.create(
        "bench-restart", n_slots=64, slot_bytes=SHARE_BYTES, namespace=NAMESPACE, label="benchmark"
    )
    try:
        disk = Disk(root, disk_bytes, arena, NAMESPACE, events.Bus())
        disk.recovered()
        disk.close()
        write_table(disk.folder, n_slots)
        for _ in range(rounds):
            begin = time.perf_counter()
            disk = Disk(root, disk_bytes, arena, NAMESPACE, events.Bus())
            cache = Cache(64, (GroupShape(16),), mover=disk)
            taken.append(time.perf_counter() - begin)
            restored = cache.stats()["disk"]["restored"]
            disk.close()
            if restored != n_slots:
                raise RuntimeError(f"{restored:,} of {n_slots:,} blocks answer")
    finally:
        arena.close(unlink=True)
    return taken


def first_request(model: Path, folder: Path, length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token: cold, and of the first request after a restart."""
    dtype = native_dtype()
    prompts = Prompts(model, (rounds + 3) * length)
    settings: dict[str, Any] = {
        "model": str(model), "dtype": dtype, "block_size": BLOCK_TOKENS, "max_model_len": 8_192,
        "kv_cache_memory_bytes": 1 << 30, "enforce_eager": True, "disable_log_stats": False,
        "kv_transfer_config": _arms.kvmem_transfer(
            {"host_gb": 1.0, "disk_gb": 4.0, "disk_path": str(folder / "disk")}
        ),
    }  # fmt: skip
    whole = (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    warm_up, old = prompts.take(200), prompts.take(length)
    found: dict[str, list[float]] = {"cold": [], "first": []}
    with Engine(Path(sys.executable), settings, log=folder / "before.log") as engine:
        engine.wait_ready()
        engine.generate(warm_up)
        token = engine.generate(old).token
        engine.settle()
    for turn in range(rounds):
        with Engine(Path(sys.executable), settings, log=folder / f"after-{turn}.log") as engine:
            engine.wait_ready()
            engine.generate(warm_up)
            first = engine.generate(old)
            told = (first.report or {})["kvmem"]["tokens"]
            if told["disk"] != whole or first.token != token:
                raise RuntimeError(f"{whole} tokens should have come from the disk: {first}")
            found["first"].append(first.ttft_s)
            found["cold"].append(engine.generate(prompts.take(length)).ttft_s)
            print(f"  restart {turn + 1} of {rounds}", flush=True)
    return found


def main() -> None:
    """Prints both tables and the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="no million slots, one restart")
    args = parser.parse_args()
    exit_on_sigterm()
    sizes = {"10k": 10_000, "100k": 100_000, "1m": 1_000_000}
    if args.short:
        del sizes["1m"]
    before, result = shared_memory(), {}
    with tempfile.TemporaryDirectory(prefix="kvmem-restart-") as name:
        for title, n_slots in sizes.items():
            taken = ready_s(Path(name) / title, n_slots, rounds=3 if args.short else 5)
            result[f"ready_{title}_slots_s"] = statistics.median(taken)
            print(f"{n_slots:>9,} slots ready in {statistics.median(taken):7.3f} s", flush=True)
        found = first_request(
            demo_model.ensure(print), Path(name), 1_000 if args.short else 6_000,
            rounds=1 if args.short else 3,
        )  # fmt: skip
    cold, first = (statistics.median(found[what]) for what in ("cold", "first"))
    print(f"cold {cold * 1e3:.0f} ms, first request after a restart {first * 1e3:.0f} ms")
    finish(
        {
            **result,
            "cold_vs_first_ttft": cold / first,
            "first_ttft_s": first,
            "left_behind": leftovers(before),
        }
    )


if __name__ == "__main__":
    main()
