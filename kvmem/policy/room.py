"""What is in a cache of so many blocks: a prefix of each run, and of a run only where all before it
is there (I2).

A *run* is a piece of the tree of prompts without a fork inside. Who numbers them keeps their
`sizes` and `parents`: a whole trace at once (`kvmem.explain.replay.forest`), or prompt by prompt
(`kvmem.policy.tree`), which may cut a run in two and make it longer meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Room", "Runs"]


class Runs(Protocol):
    """The tree of prompts: of each run its blocks, and the run above it or -1."""

    sizes: list[int]
    parents: list[int]


class Room:
    """`here[run]` of its blocks are here; `leaves` are the runs whose ends may go, and `last[run]`
    is the time of its last use."""

    def __init__(self, forest: Runs, capacity: int) -> None:
        self.forest, self.capacity = forest, capacity
        n = len(forest.sizes)
        self.here, self._below = [0] * n, [0] * n
        self.last = np.zeros(n)
        self.empty = np.ones(n + 1, bool)  # runs of which nothing is here; -1 is none of them
        self.empty[-1] = False
        self.leaves: dict[int, None] = {}
        self.used = 0
        # Of each branch, its run and the one at which its blocks end here, as `Agents` knew last.
        self.ends: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def copy(self) -> Room:
        """Another one of the same content."""
        other = Room(self.forest, self.capacity)
        other.here, other._below = list(self.here), list(self._below)
        other.last, other.empty = self.last.copy(), self.empty.copy()
        other.leaves, other.used = dict(self.leaves), self.used
        return other

    def excess(self, to: int) -> int:
        """Blocks to cut so that no more than so many are here."""
        return self.used - to

    def hits(self, path: Sequence[int]) -> int:
        """Leading blocks of a prompt that are here."""
        hits = 0
        for run in path:
            hits += self.here[run]
            if self.here[run] < self.forest.sizes[run]:
                break
        return hits

    def fill(self, path: Sequence[int], now_s: float) -> None:
        """The prompt was computed: all of it is here, whatever the capacity is."""
        sizes, parents = self.forest.sizes, self.forest.parents
        for run in path:
            self.last[run] = now_s
            if self.here[run] == sizes[run]:
                continue
            above = parents[run]
            if self.here[run] == 0 and above >= 0:
                self._below[above] += 1
                self.leaves.pop(above, None)
            self.used += sizes[run] - self.here[run]
            self.here[run] = sizes[run]
            self.empty[run] = False
            if self._below[run] == 0:
                self.leaves[run] = None

    def cut(self, run: int, n: int) -> int | None:
        """Drops up to n blocks from a leaf's end; the run above if that is a leaf now."""
        n = min(n, self.here[run])
        self.here[run] -= n
        self.used -= n
        if self.here[run]:
            return None
        del self.leaves[run]
        self.empty[run] = True
        above = self.forest.parents[run]
        if above < 0:
            return None
        self._below[above] -= 1
        if self._below[above]:
            return None
        self.leaves[above] = None
        return above

    # -- a tree that grows -------------------------------------------------------------------

    def grow(self) -> None:
        """There are more runs than before; nothing of the new ones is here."""
        n = len(self.forest.sizes)
        more = n - len(self.here)
        self.here += [0] * more
        self._below += [0] * more
        if n >= len(self.empty):
            last, empty = np.zeros(2 * n), np.ones(2 * n + 1, bool)
            last[: len(self.last)] = self.last
            empty[: len(self.empty) - 1] = self.empty[:-1]
            empty[-1] = False
            self.last, self.empty = last, empty

    def split(self, run: int, upper: int) -> None:
        """The beginning of a run is a run of its own now, above it."""
        self.grow()
        first = min(self.here[run], self.forest.sizes[upper])
        self.here[upper], self.here[run] = first, self.here[run] - first
        self.last[upper] = self.last[run]
        self.empty[upper], self.empty[run] = self.empty[run], self.here[run] == 0
        self._below[upper] = int(self.here[run] > 0)
        if run in self.leaves and self.here[run] == 0:
            del self.leaves[run]
            self.leaves[upper] = None
