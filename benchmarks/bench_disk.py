"""How near do the disk tier's reads and writes come to what the disk can do?

    python -m benchmarks.bench_disk [--short] [--folder FOLDER]

Blocks go from an arena to records of a store and back, checksums, headers and all, by the store's
own threads; fio does the same number of O_DIRECT reads and writes of a block's size, from as many
threads, on a file in the same folder. They take turns in one run; a ratio is the median of the
rounds' own. Blocks are random bytes, so no codec makes them shorter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks._disk import Rig
from benchmarks._report import finish, spread

__all__ = ["Fio"]

BLOCKS = {"360 KiB": 360 << 10, "2 MiB": 2 << 20}
ALIGN = 4096


class Fio:
    """fio on one file, laid out before it is timed."""

    def __init__(self, folder: Path, block_bytes: int, n_blocks: int, threads: int) -> None:
        # What the store moves for a block: a header, and up to a multiple of a page.
        self._each = -(-(block_bytes + 128) // ALIGN) * ALIGN
        self._threads = threads
        self._n = n_blocks // threads * threads
        self._path = folder / "fio.dat"
        self._run("write")

    def _run(self, how: str) -> dict[str, float]:
        per_thread = self._each * (self._n // self._threads)
        command = [
            "fio", "--name=bench", f"--filename={self._path}", f"--rw={how}",
            f"--bs={self._each}", f"--size={self._each * self._n}", f"--io_size={per_thread}",
            f"--numjobs={self._threads}", "--thread", "--direct=1", "--ioengine=psync",
            "--group_reporting", "--output-format=json", "--randrepeat=0", "--norandommap",
            "--fallocate=posix", "--end_fsync=0",
        ]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        job = json.loads(done.stdout)["jobs"][0]
        return dict(job["read" if "read" in how else "write"])

    def gb_s(self, *, write: bool) -> float:
        """1e9 bytes a second."""
        return float(self._run("randwrite" if write else "randread")["bw_bytes"]) / 1e9


def ours(rig: Rig, draw: np.random.Generator, *, write: bool) -> float:
    """1e9 bytes a second of the disk, by the store."""
    order = draw.permutation(rig.n_slots).tolist()
    begin = time.perf_counter()
    n_bytes = rig.move(order, write=write)
    return n_bytes / (time.perf_counter() - begin) / 1e9


def measure(
    folder: Path, block_bytes: int, total_bytes: int, threads: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Pairs (kvmem, fio) of each round, for reads and for writes."""
    n = total_bytes // block_bytes
    draw = np.random.default_rng(block_bytes)
    blocks = draw.integers(0, 256, (n, block_bytes), np.uint8)
    found: dict[str, list[tuple[float, float]]] = {"write": [], "read": []}
    with Rig(folder / "store", blocks, 2 * total_bytes, threads=threads, codec=False) as rig:
        fio = Fio(folder, block_bytes, n, threads)
        rig.move(range(n), write=True)
        for turn in range(rounds):
            for what, pairs in found.items():
                write = what == "write"
                arms = [lambda w=write: ours(rig, draw, write=w), lambda w=write: fio.gb_s(write=w)]
                both = [arm() for arm in (arms if turn % 2 == 0 else arms[::-1])]
                pairs.append((both[0], both[1]) if turn % 2 == 0 else (both[1], both[0]))
        if not np.array_equal(rig.slot(n // 2), blocks[n // 2]):
            raise RuntimeError("a block came back as another")
    return found


def main() -> None:
    """Prints a row for each size, and the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a quarter of the bytes, 3 rounds")
    parser.add_argument("--folder", type=Path, help="on the disk in question")
    parser.add_argument("--threads", type=int, default=4, help="of the store, and of fio")
    args = parser.parse_args()
    if shutil.which("fio") is None:
        print("bench_disk: skipped, there is no fio here (Debian's package fio)")
        sys.exit(0)
    total_bytes, rounds = (256 << 20, 3) if args.short else (1 << 30, 7)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="kvmem-disk-", dir=args.folder) as name:
        for title, block_bytes in BLOCKS.items():
            folder = Path(name) / title.replace(" ", "-")
            found = measure(folder, block_bytes, total_bytes, args.threads, rounds)
            shutil.rmtree(folder)
            for what, pairs in found.items():
                ratios = [a / b for a, b in pairs]
                low, high = spread(ratios)
                a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
                ratio = statistics.median(ratios)
                print(
                    f"{title:8} {what:5}  kvmem {a:6.2f} GB/s  fio {b:6.2f} GB/s  "
                    f"{ratio:5.2f}  {low:.2f}..{high:.2f}",
                    flush=True,
                )
                result[f"{what}_vs_fio"] = min(ratio, result.get(f"{what}_vs_fio", ratio))
    finish({**result, "threads": args.threads, "rounds": rounds})


if __name__ == "__main__":
    main()
