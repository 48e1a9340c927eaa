"""Eviction orders to compare: each is told of every prompt and makes room in a `Room`.

lru      least recently used, leaf first
ttl      lru, and what was not used for five minutes goes whatever room there is
s3fifo   S3-FIFO (J. Yang et al., SOSP 2023), with a run in place of an object
arc      ARC (N. Megiddo, D. Modha, FAST 2003), likewise
belady   furthest next use, leaf first: no order that keeps prefixes closed gets more
kvmem    kvmem.policy, from what the cache sees; with hints also from what agents say
"""

from __future__ import annotations

import bisect
import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

from kvmem.explain.replay.forest import Forest
from kvmem.policy import Agents, Duel, Lru, Room

__all__ = ["ORDERS", "Order", "make_order"]

NEVER = 1 << 62
TTL_S = 300.0
SMALL = 10  # S3-FIFO's share of the small queue: a tenth


class Order(Protocol):
    """Decides for one `Room`."""

    def used(self, prompt: int, path: tuple[int, ...], hits: int, now_s: float, agent: str) -> None:
        """A prompt was answered and filled in; so many of its blocks had been here."""

    def make_room(self, now_s: float) -> None:
        """Cuts until no more is here than may be."""

    def waits(self, prompt: int, kind: str, now_s: float) -> None:
        """An agent said what follows on a prompt's reply."""


class _Plain:
    """An order without hints."""

    def __init__(self, room: Room) -> None:
        self.room = room

    def waits(self, prompt: int, kind: str, now_s: float) -> None:
        """Nothing is made of it."""


class LeastRecent(_Plain):
    """See the module."""

    def __init__(self, room: Room) -> None:
        super().__init__(room)
        self._lru = Lru(room)

    def used(self, prompt: int, path: tuple[int, ...], hits: int, now_s: float, agent: str) -> None:
        """Its leaf is the newest."""
        self._lru.used(path, now_s)

    def make_room(self, now_s: float) -> None:
        """Cuts the oldest leaves."""
        self._lru.make_room()


class Ttl(LeastRecent):
    """See the module."""

    def make_room(self, now_s: float) -> None:
        """Cuts what is too old, then the oldest."""
        self._lru.cut(0, now_s - TTL_S)
        self._lru.make_room()


class Belady(_Plain):
    """See the module."""

    def __init__(self, room: Room, forest: Forest) -> None:
        super().__init__(room)
        self._uses = forest.next_uses()
        self._at = [0] * len(self._uses)
        self._heap: list[tuple[int, int]] = []
        self._now = 0

    def _next(self, run: int) -> int:
        uses = self._uses[run]
        at = bisect.bisect_right(uses, self._now, self._at[run])
        self._at[run] = at
        return uses[at] if at < len(uses) else NEVER

    def used(self, prompt: int, path: tuple[int, ...], hits: int, now_s: float, agent: str) -> None:
        """Its leaf has a new next use."""
        self._now = prompt
        if path[-1] in self.room.leaves:
            heapq.heappush(self._heap, (-self._next(path[-1]), path[-1]))

    def make_room(self, now_s: float) -> None:
        """Cuts the leaves that are used again last."""
        room, heap = self.room, self._heap
        while room.used > room.capacity:
            stamp, run = heapq.heappop(heap)
            if run not in room.leaves:
                continue
            when = self._next(run)
            if when != -stamp:
                heapq.heappush(heap, (-when, run))
                continue
            above = room.cut(run, room.used - room.capacity)
            if room.here[run]:
                heapq.heappush(heap, (stamp, run))
            elif above is not None:
                heapq.heappush(heap, (-self._next(above), above))


class S3Fifo(_Plain):
    """See the module. A run that can't go yet is put aside until it is a leaf."""

    def __init__(self, room: Room) -> None:
        super().__init__(room)
        n = len(room.forest.sizes)
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._where = bytearray(n)  # 0 nowhere, 1 small, 2 main
        self._aside = bytearray(n)
        self._count = bytearray(n)
        self._small_blocks = 0
        self._gone: OrderedDict[int, int] = OrderedDict()
        self._gone_blocks = 0

    def used(self, prompt: int, path: tuple[int, ...], hits: int, now_s: float, agent: str) -> None:
        """Runs that were here are counted, new ones enter."""
        sizes, done = self.room.forest.sizes, 0
        for run in path:
            done += sizes[run]
            if self._where[run]:
                if done <= hits:
                    self._count[run] = min(3, self._count[run] + 1)
                continue
            known = run in self._gone
            if known:
                self._gone_blocks -= self._gone.pop(run)
            self._where[run] = 2 if known else 1
            self._small_blocks += 0 if known else sizes[run]
            (self._main if known else self._small).append(run)

    def make_room(self, now_s: float) -> None:
        """From the small queue while that is too long, else from the main one."""
        while self.room.used > self.room.capacity:
            small = self._small_blocks > self.room.capacity // SMALL or not self._main
            if small and self._small:
                self._take(self._small)
            elif self._main:
                self._take(self._main)
            else:
                return

    def _take(self, queue: deque[int]) -> None:
        run = queue.popleft()
        room, size = self.room, self.room.forest.sizes[run]
        if self._count[run]:
            if self._where[run] == 1:
                self._small_blocks -= size
                self._where[run], self._count[run] = 2, 0
            else:
                self._count[run] -= 1
            self._main.append(run)
            return
        if run not in room.leaves:
            self._aside[run] = 1
            return
        above = room.cut(run, room.used - room.capacity)
        if room.here[run]:
            queue.appendleft(run)
            return
        if self._where[run] == 1:
            self._small_blocks -= size
            self._remember(run, size)
        self._where[run] = 0
        if above is not None and self._aside[above]:
            self._aside[above] = 0
            (self._small if self._where[above] == 1 else self._main).appendleft(above)

    def _remember(self, run: int, size: int) -> None:
        self._gone[run] = size
        self._gone_blocks += size
        while self._gone_blocks > self.room.capacity:
            _, gone = self._gone.popitem(last=False)
            self._gone_blocks -= gone


class Arc(_Plain):
    """See the module. `_recent` and `_often` are its T1 and T2, `_gone` its B1 and B2."""

    def __init__(self, room: Room) -> None:
        super().__init__(room)
        self._often = bytearray(len(room.forest.sizes))
        self._heaps: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])
        self._blocks = [0, 0]
        self._gone: tuple[OrderedDict[int, int], OrderedDict[int, int]] = (
            OrderedDict(), OrderedDict(),
        )  # fmt: skip
        self._gone_blocks = [0, 0]
        self._before = [0] * len(room.forest.sizes)
        self._target = 0.0  # blocks that T1 should have

    def used(self, prompt: int, path: tuple[int, ...], hits: int, now_s: float, agent: str) -> None:
        """A second use makes a run one of those used often; a ghost's moves the target."""
        here = self.room.here
        for run in path:
            before, after = self._before[run], here[run]
            list_before = self._often[run]
            ghost = next((i for i in (0, 1) if run in self._gone[i]), None)
            if ghost is not None:
                n = self._gone[ghost].pop(run)
                self._gone_blocks[ghost] -= n
                other = max(1, self._gone_blocks[1 - ghost])
                step = n * max(1.0, other / max(1, self._gone_blocks[ghost] + n))
                moved = self._target + (step if ghost == 0 else -step)
                self._target = min(float(self.room.capacity), max(0.0, moved))
            again = before > 0 or ghost is not None
            if again and not list_before:
                self._blocks[0] -= before
                self._blocks[1] += after
                self._often[run] = 1
            else:
                self._blocks[list_before] += after - before
            self._before[run] = after
        if path[-1] in self.room.leaves:
            heapq.heappush(self._heaps[self._often[path[-1]]], (now_s, path[-1]))

    def make_room(self, now_s: float) -> None:
        """From T1 while it is beyond its target, else from T2."""
        while self.room.used > self.room.capacity:
            first = 0 if self._blocks[0] > self._target else 1
            if not self._take(first) and not self._take(1 - first):
                return

    def _take(self, of: int) -> bool:
        room, heap = self.room, self._heaps[of]
        while heap:
            stamp, run = heapq.heappop(heap)
            if run not in room.leaves:
                continue
            if self._often[run] != of or room.last[run] != stamp:
                heapq.heappush(self._heaps[self._often[run]], (room.last[run], run))
                continue
            before = room.here[run]
            above = room.cut(run, room.used - room.capacity)
            cut = before - room.here[run]
            self._blocks[of] -= cut
            self._before[run] = room.here[run]
            self._ghost(of, run, cut)
            if room.here[run]:
                heapq.heappush(heap, (room.last[run], run))
            elif above is not None:
                heapq.heappush(self._heaps[self._often[above]], (room.last[above], above))
            if not room.here[run]:
                self._often[run] = 0
            return True
        return False

    def _ghost(self, of: int, run: int, n: int) -> None:
        gone = self._gone[of]
        gone[run] = gone.pop(run, 0) + n
        self._gone_blocks[of] += n
        while self._gone_blocks[of] > self.room.capacity:
            _, old = gone.popitem(last=False)
            self._gone_blocks[of] -= old


class Kvmem:
    """See the module: the policy as the engine has it, over the runs of a trace."""

    def __init__(self, room: Room, *, hints: bool) -> None:
        self.room, self.hints = room, hints
        self.agents = Agents(room)
        self._branch_of: dict[int, int] = {}

    @property
    def duel(self) -> Duel:
        """Whether LRU leads."""
        return self.agents.duel

    def used(self, prompt: int, path: tuple[int, ...], hits: int, now_s: float, agent: str) -> None:
        """Plays it in the shadows, too."""
        known = (agent or None) if self.hints else None
        self._branch_of[prompt] = self.agents.used(path, hits, now_s, known)

    def waits(self, prompt: int, kind: str, now_s: float) -> None:
        """What an agent knows by now."""
        branch = self._branch_of.pop(prompt, None)
        if branch is not None and self.hints:
            self.agents.waits(branch, kind, now_s)

    def make_room(self, now_s: float) -> None:
        """By whoever leads."""
        self.agents.make_room(now_s)


ORDERS: Sequence[str] = ("lru", "ttl", "s3fifo", "arc", "kvmem", "kvmem_hints", "belady")


def make_order(name: str, forest: Forest, capacity: int) -> tuple[Room, Order]:
    """An order of this name, and the room that it decides for.

    Raises:
        KeyError: it is not one of `ORDERS`.
    """
    room = Room(forest, capacity)
    if name == "belady":
        return room, Belady(room, forest)
    plain = {"lru": LeastRecent, "ttl": Ttl, "s3fifo": S3Fifo, "arc": Arc}
    if name in plain:
        return room, plain[name](room)
    return room, Kvmem(room, hints={"kvmem": False, "kvmem_hints": True}[name])
