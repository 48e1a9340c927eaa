"""Snapshots of this user's running engines, asked at their desks."""

from __future__ import annotations

import msgspec

from kvmem.errors import ArenaError
from kvmem.store.arena import list_live
from kvmem.store.desk import NotAnswered, ask
from kvmem.telemetry.live import Snapshot

__all__ = ["snapshots"]


def snapshots(
    *, arena: str | None = None, sessions: int = 50, events_since: int | None = None
) -> list[Snapshot]:
    """How each engine of this user stands now, by pid.

    An engine that ends meanwhile, does not answer, or is of another version of kvmem is left out.

    Args:
        arena: the file name of one engine's arena; None for all.
        sessions: so many of those used last.
        events_since: the last events too, beyond the first so many; None for none.
    """
    found = []
    for live in list_live():
        if arena is not None and live.path.name != arena:
            continue
        try:
            raw = ask(live.path, "live", sessions=sessions, events_since=events_since)
            found.append(msgspec.msgpack.decode(raw, type=Snapshot))
        except (ArenaError, FileNotFoundError, NotAnswered, msgspec.DecodeError):
            continue
    return sorted(found, key=lambda one: one.pid)
