"""Looks at blocks in the host tier that nobody asks for, so that damage is found before they do.

A thread walks over the published slots, again and again, at a rate, and compares their bytes with
the checksums they were stored with. What it finds it only notes: the owner of the index takes it,
in its own thread, and quarantines it before the next prompt is answered.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem._core import SlotScrubber
from kvmem.store.arena import Arena

__all__ = ["List", "Scrub"]

AT_A_TIME = 32  # slots
BAD = 1
IDLE_S = 5.0  # between passes over nothing
# Published blocks in slots [first, first + n): slots, generations, keys [n * 32].
List = Callable[
    [int, int], tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]
]


class Scrub:
    """See the module; `close` ends it, and must, before the arena is unmapped.

    Args:
        arena: whose slots.
        published: what is to be looked at; asked from the scrub's thread.
        bytes_s: at most so many bytes a second.
    """

    def __init__(self, arena: Arena, published: List, bytes_s: float) -> None:
        self._scrubber = SlotScrubber(np.frombuffer(arena.buffer, np.uint8))
        self._n_slots = arena.header.n_slots
        self._published = published
        self._bytes_s = bytes_s
        self._bad: deque[tuple[int, int, bytes]] = deque()
        self._closing = threading.Event()
        self.bytes = 0
        self.blocks = 0
        self.passes = 0
        self.faults = 0
        self._thread = threading.Thread(target=self._run, name="kvmem-scrub", daemon=True)
        self._thread.start()

    def take(self) -> list[tuple[int, int, bytes]]:
        """What was found bad since last asked: slot, generation, key."""
        found = []
        while self._bad:
            found.append(self._bad.popleft())
        return found

    def look(self, first: int) -> int:
        """Looks at the next slots from `first` on; the answer is the bytes that it read."""
        slots, generations, keys = self._published(first, AT_A_TIME)
        if not len(slots):
            return 0
        found, n_bytes = self._scrubber.check(slots, generations)
        for i in np.flatnonzero(found == BAD).tolist():
            self.faults += 1
            key = keys[32 * i : 32 * (i + 1)].tobytes()
            self._bad.append((int(slots[i]), int(generations[i]), key))
        self.blocks += len(slots)
        self.bytes += n_bytes
        return n_bytes

    def pause_s(self, n_bytes: int) -> float:
        """How long to wait after so many bytes."""
        return n_bytes / self._bytes_s

    def stats(self) -> dict[str, Any]:
        """What was looked at since the start."""
        return {
            "bytes": self.bytes, "blocks": self.blocks, "passes": self.passes,
            "faults": self.faults,
        }  # fmt: skip

    def close(self) -> None:
        """Returns when the thread has ended."""
        self._closing.set()
        self._thread.join()
        del self._scrubber

    def _run(self) -> None:
        first = before = 0
        while not self._closing.is_set():
            n_bytes = self.look(first)
            first += AT_A_TIME
            pause_s = self.pause_s(n_bytes)
            if first >= self._n_slots:
                first, self.passes = 0, self.passes + 1
                if self.blocks == before:  # there is nothing yet
                    pause_s = IDLE_S
                before = self.blocks
            if pause_s:
                self._closing.wait(pause_s)
