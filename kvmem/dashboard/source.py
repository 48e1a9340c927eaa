"""Where the page's states come from."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from kvmem.errors import NotAnswered
from kvmem.store import list_live, live
from kvmem.telemetry.chains import Chains
from kvmem.telemetry.live import SessionDetail, Snapshot

__all__ = ["EngineSource", "Source", "engines"]


class Source(Protocol):
    """One engine, or what answers like one. Each may raise a KVMemError or a FileNotFoundError;
    called from threads, one at a time."""

    name: str

    def snapshot(self, sessions: int, events_since: int) -> Snapshot:
        """How it stands now."""

    def chains(self, since: int) -> Chains:
        """What it remembers of prompts, as far as it changed since."""

    def session(self, name: str) -> SessionDetail:
        """One session, from near."""


class EngineSource:
    """A running engine of this user, asked at its arena's desk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name

    def snapshot(self, sessions: int, events_since: int) -> Snapshot:
        """See `Source`."""
        found = live.snapshots(arena=self.name, sessions=sessions, events_since=events_since)
        if not found:
            raise NotAnswered(
                f"The engine behind {self.path} did not answer",
                next_step="It may have ended, be busy, or be of another version of kvmem.",
            )
        return found[0]

    def chains(self, since: int) -> Chains:
        """See `Source`."""
        return live.chains(self.path, since)

    def session(self, name: str) -> SessionDetail:
        """See `Source`."""
        return live.session(self.path, name)


def engines(arena: str | None = None) -> list[Source]:
    """This user's running engines now; only the one with that arena's file name, where given."""
    return [
        EngineSource(one.path) for one in list_live() if arena is None or one.path.name == arena
    ]
