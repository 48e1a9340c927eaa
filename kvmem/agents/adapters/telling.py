"""Hints to an engine from any thread: `POST /v1/kvmem/hints` of vLLM with kvmem in it.

Frameworks call tools in threads and in event loops that come and go, so this has a thread of its
own. Hints are never waited for (`kvmem.agents.waiting`).
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from kvmem.agents.announcing import Hint
from kvmem.agents.waiting import CLOSE_S, PATH, Waiting

__all__ = ["EngineAnnouncer"]

log = logging.getLogger("kvmem.agents")
TIMEOUT_S = 10.0


class EngineAnnouncer:
    """An `Announcer` for one engine; a context manager.

    Args:
        base_url: the engine's own address, not the gateway's.
        api_key: the engine's.
    """

    def __init__(self, base_url: str, *, api_key: str = "") -> None:
        self._url = base_url.rstrip("/").removesuffix("/v1") + PATH
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._waiting = Waiting(self._url)  # under the lock of `_changed`
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvmem-hints", daemon=True)
        self._thread.start()

    def __enter__(self) -> EngineAnnouncer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def off(self) -> bool:
        """Whether the engine has no such endpoint, so that none are sent any more."""
        return self._waiting.off

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
        with self._changed:
            if not self._closing and self._waiting.put(hint):
                self._changed.notify()

    def close(self) -> None:
        """Sends what waits, for a moment at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        with self._changed:
            self._waiting.drop()

    def _run(self) -> None:
        import httpx

        with httpx.Client(timeout=TIMEOUT_S, headers=self._headers) as client:
            while not self.off and (lot := self._next()) is not None:
                body, n = lot
                try:
                    status = client.post(self._url, json=body).status_code
                except httpx.HTTPError as error:
                    log.info("%s: %s", self._url, type(error).__name__)
                    status = 0
                with self._changed:
                    self._waiting.answered(n, status)

    def _next(self) -> tuple[dict[str, Any], int] | None:
        """What goes next; nothing when it is closed and all has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.lot() if self._waiting else None
