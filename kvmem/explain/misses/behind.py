"""Work that is done behind another thread: in order, soon, and never in its way.

Jobs are handed in by one thread, cheaply. They run on a thread of their own once `wake` was called,
or at once in the thread that calls `finish`, whoever is first: in the order in which they came, one
at a time. The queue has a bound; what is beyond it is not done at all (I7, I9).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Behind"]

MOST = 4096
MANY = 32
EVERY = 8

Job = Callable[[], None]


class Behind:
    """See the module. `failed` is told of a job that raised; the next ones run all the same."""

    def __init__(self, name: str, failed: Callable[[Exception], None]) -> None:
        self._name = name
        self._failed = failed
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()  # held while a job is taken and done: that is their order
        # Held while the thread has nothing to do; an Event costs several times as much to set.
        self._gate = threading.Lock()
        self._gate.acquire()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._soon, self._asked = False, 0

    @property
    def waiting(self) -> int:
        """Jobs that are not done."""
        return len(self._jobs)

    def add(self, job: Job, *, soon: bool = False) -> bool:
        """Hands in a job; False where too many wait. One that is not needed `soon` may wait for
        others, since waking a thread costs more than handing in a job."""
        if len(self._jobs) >= MOST or self._closed:
            return False
        self._jobs.append(job)
        self._soon = self._soon or soon
        return True

    def wake(self, *, now: bool = False) -> None:
        """The thread may begin, if there is much for it, or something that was asked `EVERY` times
        for: on a machine at rest waking it takes 30 us, as much as a job."""
        if self._closed or not self._jobs:
            return
        self._asked += self._soon
        if not now and self._asked < EVERY and len(self._jobs) < MANY:
            return
        self._soon, self._asked = False, 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._open()

    def _open(self) -> None:
        if self._gate.locked():  # nobody but the one thread that calls this opens it
            self._gate.release()

    def finish(self) -> None:
        """Returns when all jobs are done."""
        while self._jobs:
            self._one()
        with self._lock:  # the last one may be the thread's, and under way
            pass

    def close(self) -> None:
        """Ends the thread; jobs that wait are not done."""
        self._closed = True
        self._jobs.clear()
        if self._thread is not None:
            self._open()
            self._thread.join(5.0)
            self._thread = None

    def _run(self) -> None:
        while True:
            self._gate.acquire()
            if self._closed:
                return
            while self._jobs:
                self._one()

    def _one(self) -> None:
        with self._lock:
            if not self._jobs:
                return
            job = self._jobs.popleft()
            try:
                job()
            except Exception as error:  # noqa: BLE001 the top of a thread: the next job runs (I9)
                self._failed(error)
