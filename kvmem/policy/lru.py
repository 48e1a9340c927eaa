"""Least recently used, leaf first, over the runs of a `Room`."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from kvmem.policy.room import Room

__all__ = ["Lru"]


class Lru:
    """A use of a run is one of all above it: the room keeps when each was used last."""

    def __init__(self, room: Room, leaves: Iterable[int] = ()) -> None:
        self.room = room
        self._heap = [(float(room.last[run]), run) for run in leaves]
        heapq.heapify(self._heap)

    def used(self, path: Sequence[int], now_s: float) -> None:
        """A prompt's leaf is the newest."""
        if path[-1] in self.room.leaves:
            heapq.heappush(self._heap, (now_s, path[-1]))
        if len(self._heap) > 4 * len(self.room.leaves) + 64:
            self._again()

    def make_room(self) -> None:
        """Cuts the oldest leaves until no more is here than may be."""
        self.cut(self.room.capacity)

    def cut(self, to: int, before_s: float = float("inf")) -> None:
        """Cuts the oldest leaves, no newer ones than that."""
        room, heap = self.room, self._heap
        while room.used > to and heap:
            stamp, run = heap[0]
            if stamp >= before_s:
                return
            heapq.heappop(heap)
            if run not in room.leaves:
                continue
            if room.last[run] != stamp:  # used since, as part of a longer prompt
                heapq.heappush(heap, (float(room.last[run]), run))
                continue
            above = room.cut(run, room.used - to)
            if room.here[run]:
                heapq.heappush(heap, (stamp, run))
            elif above is not None:
                heapq.heappush(heap, (float(room.last[above]), above))

    def split(self, upper: int) -> None:
        """The room has split a run below this new one."""
        if upper in self.room.leaves:
            heapq.heappush(self._heap, (float(self.room.last[upper]), upper))

    def _again(self) -> None:
        self._heap = [(float(self.room.last[run]), run) for run in self.room.leaves]
        heapq.heapify(self._heap)
