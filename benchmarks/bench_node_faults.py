"""Does a node, or an engine of it, that is killed ever cost more than a miss?

    python -m benchmarks.bench_node_faults [--short]

Engines of two processes each, a scheduler's half and a worker's, store and load blocks through one
node. A block's bytes follow from its key, and each one that is loaded is compared; a worker reads
back what it has stored before it says so.

First the node is killed (SIGKILL) under that load, again and again, and a new one started in its
place: the engines must run on, attach again, and load nothing wrong. Then the node stays and
engines are killed, with leases held and slots reserved: half of the times only the scheduler's
half, whose worker then ends its copy. When all have gone, nothing may be leased or reserved.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._node import COUNTS, Counts, Engine, fork, serve, until
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import finish
from kvmem.node import Settings
from kvmem.node.status import ask

__all__: list[str] = []

BLOCK_BYTES = 16 << 10
ENGINES = 3
PROMPTS, LENGTH = 5000, 40  # more than the memory holds: slots change hands all the time
HOST_GB = 0.012
PATIENCE_S = 30.0


class Fleet:
    """A node and engines that are started in the place of those that were killed."""

    def __init__(self, folder: Path, n_kills: int) -> None:
        self.settings = Settings(path=folder, host_gb=HOST_GB, scrub_mb_s=16.0)
        self.counts = Counts(ENGINES + n_kills + 1)
        self._row = 0
        self.node = 0
        self.engines: list[tuple[int, int]] = []  # process, row

    def start_node(self) -> None:
        """A new node, once it answers."""
        self.node = fork(lambda: serve(self.settings))
        if not until(self.told, PATIENCE_S):
            raise RuntimeError("the node does not answer")

    def told(self) -> dict[str, Any] | None:
        """The node's own figures, if it answers."""
        try:
            return ask(self.settings.path)
        except Exception:  # noqa: BLE001 it is started or killed at this moment
            return None

    def start_engine(self) -> None:
        """One more."""
        row, self._row = self._row, self._row + 1

        def run() -> None:
            os.setpgid(0, 0)
            Engine(self.settings.path, BLOCK_BYTES, self.counts, row, seed=row, prompts=PROMPTS,
                   length=LENGTH).run()  # fmt: skip

        self.engines.append((fork(run), row))

    def kill_node(self) -> None:
        """By SIGKILL."""
        os.kill(self.node, signal.SIGKILL)
        os.waitpid(self.node, 0)

    def kill_engine(self, at: int, *, whole: bool) -> None:
        """Both halves at once, or the scheduler's, whose worker then ends by itself."""
        pid, _ = self.engines.pop(at)
        if whole:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def at_work(self, at: int) -> bool:
        """Whether an engine has begun to store and load."""
        row = self.counts.rows[self.engines[at][1]]
        return all(row[COUNTS.index(name)] > LENGTH for name in ("loaded", "stored"))

    def worked(self, before: int) -> bool:
        """Whether blocks were loaded since."""
        return self.counts.total("loaded") > before + LENGTH


def run(folder: Path, kills: int) -> dict[str, int]:
    """Both parts; the figures."""
    random = np.random.default_rng(7)
    fleet = Fleet(folder, kills)
    fleet.start_node()
    for _ in range(ENGINES):
        fleet.start_engine()
    lost = 0
    for _ in range(kills):
        before = fleet.counts.total("loaded")
        lost += not until(lambda: fleet.worked(before), PATIENCE_S)  # noqa: B023 called at once
        until(lambda: False, float(random.uniform(0.0, 0.05)))
        fleet.kill_node()
        fleet.start_node()
    for _ in range(kills):
        at = int(random.integers(ENGINES))
        lost += not until(lambda: fleet.at_work(at), PATIENCE_S)  # noqa: B023 called at once
        until(lambda: False, float(random.uniform(0.0, 0.05)))
        fleet.kill_engine(at, whole=bool(random.integers(2)))
        fleet.start_engine()
    while fleet.engines:
        fleet.kill_engine(0, whole=True)
    until(lambda: leaked(fleet.told()) == 0, PATIENCE_S)
    told = fleet.told()
    found = {name: fleet.counts.total(name) for name in COUNTS}
    result = {
        "wrong": found["wrong"],
        "engine_failures": found["failures"] + lost,
        "leaked_slots": leaked(told),
        "node_kills": kills,
        "engine_kills": kills,
        "loaded_blocks": found["loaded"],
        "stored_blocks": found["stored"],
        "asked": found["asked"],
        "asked_without_a_node": found["away"],
        "waited": found["waited"],
        "node_failures": told["failures"] if told is not None else -1,
    }
    os.kill(fleet.node, signal.SIGKILL)
    os.waitpid(fleet.node, 0)
    return result


def leaked(told: dict[str, Any] | None) -> int:
    """Slots and leases that a node without engines still holds; -1 where it does not answer."""
    if told is None or "cache" not in told:
        return -1
    cache = told["cache"]
    return int(cache["leases"] + cache["pending"] + cache["orphaned"] + cache["condemned"])


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="20 kills of each kind, not 200")
    args = parser.parse_args()
    exit_on_sigterm()
    before = shared_memory()
    with tempfile.TemporaryDirectory(prefix="kvmem-node-") as name:
        result = run(Path(name), 20 if args.short else 200)
    finish({**result, "left_behind": leftovers(before)})


if __name__ == "__main__":
    main()
