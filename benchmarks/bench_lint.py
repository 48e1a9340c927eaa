"""How long does `kvmem lint` take for a day of an agent's calls, and how much memory?

    python -m benchmarks.bench_lint [--short] [--data FOLDER]

The whole command runs on the trace weka_a (25,536 calls of 140,000 tokens in the mean), in a
process of its own: wall time from its start to its end, and the most memory it held. Beside it, in
the same rounds, the least that any reader must do: the trace unpacked and its JSON decoded. Where
the folder of traces is not, a trace of the same shape is made.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import _corpus
from benchmarks._report import Row, finish, table

_SET = "weka_a.jsonl.gz"
READ = """
import gzip, sys
import msgspec
decoder = msgspec.json.Decoder()
with gzip.open(sys.argv[1], "rb") as lines:
    print(sum(decoder.decode(line) is not None for line in lines))
"""


class Ran(msgspec.Struct, frozen=True):
    """A child that ended: seconds, the most MiB it held, what it printed."""

    seconds: float
    peak_mib: float
    out: str


def run(arguments: list[str]) -> Ran:
    """Python in a process of its own, started and waited for.

    Raises:
        SystemExit: it ended with another code than 0 and 1, which says that breaks were found.
    """
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, *arguments], stdout=out)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode not in (0, 1):
            raise SystemExit(
                f"{arguments[:3]} ended with {child.returncode}: see its message above"
            )
        out.seek(0)
        return Ran(seconds, used.ru_maxrss / 1024, out.read().decode())


def generated(path: Path, *, n_sessions: int, seed: int) -> Path:
    """A trace of 64-token blocks in sessions of 58 calls; one call in forty breaks its prefix."""
    draw = random.Random(seed)
    header = {"kvtrace": 1, "kind": "blocks", "block_size": 64, "hash_scope": "session",
              "order": "by_session"}  # fmt: skip
    call = 0
    with gzip.open(path, "wt", compresslevel=1) as out:
        out.write(json.dumps(header) + "\n")
        for session in range(n_sessions):
            size, fresh = 0, 0
            for turn in range(58):
                keep = size if draw.random() > 1 / 40 else draw.randrange(size + 1)
                n_new = draw.randrange(20, 140) if turn else 300
                ids = list(range(fresh, fresh + n_new))
                base = call - 1 if turn else None
                row = {"id": call, "session": f"s{session}", "base": base, "keep": keep,
                       "block_hashes": ids}  # fmt: skip
                out.write(json.dumps(row) + "\n")
                size, fresh, call = keep + n_new, fresh + n_new, call + 1
    return path


def measure(trace: Path, rounds: int) -> dict[str, Any]:
    """Both children in each round; prints a table, returns the figures."""
    lints, reads = [], []
    for _ in range(rounds):
        lints.append(run(["-m", "kvmem.cli", "lint", "--json", str(trace)]))
        reads.append(run(["-c", READ, str(trace)]))
    (report,) = json.loads(lints[0].out)
    samples = {"lint": [r.seconds for r in lints], "read": [r.seconds for r in reads]}
    print(table([Row.of(trace.name, samples, ours="lint", theirs="read", unit="s", per=1.0)]), "\n")
    return {
        "calls": report["n_calls"],
        "breaks": report["n_breaks"],
        "faults": report["n_faults"],
        "cached_share": report["cached"] / report["prompt"],
        "lint_s": statistics.median(samples["lint"]),
        "lint_mib": max(r.peak_mib for r in lints),
        "lint_vs_read": statistics.median(
            a / b for a, b in zip(samples["lint"], samples["read"], strict=True)
        ),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="three rounds")
    parser.add_argument("--data", type=Path, help="the folder of traces (or KVMEM_DATA)")
    args = parser.parse_args()
    rounds = 3 if args.short else 9
    folder = _corpus.trace_folder(args.data)
    if folder is not None and (folder / _SET).is_file():
        finish({"trace": _SET, **measure(folder / _SET, rounds)})
        return
    print(f"no {_SET} here: a trace of its shape is made. --data or KVMEM_DATA names its folder.\n")
    with tempfile.TemporaryDirectory() as made:
        trace = generated(Path(made) / "generated.jsonl.gz", n_sessions=440, seed=5)
        finish({"trace": "generated", **measure(trace, rounds)})


if __name__ == "__main__":
    main()
