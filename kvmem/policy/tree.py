"""The tree of prompts as they come: runs of blocks without a fork inside, numbered.

Prompts are lists of chained 32-byte block keys, so a key that is the same has the same before it.
A run is cut in two where prompts part, or where one ends inside it; one without children becomes
longer where a prompt goes on from its end. What has been unused for longest, and is in none of the
watcher's rooms, is forgotten when there are too many blocks or runs (I7).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["KEY_BYTES", "Tree", "Watcher"]

KEY_BYTES = 32
TIDIED = 16  # runs that are looked at for each prompt while there are too many
MOST_RUNS = 1 << 17


class Watcher(Protocol):
    """Keeps tables by run beside the tree."""

    def added(self, run: int) -> None:
        """There is a run of this number, of which it has nothing yet."""

    def split(self, run: int, upper: int) -> None:
        """The beginning of a run is a run of its own now, above it."""

    def removed(self, run: int) -> None:
        """A run is no more."""


class Tree:
    """`sizes[run]` blocks, `parents[run]` or -1.

    Args:
        most_blocks: more than so many are forgotten, oldest first; what is beyond twice as many is
            not taken in.
        needed: so many blocks of a run are in some room: those are not forgotten.
    """

    def __init__(self, most_blocks: int, needed: Callable[[int], int]) -> None:
        self.sizes: list[int] = []
        self.parents: list[int] = []
        self.n_blocks = 0
        self._most_blocks, self._needed = most_blocks, needed
        self._watcher: Watcher | None = None
        self._keys: list[bytearray] = []
        self._children: list[dict[bytes, int]] = []
        self._roots: dict[bytes, int] = {}
        self._free: list[int] = []
        self._used: OrderedDict[int, None] = OrderedDict()  # oldest first

    def watch(self, watcher: Watcher) -> None:
        """Tells it of every run from now on. REQUIRES: there is none yet."""
        self._watcher = watcher

    @property
    def n_runs(self) -> int:
        """Runs there are."""
        return len(self._used)

    def n_children(self, run: int) -> int:
        """Runs right below it."""
        return len(self._children[run])

    def keys(self, run: int) -> bytearray:
        """The run's keys, one after another; not to be changed or kept."""
        return self._keys[run]

    def path(self, keys: Sequence[bytes]) -> list[int] | None:
        """The runs of a prompt from the root on, taken in where they are not there.

        None: it is empty, or there is no room for it.
        """
        n = len(keys)
        if self.n_blocks > self._most_blocks or len(self._used) > MOST_RUNS:
            self._tidy()
        if not n or self.n_blocks + n > 2 * self._most_blocks or len(self._used) > 2 * MOST_RUNS:
            return None
        path = self._walk(keys, n)
        for run in path:
            self._used.move_to_end(run)
        return path

    def _walk(self, keys: Sequence[bytes], n: int) -> list[int]:
        path: list[int] = []
        node, at = -1, 0
        while at < n:
            children = self._children[node] if node >= 0 else self._roots
            run = children.get(keys[at])
            if run is None:
                if node >= 0 and not children:
                    self._lengthen(node, keys, at, n)
                    return path
                path.append(self._new(node, bytearray().join(keys[at:n])))
                return path
            size = self.sizes[run]
            if at + size > n or self._keys[run][-KEY_BYTES:] != keys[at + size - 1]:
                size = self._common(run, keys, at, min(size, n - at))
                run = self._split(run, size)
            path.append(run)
            node, at = run, at + size
        return path

    def _lengthen(self, run: int, keys: Sequence[bytes], at: int, n: int) -> None:
        self._keys[run] += b"".join(keys[at:n])
        self.sizes[run] += n - at
        self.n_blocks += n - at

    def _common(self, run: int, keys: Sequence[bytes], at: int, most: int) -> int:
        """How many of the run's blocks the prompt has; at least one."""
        own, low, high = self._keys[run], 1, most
        while low < high:  # [0, low) are the same
            middle = (low + high + 1) // 2
            if own[KEY_BYTES * (middle - 1) : KEY_BYTES * middle] == keys[at + middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def _number(self) -> int:
        if self._free:
            return self._free.pop()
        self.sizes.append(0)
        self.parents.append(-1)
        self._keys.append(bytearray())
        self._children.append({})
        return len(self.sizes) - 1

    def _new(self, parent: int, keys: bytearray) -> int:
        run = self._number()
        self.sizes[run], self.parents[run] = len(keys) // KEY_BYTES, parent
        self._keys[run], self._children[run] = keys, {}
        (self._children[parent] if parent >= 0 else self._roots)[bytes(keys[:KEY_BYTES])] = run
        self.n_blocks += self.sizes[run]
        self._used[run] = None
        if self._watcher is not None:
            self._watcher.added(run)
        return run

    def _split(self, run: int, size: int) -> int:
        """The upper part of a run, which is new; the run is what is below it."""
        upper, parent, keys = self._number(), self.parents[run], self._keys[run]
        self.sizes[upper], self.parents[upper] = size, parent
        self._keys[upper] = keys[: KEY_BYTES * size]
        (self._children[parent] if parent >= 0 else self._roots)[bytes(keys[:KEY_BYTES])] = upper
        self._keys[run] = keys[KEY_BYTES * size :]
        self.sizes[run] -= size
        self.parents[run] = upper
        self._children[upper] = {bytes(self._keys[run][:KEY_BYTES]): run}
        self._used[upper] = None
        if self._watcher is not None:
            self._watcher.split(run, upper)
        return upper

    def _tidy(self) -> None:
        """Forgets of the oldest runs what is in no room; what is stays, and is young again."""
        for _ in range(min(TIDIED, len(self._used))):
            run = next(iter(self._used))
            needed = self.sizes[run] if self._children[run] else self._needed(run)
            if not needed:
                self._remove(run)
                continue
            self._used.move_to_end(run)
            if needed < self.sizes[run]:
                del self._keys[run][KEY_BYTES * needed :]
                self.n_blocks -= self.sizes[run] - needed
                self.sizes[run] = needed

    def _remove(self, run: int) -> None:
        if self._watcher is not None:
            self._watcher.removed(run)
        parent, keys = self.parents[run], self._keys[run]
        del (self._children[parent] if parent >= 0 else self._roots)[bytes(keys[:KEY_BYTES])]
        del self._used[run]
        self.n_blocks -= self.sizes[run]
        self.sizes[run], self.parents[run] = 0, -1
        self._keys[run] = bytearray()
        self._free.append(run)
