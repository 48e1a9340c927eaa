"""The order "agents": what a `Keeper` says that prompts are worth, and LRU where that does better.

It decides for one `Room`, which may be a model of a cache (in replay) or the table of a real one
(`kvmem.cache.keeping`). Beside it plain LRU is played on the same prompts in a room of its own;
while LRU decides, the keeper's order is played in a third.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmem.policy.duel import Duel
from kvmem.policy.keeper import Keeper
from kvmem.policy.lru import Lru
from kvmem.policy.room import Room

__all__ = ["Agents"]

LEARN_EVERY = 32  # prompts; with many branches fewer times, since it looks at each
FIRST = 64  # leaves that are sorted first
SPARE = 512  # that share of the room more is made at once, so that worths are not asked each time

Runs = npt.NDArray[np.int64]
Worths = npt.NDArray[np.float64]


class Plain(Protocol):
    """LRU as it decides for the room itself."""

    def used(self, path: Sequence[int], now_s: float) -> None:
        """A prompt was used."""

    def make_room(self) -> None:
        """Cuts until no more is here than may be."""

    def split(self, upper: int) -> None:
        """The room has split a run below this new one."""


class Agents:
    """See the module.

    Args:
        room: what is decided for.
        plain: makes what decides for it while LRU does; by default an `Lru` of its own.
        spare: blocks that are cut at once beyond those that must go.
    """

    def __init__(
        self,
        room: Room,
        plain: Callable[[Room], Plain] | None = None,
        *,
        spare: int | None = None,
    ) -> None:
        self._spare = room.capacity // SPARE if spare is None else spare
        self.room = room
        self.keeper, self.duel = Keeper(), Duel()
        self._plain = plain if plain is not None else lambda room: Lru(room, room.leaves)
        self._lru_room = Room(room.forest, room.capacity)
        self._lru = Lru(self._lru_room)
        self._real_lru: Plain | None = None
        self._keeper_room = room  # the same until then
        self._n, self._learn_at = 0, LEARN_EVERY
        self._parents = np.array([*room.forest.parents, -1], np.int64)
        self.also: list[Room] = []  # other tiers of the same prompts

    @property
    def rooms(self) -> list[Room]:
        """Those that it decides for, and those that it plays beside."""
        shadow = [self._keeper_room] if self._keeper_room is not self.room else []
        return [self.room, self._lru_room, *shadow, *self.also]

    def used(self, path: Sequence[int], hits: int, now_s: float, agent: str | None = None) -> int:
        """A prompt was answered and filled in; so many of its blocks had been here. Its branch.

        `agent`: who sends it, where that is known; see `Keeper.used`.
        """
        branch = self.keeper.used(path, now_s, agent)
        sizes = self.room.forest.sizes
        asked = sum(sizes[run] for run in path)
        shadow = self._keeper_room
        first = hits if shadow is self.room else shadow.hits(path)
        second = self._lru_room.hits(path)
        self._play(path, now_s)
        before = self.duel.second
        self.duel.played(asked, first, second)
        if before and not self.duel.second:
            self._keeper_room = self.room  # it goes on with what LRU left
        if self.duel.second and not before:
            self._keeper_room = Room.copy(self.room)
            self._real_lru = self._plain(self.room)
        elif self._real_lru is not None and self.duel.second:
            self._real_lru.used(path, now_s)
        for room in self.also:
            room.fill(path, now_s)
        self._n += 1
        if self._n >= self._learn_at:
            self._learn_at = self._n + max(LEARN_EVERY, self.keeper.n_branches // LEARN_EVERY)
            self.keeper.learn(now_s)
        return branch

    def _play(self, path: Sequence[int], now_s: float) -> None:
        """The prompt in the rooms beside."""
        self._lru_room.fill(path, now_s)
        self._lru.used(path, now_s)
        self._lru.make_room()
        shadow = self._keeper_room
        if shadow is not self.room:
            shadow.fill(path, now_s)
            self._make(shadow, now_s)

    def extended(self, branch: int, path: Sequence[int], now_s: float) -> None:
        """The prompt's reply is here, too, and part of what the next one extends."""
        self.keeper.extended(branch, path[-1])
        self._play(path, now_s)
        for room in (self.room, *self.also):
            room.fill(path, now_s)

    def waits(self, branch: int, kind: str, now_s: float) -> None:
        """An orchestrator says what the branch waits for now."""
        self.keeper.waits(branch, kind, now_s)

    def make_room(self, now_s: float) -> None:
        """By whoever leads."""
        if self.duel.second and self._real_lru is not None:
            self._real_lru.make_room()
        else:
            self._make(self.room, now_s)

    def _make(self, room: Room, now_s: float) -> None:
        # A shadow may be over its capacity for as long as it is under it: half as many choices.
        if room.used > room.capacity + (self._spare if room is not self.room else 0):
            self.trim(room, now_s, room.capacity - self._spare)

    def trim(self, room: Room, now_s: float, to: int) -> None:
        """Cuts the ends of the branches worth least, until there is no excess."""
        runs, worths = self.keeper.worths(now_s)
        at = self._standing(room, runs)
        known = at >= 0
        asked = np.bincount(at[known], worths[known], minlength=len(room.here))
        of = np.asarray(asked, np.float64)
        order = _ordered(np.fromiter(room.leaves, np.int64, len(room.leaves)), of, room.last)
        bare: list[tuple[float, float, int]] = []  # leaves that were none
        leaf = next(order, -1)
        while room.excess(to) > 0 and (bare or leaf >= 0):
            run = leaf
            if bare and (run < 0 or bare[0][:2] < (of[run], room.last[run])):
                run = heapq.heappop(bare)[2]
            else:
                leaf = next(order, -1)
            above = room.cut(run, room.excess(to))
            if room.here[run] == 0 and room.forest.parents[run] >= 0:
                of[room.forest.parents[run]] += of[run]  # those that were cut ask for it, too
            if above is not None:
                heapq.heappush(bare, (float(of[above]), float(room.last[above]), above))

    def _standing(self, room: Room, runs: Runs) -> Runs:
        """The run at which each branch's blocks end in the room, -1 for none.

        Once nothing of a branch's run is here it is looked for from where it was found last time
        on, until a prompt of the branch fills it again.
        """
        known_runs, at = room.ends if room.ends is not None else (runs[:0], runs[:0])
        fresh = np.ones(len(runs), bool)
        fresh[: len(known_runs)] = known_runs != runs[: len(known_runs)]
        at = np.where(fresh, runs, np.resize(at, len(runs))) if len(at) else runs.copy()
        while (up := room.empty[at]).any():
            at[up] = self._parents[at[up]]
        room.ends = (runs.copy(), at)
        return at

    # -- a tree that grows -------------------------------------------------------------------

    def added(self, run: int) -> None:
        """There is a run more, or one that was no more is another one now."""
        for room in self.rooms:
            room.grow()
        if run >= len(self._parents) - 1:
            grown = np.full(2 * run + 2, -1, np.int64)
            grown[: len(self._parents) - 1] = self._parents[:-1]
            self._parents = grown
        self._parents[run] = self.room.forest.parents[run]

    def split(self, run: int, upper: int) -> None:
        """The beginning of a run is a run of its own now, above it."""
        self.added(upper)
        self._parents[run] = upper
        for room in self.rooms:
            room.split(run, upper)
        self._lru.split(upper)
        if self._real_lru is not None:
            self._real_lru.split(upper)

    def removed(self, run: int) -> None:
        """A run without children is no more; it must be empty in all `rooms`."""
        self.keeper.forget(run)
        for room in self.rooms:
            if room.ends is not None:
                room.ends[0][room.ends[0] == run] = -2


def _ordered(leaves: Runs, of: Worths, last: Worths) -> Iterator[int]:
    """The leaves worth least first, then those used longest ago. Mostly few are asked for, so only
    they are sorted; the rest when they are."""
    worths = of[leaves]
    if len(leaves) > 4 * FIRST:
        low = worths <= np.partition(worths, FIRST)[FIRST]
        yield from _sorted(leaves[low], worths[low], last)
        leaves, worths = leaves[~low], worths[~low]
    yield from _sorted(leaves, worths, last)


def _sorted(leaves: Runs, worths: Worths, last: Worths) -> list[int]:
    order: list[int] = leaves[np.lexsort((last[leaves], worths))].tolist()
    return order
