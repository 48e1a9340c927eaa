"""What is in a cache of so many blocks while a trace is replayed: a prefix of each run, and of a
run only where all before it is there (I2)."""

from __future__ import annotations

import numpy as np

from kvmem.explain.replay.forest import Forest

__all__ = ["Room"]


class Room:
    """`here[run]` of its blocks are here; `leaves` are the runs whose ends may go, and `last[run]`
    is the time of its last use."""

    def __init__(self, forest: Forest, capacity: int) -> None:
        self.forest, self.capacity = forest, capacity
        n = len(forest.sizes)
        self.here, self._below = [0] * n, [0] * n
        self.last = np.zeros(n)
        self.empty = np.ones(n + 1, bool)  # runs of which nothing is here; -1 is none of them
        self.empty[-1] = False
        self.leaves: dict[int, None] = {}
        self.used = 0

    def copy(self) -> Room:
        """Another one of the same content."""
        other = Room(self.forest, self.capacity)
        other.here, other._below = list(self.here), list(self._below)
        other.last, other.empty = self.last.copy(), self.empty.copy()
        other.leaves, other.used = dict(self.leaves), self.used
        return other

    def hits(self, path: tuple[int, ...]) -> int:
        """Leading blocks of a prompt that are here."""
        hits = 0
        for run in path:
            hits += self.here[run]
            if self.here[run] < self.forest.sizes[run]:
                break
        return hits

    def fill(self, path: tuple[int, ...], now_s: float) -> None:
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
