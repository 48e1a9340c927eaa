"""Is kvmem right in every cell of what vLLM does: models, options, features?

    python -m benchmarks.bench_matrix [--short] [--only NAME ...] [--list] [--break]

A cell asks a tiny random model for prompts, empties the device's prefix cache, asks again so that
the KV must come from kvmem's host tier, and compares token by token, and logprobs to five decimals,
with the engine's own prefix hit of the same prompts. In float32 it also compares with the prompt
computed whole. It shows that blocks were moved, or it proves nothing. A cell comes to:

    right     the answers are the oracle's, from blocks that kvmem moved
    refused   kvmem said no at start, and why
    wrong     anything else
    not run   vLLM cannot on this machine, or contradicts itself, without kvmem too; not counted

`--only` takes a cell, a setup, or the beginning of one ("gemma3", "llama/hit"). `--break` lets
kvmem load zeros in place of what it stored: a cell that is right then would see nothing.

Left out: asynchronous scheduling, which vLLM turns off on a CPU (tests/scheduling drives its
scheduler), sleep, which it does not have there, and images (tests/property holds their keys).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks import _matrix_servers
from benchmarks._matrix import Cell, Outcome, Setup, chosen, summary
from benchmarks._matrix_host import Host
from benchmarks._matrix_setups import SETUPS, SHORT
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import finish

__all__: list[str] = []


def main() -> None:
    """Runs the cells, prints a row for each as its setup ends, and the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few cells, about a minute")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="only tell which cells there are")
    parser.add_argument("--break", dest="broken", action="store_true", help="see above")
    args = parser.parse_args()
    try:
        setups = chosen(SETUPS, args.only or (SHORT if args.short else ()))
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print("\n".join(Cell(setup, c).name for setup in setups for c in setup.cells))
        return
    exit_on_sigterm()
    before, begin = shared_memory(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvmem-matrix-") as folder:
        outcomes = list(_run(setups, Path(folder), broken=args.broken))
    counts = summary(outcomes)
    finish({**counts, "seconds": time.monotonic() - begin, "left_behind": leftovers(before)})
    sys.exit(1 if counts["wrong"] and not args.broken else 0)


def _run(setups: Iterable[Setup], folder: Path, *, broken: bool) -> Iterable[Outcome]:
    setups = list(setups)
    with Host(folder, broken=broken) as host:
        host.make(dict.fromkeys(setup.model for setup in setups))
        for setup in setups:
            in_process = setup.kind in ("llm", "async")
            outcomes = host.run(setup) if in_process else _matrix_servers.run(setup, folder)
            for outcome in outcomes:
                print(row(outcome), flush=True)
                yield outcome


def row(outcome: Outcome) -> str:
    """One line for a cell."""
    return f"{outcome.verdict:8} {outcome.cell:34} {outcome.seconds:5.1f} s  {outcome.detail}"


if __name__ == "__main__":
    main()
