"""Hints to an engine from any thread: `POST /v1/kvmem/hints` of vLLM with kvmem in it.

Frameworks call tools in threads and in event loops that come and go, so this has a thread of its
own. Hints are never waited for; of more than `MOST` that wait the oldest are dropped, and a server
without the endpoint is asked once (I9).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

from kvmem.agents.announcing import Hint

__all__ = ["EngineAnnouncer"]

log = logging.getLogger("kvmem.agents")
PATH = "/v1/kvmem/hints"
MOST, AT_ONCE = 1024, 16  # that wait; that one request may carry
TIMEOUT_S, CLOSE_S = 10.0, 2.0
NAME, TOOL = 256, 64  # characters that the contract allows
ABSENT = frozenset({404, 405, 501})


class EngineAnnouncer:
    """An `Announcer` for one engine; a context manager.

    Args:
        base_url: the engine's own address, not the gateway's.
        api_key: the engine's.
    """

    def __init__(self, base_url: str, *, api_key: str = "") -> None:
        self._url = base_url.rstrip("/").removesuffix("/v1") + PATH
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MOST)
        self._changed = threading.Condition()
        self._closing = False
        self.off = False
        self.n_sent = self.n_lost = 0
        self._thread = threading.Thread(target=self._run, name="kvmem-hints", daemon=True)
        self._thread.start()

    def __enter__(self) -> EngineAnnouncer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def announce(self, hint: Hint) -> None:
        """Puts a hint on its way."""
        if not hint.session_id or len(hint.session_id) > NAME:
            return
        with self._changed:
            if self.off or self._closing:
                return
            self.n_lost += len(self._waiting) == MOST
            self._waiting.append(_action(hint))
            self._changed.notify()

    def close(self) -> None:
        """Sends what waits, for a moment at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        import httpx

        with httpx.Client(timeout=TIMEOUT_S, headers=self._headers) as client:
            while batch := self._next():
                body = {"version": 1, "actions": batch}
                try:
                    status = client.post(self._url, json=body).status_code
                except httpx.HTTPError as error:
                    log.info("%s: %s", self._url, type(error).__name__)
                    status = 0
                with self._changed:
                    if status in ABSENT:
                        self.off = True
                        self._waiting.clear()
                        log.info("%s takes no hints (%s): none are sent", self._url, status)
                        return
                    self.n_sent += len(batch) if status == 200 else 0
                    self.n_lost += len(batch) if status != 200 else 0

    def _next(self) -> list[dict[str, Any]]:
        """What goes next; nothing when it is closed and all has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), AT_ONCE))]


def _action(hint: Hint) -> dict[str, Any]:
    if hint.what == "session_end":
        return {"do": "session_end", "session": hint.session_id}
    do = "tool_started" if hint.what == "tool_start" else "tool_ended"
    return {"do": do, "session": hint.session_id, "tool": hint.tool[:TOOL] or "?"}
