"""Looks at blocks in the host tier that nobody asks for, so that damage is found before they do.

A thread walks over the published slots, again and again, at a rate, and compares their bytes with
the checksums they were stored with. What it finds it only notes: the owner of the index takes it,
in its own thread, and quarantines it before the next prompt is answered. No lock is held while
bytes are read: a slot that is written meanwhile has moved on, and that is no fault.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem._core import SlotScrubber
from kvmem.store.arena import Arena

__all__ = ["List", "Scrub"]

AT_A_TIME = 256  # slots that are asked for: the index is locked for some microseconds
BURST_BYTES = 4 << 20  # read without a pause, or one block where that is more
BAD, MOVED_ON = 1, 2
PASS_S = 5.0  # a pass takes so long at least: over few blocks it would never end to begin anew
# Published blocks in slots [first, first + n): slots, generations, keys [n * 32].
List = Callable[
    [int, int], tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]
]

log = logging.getLogger("kvmem")


class Scrub:
    """See the module; `close` ends it.

    A thread that failed has ended, with the reason in `error`; the engine goes on without it (I9).

    Args:
        arena: whose slots.
        published: what is to be looked at; asked from the scrub's thread.
        bytes_s: at most so many bytes a second.
        wait: waits so long and tells whether it is to end; for tests, else it is `close` that says.
    """

    def __init__(
        self,
        arena: Arena,
        published: List,
        bytes_s: float,
        *,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._scrubber: SlotScrubber | None = SlotScrubber(np.frombuffer(arena.buffer, np.uint8))
        header = arena.header
        self._n_slots = header.n_slots
        self._burst = max(1, BURST_BYTES // (header.slot_bytes * header.ranks))
        self._published = published
        self._bytes_s = bytes_s
        self._bad: deque[tuple[int, int, bytes]] = deque()
        self._closing = threading.Event()
        self._wait = wait if wait is not None else self._closing.wait
        self.error: str | None = None
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

    def look(self, first: int, pause: Callable[[int], bool] = lambda n_bytes: False) -> int:
        """Looks at the blocks in the next slots from `first` on; the answer is what it read.

        `pause` is told the bytes of each burst, and ends the look where it answers True.
        """
        slots, generations, keys = self._published(first, AT_A_TIME)
        total = 0
        for low in range(0, len(slots), self._burst):
            burst = slice(low, low + self._burst)
            n_bytes = self._look(slots[burst], generations[burst], keys[32 * low :])
            total += n_bytes
            if pause(n_bytes):
                break
        return total

    def _look(
        self,
        slots: npt.NDArray[np.int32],
        generations: npt.NDArray[np.uint64],
        keys: npt.NDArray[np.uint8],
    ) -> int:
        assert self._scrubber is not None
        found, n_bytes = self._scrubber.check(slots, generations)
        for i in np.flatnonzero(found != 0).tolist():
            slot, generation = int(slots[i]), int(generations[i])
            if found[i] == BAD or self._still_published(slot, generation):
                self.faults += 1  # before it can be taken: loads are checked from here on
                self._bad.append((slot, generation, keys[32 * i : 32 * (i + 1)].tobytes()))
        self.blocks += int(np.count_nonzero(found != MOVED_ON))
        self.bytes += n_bytes
        return n_bytes

    def _still_published(self, slot: int, generation: int) -> bool:
        """Whether a slot that says it moved on has not: then its stamp is damaged.

        A generation is published once and for one stretch of time, and nobody writes the slot's
        stamp before the next one is reserved.
        """
        slots, generations, _ = self._published(slot, 1)
        return bool(len(slots)) and int(generations[0]) == generation

    def stats(self) -> dict[str, Any]:
        """What was looked at since the start."""
        return {
            "bytes": self.bytes, "blocks": self.blocks, "passes": self.passes,
            "faults": self.faults, "on": self._thread.is_alive(),
        }  # fmt: skip

    def close(self) -> None:
        """Returns when the thread has ended and nothing of it reads the arena; again is fine."""
        self._closing.set()
        self._thread.join()
        self._scrubber = None

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._pass()
        except Exception as error:  # the top of a thread: the engine goes on without it (I9)
            log.exception("kvmem: the scrub failed; blocks are checked as they are loaded")
            self.error = f"{type(error).__name__}: {error}"

    def _pass(self) -> None:
        """Looks at all that is published, as fast as it may."""
        before = self.bytes

        def pause(n_bytes: int) -> bool:
            return self._wait(n_bytes / self._bytes_s) or self._closing.is_set()

        for first in range(0, self._n_slots, AT_A_TIME):
            self.look(first, pause)
            if self._closing.is_set():
                return
        self.passes += 1
        spare_s = PASS_S - (self.bytes - before) / self._bytes_s
        if spare_s > 0:
            self._wait(spare_s)
