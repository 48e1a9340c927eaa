"""The page of counters that `kvmem stats` reads from a running engine's arena."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvmem.engines.vllm.seen import Totals
from kvmem.store.arena import Arena
from kvmem.types import Quarantine

__all__ = ["Page"]

RECENT = 32
EVERY_S = 0.25
REQUEST_ID_CHARS = 96
FAILURE_CHARS = 400


class Page:
    """The last requests, failures and totals of an engine, written where others can look.

    Args:
        arena: whose stats region the page is.
        model: for people.
        block_bytes: bytes of a slot, all ranks together.
        allowed: whether the settings allow "loads" and "stores".
    """

    def __init__(
        self, arena: Arena, *, model: str, block_bytes: int, allowed: dict[str, bool]
    ) -> None:
        self.totals = Totals()
        self.failures = 0
        self.last_failure: str | None = None
        self._arena = arena
        self.model = model
        self._block_bytes = block_bytes
        self._allowed = allowed
        # A streamed response has no room for its receipt: the last few stand on the page.
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._written_s = 0.0
        self._due = True

    def touch(self) -> None:
        """The next `write` does not wait for its turn."""
        self._due = True

    def finished(self, request_id: str, tokens: dict[str, int]) -> None:
        """Notes a request that is over."""
        # The id is a client's to choose, and the page has an end.
        self._recent.append({"request_id": request_id[:REQUEST_ID_CHARS], **tokens})
        self._due = True

    def failed(self, where: str, error: str) -> None:
        """Notes a failure inside kvmem."""
        self.failures += 1
        self.last_failure = f"{where}: {error}"[:FAILURE_CHARS]
        self._due = True

    def _disk(self, below: dict[str, Any] | None) -> dict[str, Any] | None:
        if below is None:
            return None
        same = ("on", "written", "read", "bytes_written", "bytes_read", "io_s", "faults")
        return {
            "used": below["published"],
            "bytes": below["used_bytes"],
            "budget": below["disk_bytes"],
            "under_way": below["under_way"],
            **{name: below[name] for name in same},
        }

    @staticmethod
    def _far(below: dict[str, Any] | None) -> dict[str, Any] | None:
        if below is None:
            return None
        same = (
            "on", "label", "written", "read", "bytes_written", "bytes_read", "io_s", "faults",
            "gone", "refused", "slower", "late", "under_way",
        )  # fmt: skip
        return {name: below[name] for name in same}

    def write(
        self,
        tier: dict[str, Any],
        scrubbed: dict[str, Any] | None = None,
        quarantined: Sequence[Quarantine] = (),
        misses: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Writes the page, at most four times a second but for news.

        Args:
            tier: `Cache.stats()`.
            scrubbed: `Scrub.stats()`, where there is one.
            quarantined: `Cache.quarantined()`.
            misses: makes what the page says of misses.
        """
        now = time.monotonic()
        if not self._due and now - self._written_s < EVERY_S:
            return
        self._written_s, self._due = now, False
        page = {
            "model": self.model,
            "pid": os.getpid(),
            "updated_s": time.time(),
            "host": {
                "slots": tier["n_slots"],
                "used": tier["published"],
                "leased": tier["leases"],
                "reserved": tier["pending"] + tier["orphaned"],
                "bytes": tier["published"] * self._block_bytes,
                "slot_bytes": self._block_bytes,
            },
            "disk": self._disk(tier.get("disk")),
            "far": self._far(tier.get("far")),
            "scrub": scrubbed,
            "quarantine": list(quarantined),
            "counters": {
                **self.totals.as_dict(),
                "evictions": tier["evictions"],
                "failures": self.failures,
            },
            "last_failure": self.last_failure,
            "allowed": self._allowed,
            "recent": list(self._recent),
            **misses(),
        }
        self._arena.write_stats(msgspec.msgpack.encode(page))
