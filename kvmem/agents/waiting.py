"""Hints that wait to be sent to an engine, and what its answers say of them.

What both senders share, the one of an event loop (`kvmem.agents.hinting`) and the one of any thread
(`kvmem.agents.adapters.telling`). Hints go in their order, in lots of one salt each, since the
engine looks for a session under the salt that it is told (I11). It has no lock of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from kvmem import hints
from kvmem.agents.announcing import Hint
from kvmem.hints import MOST_ACTIONS, AnyAction, envelope_of

__all__ = ["CLOSE_S", "MOST", "PATH", "Waiting"]

log = logging.getLogger("kvmem.agents")

PATH = "/v1/kvmem/hints"
MOST = 1024  # that wait
CLOSE_S = 2.0  # to send the last ones
ABSENT = frozenset({404, 405, 501})
NAME, TOOL = 256, 64  # characters that the contract allows


class Waiting:
    """At most `MOST` hints; the oldest give way. `off`: the server has no such endpoint, and is not
    asked again (I9). `n_lost` counts all that were taken and did not arrive."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._waiting: deque[tuple[str, AnyAction]] = deque(maxlen=MOST)
        self.off = False
        self.n_sent = self.n_lost = 0

    def __bool__(self) -> bool:
        """Whether something waits."""
        return bool(self._waiting)

    def put(self, hint: Hint) -> bool:
        """Takes a hint that the contract allows; whether it did."""
        if self.off or not hint.session_id or len(hint.session_id) > NAME:
            return False
        self.n_lost += len(self._waiting) == MOST
        self._waiting.append((hint.cache_salt, _action(hint)))
        return True

    def lot(self) -> tuple[dict[str, Any], int]:
        """The next request's body, and how many hints are in it. REQUIRES: something waits."""
        salt, first = self._waiting.popleft()
        batch = [first]
        while self._waiting and len(batch) < MOST_ACTIONS and self._waiting[0][0] == salt:
            batch.append(self._waiting.popleft()[1])
        return {**envelope_of(batch), "cache_salt": salt}, len(batch)

    def answered(self, n: int, status: int) -> None:
        """What the engine said to so many; 0 where it said nothing."""
        if status == 200:
            self.n_sent += n
            return
        self.n_lost += n
        if status in ABSENT:
            self.off = True
            log.info("%s takes no hints (%s): none are sent", self._server, status)
            self.drop()
        else:
            log.warning("%d hints to %s were lost: status %s", n, self._server, status)

    def drop(self) -> None:
        """What still waits is lost."""
        self.n_lost += len(self._waiting)
        self._waiting.clear()


def _action(hint: Hint) -> AnyAction:
    if hint.what == "session_end":
        return hints.SessionEnd(session=hint.session_id)
    tool = hint.tool[:TOOL] or "?"
    if hint.what == "tool_start":
        return hints.ToolStarted(session=hint.session_id, tool=tool)
    return hints.ToolEnded(session=hint.session_id, tool=tool)
