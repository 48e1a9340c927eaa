"""What agents do next, told to the engine: `POST /v1/kvmem/hints` of vLLM with kvmem in it.

Hints are put on their way and never waited for. At most one request is out at a time, and what
comes meanwhile goes with the next one; of more than `MOST` that wait the oldest are dropped. A
server without the endpoint is asked once (I9).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from kvmem import hints
from kvmem.agents.announcing import Hint
from kvmem.hints import MOST_ACTIONS, AnyAction, envelope_of

if TYPE_CHECKING:
    from kvmem.agents.wire import Wire

__all__ = ["EngineHints"]

log = logging.getLogger("kvmem.agents")

PATH = "/v1/kvmem/hints"
MOST = 1024  # that wait
CLOSE_S = 2.0  # to send the last ones
ABSENT = frozenset({404, 405, 501})
NAME, TOOL = 256, 64  # characters that the contract allows


class EngineHints:
    """An `Announcer` for one engine, in one event loop.

    Args:
        wire: to the engine.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._waiting: deque[tuple[str, AnyAction]] = deque(maxlen=MOST)
        self._sending: asyncio.Task[None] | None = None
        self.off = False
        self.n_sent = self.n_lost = 0

    def announce(self, hint: Hint) -> None:
        """Puts a hint on its way."""
        if self.off or not hint.session_id or len(hint.session_id) > NAME:
            return
        self.n_lost += len(self._waiting) == MOST
        self._waiting.append((hint.cache_salt, _action(hint)))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())

    async def close(self) -> None:
        """Sends what waits, for a moment at most."""
        sending = self._sending
        if sending is not None and not sending.done():
            await asyncio.wait({sending}, timeout=CLOSE_S)
            if not sending.done():
                sending.cancel()
                await asyncio.wait({sending})
        self.off = True

    async def _send(self) -> None:
        while self._waiting and not self.off:
            salt, first = self._waiting.popleft()
            batch = [first]
            while self._waiting and len(batch) < MOST_ACTIONS and self._waiting[0][0] == salt:
                batch.append(self._waiting.popleft()[1])
            status = await self._wire.post(PATH, {**envelope_of(batch), "cache_salt": salt})
            if status in ABSENT:
                self.off = True
                self._waiting.clear()
                log.info("%s takes no hints (%s): none are sent", self._wire.base_url, status)
            elif status != 200:
                self.n_lost += len(batch)
                log.warning("%d hints were lost: status %s", len(batch), status)
            else:
                self.n_sent += len(batch)


def _action(hint: Hint) -> AnyAction:
    if hint.what == "session_end":
        return hints.SessionEnd(session=hint.session_id)
    tool = hint.tool[:TOOL] or "?"
    if hint.what == "tool_start":
        return hints.ToolStarted(session=hint.session_id, tool=tool)
    return hints.ToolEnded(session=hint.session_id, tool=tool)
