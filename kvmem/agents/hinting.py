"""What agents do next, told to the engine: `POST /v1/kvmem/hints` of vLLM with kvmem in it.

Hints are put on their way and never waited for. At most one request is out at a time, and what
comes meanwhile goes with the next one (`kvmem.agents.waiting`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kvmem.agents.announcing import Hint
from kvmem.agents.waiting import CLOSE_S, PATH, Waiting

if TYPE_CHECKING:
    from kvmem.agents.wire import Wire

__all__ = ["EngineHints"]


class EngineHints:
    """An `Announcer` for one engine, in one event loop.

    Args:
        wire: to the engine.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._waiting = Waiting(wire.base_url)
        self._sending: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def off(self) -> bool:
        """Whether none are sent any more."""
        return self._closed or self._waiting.off

    @property
    def n_sent(self) -> int:
        """Hints that the engine took."""
        return self._waiting.n_sent

    @property
    def n_lost(self) -> int:
        """Hints that it did not."""
        return self._waiting.n_lost

    def announce(self, hint: Hint) -> None:
        """Puts a hint on its way."""
        if self._closed or not self._waiting.put(hint):
            return
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
        self._closed = True
        self._waiting.drop()

    async def _send(self) -> None:
        while self._waiting and not self.off:
            body, n = self._waiting.lot()
            self._waiting.answered(n, await self._wire.post(PATH, body))
