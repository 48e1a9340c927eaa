"""Does the disk tier ever answer with other bytes, or lose what it need not?

    python -m benchmarks.bench_faults [--short] [--seed N]

    kills   a process that stores and reads is killed at each named point of a write, or wherever it
            is; what it had been told is on the disk must be there afterwards, whole
    flips   bits of slots and records flipped, slots and records in one another's place, pages of
            zeros, files cut off, an older table put back; each damaged block must be a miss
    torn    a power cut: of all sectors written since the last flush each one is there or not; what
            was flushed must be there

Every block can be made again from its key and is compared byte by byte. Half of them are stored by
the codec. Beside it vLLM's own tier of files (its storing and loading functions, without an engine)
gets the same flips, zeros, swaps and cuts.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks._faults import CHAIN, SHARE_BYTES, Host, block_of, chain_of
from benchmarks._process import leftovers, shared_memory
from benchmarks._report import finish
from kvmem.store.folders import TABLE

__all__: list[str] = []

POINTS = ("before_tombstone", "after_tombstone", "after_data", "after_record")
DATA = "data.kvd"
HEADER, RECORD, SLOT_HEADER, SECTOR, PAGE = 4096, 128, 128, 512, 4096
CHAINS = 12
KILLS_IN_A_FOLDER = 8
DELAY_S = 0.03  # a chain takes a third of it, or, on a busy machine, all
FLIPS_AT_ONCE = 8


class Tally(Counter[str]):
    """What was done and what came of it."""

    def read_all(self, root: Path, numbers: list[int]) -> list[int]:
        """Opens the store and asks for every chain: how many blocks of each were answered."""
        host = Host(root)
        try:
            answers = [host.get(number) for number in numbers]
        finally:
            host.close()
        self["wrong"] += sum(wrong for _, wrong in answers)
        return [n for n, _ in answers]


# -- kills ---------------------------------------------------------------------------------------


def writer(root: Path, first: int, faults: str, told: int) -> None:
    """In a process of its own: stores chain after chain, reads old ones, and says what is there."""
    host = Host(root, faults=faults)
    for number in range(first, first + 1000):
        host.put(number)
        host.settle()
        os.write(told, number.to_bytes(4, "little"))
        _, wrong = host.get(max(0, number - 7))
        if wrong:
            os.write(told, (1 << 31).to_bytes(4, "little"))


def kill_once(root: Path, first: int, faults: str, after: int, delay_s: float) -> list[int]:
    """Chains that were acknowledged by a process that was then killed: by `faults`, or so long
    after it had told of so many."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        try:
            writer(root, first, faults, into)
        finally:
            os._exit(1)
    os.close(into)
    told: list[int] = []
    at: float | None = None
    while True:
        if at is not None and not select.select([out], [], [], max(0.0, at - time.monotonic()))[0]:
            os.kill(pid, signal.SIGKILL)
            at = None
        if len(piece := os.read(out, 4)) < 4:
            break
        told.append(int.from_bytes(piece, "little"))
        if len(told) == after:
            at = time.monotonic() + delay_s
    os.close(out)
    _, status = os.waitpid(pid, 0)
    if os.WTERMSIG(status) != signal.SIGKILL:
        raise RuntimeError(f"the writer ended by itself: {status}")
    return told


def kills(folder: Path, n: int, draw: np.random.Generator, tally: Tally) -> None:
    """Half of them at the named points, half wherever the process is."""
    root, known = folder / "kills", list[int]()
    for turn in range(n):
        if turn % KILLS_IN_A_FOLDER == 0:
            shutil.rmtree(root, ignore_errors=True)
            known = []
        first = 1 + max(known, default=0)
        point = turn % 2 == 0
        faults = f"kill:{POINTS[turn // 2 % 4]}:{draw.integers(1, 40)}" if point else ""
        after, delay_s = 0 if point else int(draw.integers(1, 8)), float(draw.uniform(0, DELAY_S))
        told = kill_once(root, first, faults, after, delay_s)
        tally["wrong"] += sum(number >= 1 << 31 for number in told)
        known += [number for number in told if number < 1 << 31]
        *answered, under_way = tally.read_all(root, [*known, 1 + max(known, default=first - 1)])
        tally["cut_short"] += 0 < under_way < CHAIN
        tally["lost_beyond_bound"] += sum(CHAIN - n for n in answered)
        tally["blocks_after_kills"] += sum(answered)
        tally["kills"] += 1


# -- damage --------------------------------------------------------------------------------------


def filled(root: Path, first: int, n: int = CHAINS) -> list[int]:
    """A store with some chains in it, closed."""
    host = Host(root)
    numbers = list(range(first, first + n))
    for number in numbers:
        host.put(number)
        host.settle()
    host.close()
    return numbers


class Layout:
    """Where each block lies (docs/formats.md)."""

    def __init__(self, folder: Path) -> None:
        table = np.fromfile(folder / TABLE, np.uint8)
        raw, self.unit = table.tobytes(), int(table[24:32].view("<u8")[0])
        self.at: dict[bytes, tuple[int, int, int]] = {}  # record, slot, bytes of the slot in use
        for record in range(HEADER, len(raw) - RECORD + 1, RECORD):
            body = raw[record : record + RECORD]
            if any(body):
                place, stored = (int.from_bytes(body[i : i + 4], "little") for i in (112, 116))
                self.at[body[:32]] = (record, place * self.unit, SLOT_HEADER + stored)


def damage(
    folder: Path, layout: Layout, keys: list[bytes], draw: np.random.Generator
) -> set[bytes]:
    """Does one thing to the files; the answer is which blocks it hit."""
    table, data = folder / TABLE, folder / DATA
    what = draw.choice(["bit", "record bit", "swap", "records", "zeros", "cut"],
                       p=[0.55, 0.2, 0.1, 0.05, 0.08, 0.02])  # fmt: skip
    one, two = (keys[i] for i in draw.choice(len(keys), 2, replace=False))
    record, slot, used = layout.at[one]
    other_record, other_slot, other_used = layout.at[two]
    if what == "bit":
        flip(data, slot + int(draw.integers(used)), draw)
        return {one}
    if what == "record bit":
        flip(table, record + int(draw.integers(RECORD)), draw)
        return {one}
    if what == "swap":
        swap(data, slot, other_slot, max(used, other_used))
        return {one, two}
    if what == "records":
        swap(table, record, other_record, RECORD)
        return {one, two}
    if what == "zeros":
        at = slot + int(draw.integers(used)) // PAGE * PAGE
        with data.open("r+b") as file:
            file.seek(at)
            held = file.read(PAGE)
            file.seek(at)
            file.write(bytes(PAGE))
        return {one} if any(held[: slot + used - at]) else set()
    with data.open("r+b") as file:
        file.truncate(slot + int(draw.integers(used)))
        end = file.seek(0, os.SEEK_END)
    return {key for key, (_, at, n) in layout.at.items() if at + n > end}


def flip(path: Path, at: int, draw: np.random.Generator) -> None:
    """Another bit there."""
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0] if at < path.stat().st_size else 0
        file.seek(at)
        file.write(bytes([old ^ 1 << int(draw.integers(8))]))


def swap(path: Path, one: int, other: int, n: int) -> None:
    """Each in the other's place; what is beyond the end of a file that was cut off is zeros."""
    with path.open("r+b") as file:
        file.seek(one)
        a = file.read(n).ljust(n, b"\0")
        file.seek(other)
        b = file.read(n).ljust(n, b"\0")
        for at, held in ((one, b), (other, a)):
            file.seek(at)
            file.write(held)


def flips(folder: Path, n: int, draw: np.random.Generator, tally: Tally) -> None:
    """Damage to a whole store, some at once, and what is answered then."""
    whole = folder / "whole"
    numbers = filled(whole, 1)
    keys = [key for number in numbers for key in chain_of(number)]
    name = next(path.name for path in whole.iterdir())
    older = (whole / name / TABLE).read_bytes()
    layout = Layout(whole / name)
    turn = 0
    while tally["flips"] < n:
        root = folder / "damaged"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole, root)
        hit: set[bytes] = set()
        for _ in range(FLIPS_AT_ONCE):
            hit |= damage(root / name, layout, keys, draw)
            tally["flips"] += 1
        answered = tally.read_all(root, numbers)
        for number, n_answered in zip(numbers, answered, strict=True):
            tally["undetected"] += sum(key in hit for key in chain_of(number)[:n_answered])
        turn += 1
        if turn % 25 == 0:  # a table from before other blocks took the places of some
            shutil.rmtree(root)
            shutil.copytree(whole, root)
            filled(root, 1000 * turn)
            (root / name / TABLE).write_bytes(older)
            tally.read_all(root, [*numbers, *range(1000 * turn, 1000 * turn + CHAINS)])
            tally["stale_tables"] += 1


# -- power cuts ----------------------------------------------------------------------------------


def torn(folder: Path, n: int, draw: np.random.Generator, tally: Tally) -> None:
    """Some sectors of what was written after a flush are on the disk, and some are not."""
    while tally["torn"] < n:
        root = folder / "flushed"
        shutil.rmtree(root, ignore_errors=True)
        first = 1 + 100 * tally["torn"]
        flushed = filled(root, first)
        name = next(path.name for path in root.iterdir())
        before = {file: (root / name / file).read_bytes() for file in (TABLE, DATA)}
        later = filled(root, first + CHAINS)
        after = {file: (root / name / file).read_bytes() for file in (TABLE, DATA)}
        for _ in range(20):
            for file, new in after.items():
                old = before[file].ljust(len(new), b"\0")
                a, b = (np.frombuffer(raw, np.uint8).reshape(-1, SECTOR) for raw in (old, new))
                there = draw.random(len(a)) < draw.choice([0.2, 0.5, 0.9])
                (root / name / file).write_bytes(np.where(there[:, None], b, a).tobytes())
            answered = tally.read_all(root, [*flushed, *later])
            tally["lost_beyond_bound"] += sum(CHAIN - n for n in answered[:CHAINS])
            tally["later_blocks_whole"] += sum(answered[CHAINS:])
            tally["torn"] += 1


# -- vLLM's own ----------------------------------------------------------------------------------


def vllm_files(folder: Path, n: int, draw: np.random.Generator) -> dict[str, int] | None:
    """The same kinds of damage to vLLM's files, a block each; None where it has no such tier."""
    try:
        from vllm.v1.kv_offload.tiering.fs.io import batch_load_block, batch_store_block
    except ImportError:
        return None
    keys = [key for number in range(CHAINS) for key in chain_of(number)]
    size = -(-SHARE_BYTES // PAGE) * PAGE
    buffer = np.zeros((len(keys), size), np.uint8)
    for row, key in zip(buffer, keys, strict=True):
        row[:SHARE_BYTES] = block_of(key)
    honest, paths = buffer.copy(), [str(folder / key.hex()) for key in keys]
    offsets = [size * i for i in range(len(keys))]
    found = {"flips": 0, "undetected": 0}
    while found["flips"] < n:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        buffer[:] = honest
        batch_store_block(paths, memoryview(buffer), offsets, size, False)
        one, two = (int(i) for i in draw.choice(len(keys), 2, replace=False))
        what = draw.choice(["bit", "swap", "zeros", "cut"], p=[0.75, 0.15, 0.08, 0.02])
        if what == "bit":
            flip(Path(paths[one]), int(draw.integers(SHARE_BYTES)), draw)
        elif what == "swap":
            held = Path(paths[one]).read_bytes()
            Path(paths[one]).write_bytes(Path(paths[two]).read_bytes())
            Path(paths[two]).write_bytes(held)
        elif what == "zeros":
            Path(paths[one]).write_bytes(bytes(size))
        else:
            os.truncate(paths[one], int(draw.integers(size)))
        buffer[:] = 0
        try:
            batch_load_block([paths[one]], memoryview(buffer), [offsets[one]], size, False)
        except OSError:
            pass
        else:
            found["undetected"] += not np.array_equal(buffer[one], honest[one])
        found["flips"] += 1
    return found


def main() -> None:
    """Prints both columns and the line; exit code 1 if anything was wrong or lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a twentieth of everything")
    parser.add_argument("--seed", type=int, default=20_261_126)
    args = parser.parse_args()
    share = 20 if args.short else 1
    before, tally, draw = shared_memory(), Tally(), np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(prefix="kvmem-faults-") as name:
        folder = Path(name)
        for what, do, n in (("kills", kills, 500), ("flips", flips, 2000), ("torn", torn, 500)):
            do(folder, n // share, draw, tally)
            print(f"  {what}: {dict(tally)}", flush=True)
        theirs = vllm_files(folder / "vllm", 2000 // share, draw)
    print(f"{'':22}{'kvmem':>10}{'vLLM files':>12}")
    told = theirs or {}
    print(f"{'damaged':22}{tally['flips']:10,}{told.get('flips', 'none'):>12}")
    print(f"{'served all the same':22}{tally['undetected']:10,}{told.get('undetected', ''):>12}")
    if theirs is None:
        print("this vLLM has no tier of files, or not where 0.32 has it")
    bad = ("wrong", "undetected", "lost_beyond_bound")
    finish(
        {
            **{what: tally[what] for what in ("kills", "flips", "torn", *bad)},
            "vllm_files": theirs,
            "blocks_after_kills": tally["blocks_after_kills"],
            "cut_short": tally["cut_short"],
            "stale_tables": tally["stale_tables"],
            "seed": args.seed,
            "left_behind": leftovers(before),
        }
    )
    sys.exit(1 if any(tally[what] for what in bad) else 0)


if __name__ == "__main__":
    main()
