"""Events for a reader that is slow: a bounded queue, and a thread of the reader's own.

The subscriber only appends, since it runs in the thread that emits. The thread looks a few times a
second; waking it would cost the engine's scheduler more than the event does. What the queue has no
room for is dropped and counted (I7).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from kvmem import events

__all__ = ["Pump"]

MOST = 4096
EVERY_S = 0.25

log = logging.getLogger("kvmem")


class Pump:
    """See the module. Thread safety: all methods may be called from any thread.

    Args:
        bus: whose events.
        reader: is given what came since it was called last, and how many were dropped since.
        name: of the thread.
        most: events that may wait.
    """

    def __init__(
        self,
        bus: events.Bus,
        reader: Callable[[list[tuple[float, events.Event]], int], None],
        *,
        name: str,
        clock: Callable[[], float],
        most: int = MOST,
    ) -> None:
        self.dropped = 0
        self._told_dropped = 0
        self._reader = reader
        self._clock = clock
        self._most = most
        self._waiting: deque[tuple[float, events.Event]] = deque()
        self._turn = threading.Lock()  # held while the reader is called: that is their order
        self._closed = threading.Event()
        self._leave = bus.subscribe(self._take)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _take(self, event: events.Event) -> None:
        if len(self._waiting) >= self._most:
            self.dropped += 1
            return
        self._waiting.append((self._clock(), event))

    def flush(self) -> None:
        """Has the reader read what waits now, in this thread."""
        with self._turn:
            told = [self._waiting.popleft() for _ in range(len(self._waiting))]
            dropped = self.dropped - self._told_dropped
            self._told_dropped += dropped
            if told or dropped:
                self._reader(told, dropped)

    def close(self) -> None:
        """Ends the thread after all that waits was read."""
        self._leave()
        self._closed.set()
        self._thread.join(5.0)
        self._safely()

    def _run(self) -> None:
        while not self._closed.wait(EVERY_S):
            self._safely()

    def _safely(self) -> None:
        try:
            self.flush()
        except Exception:  # the top of a thread: a reader that fails misses events, no more (I9)
            log.exception("kvmem: a reader of events failed")
