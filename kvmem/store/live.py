"""Snapshots of this user's running engines and quotes of prompts, asked at their desks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path

import msgspec

from kvmem.errors import ArenaError, NotAnswered
from kvmem.store.arena import list_live
from kvmem.store.desk import ask
from kvmem.telemetry.chains import Chains
from kvmem.telemetry.live import SessionDetail, Snapshot
from kvmem.telemetry.quote import Quote

__all__ = ["chains", "quote", "session", "snapshots"]

NAMING_S = 30.0  # for a break that is named, after the tokenizer was loaded


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


def quote(path: Path, tokens: Iterable[int], *, session: str = "", salt: str = "") -> Quote:
    """What a prompt would find in the engine that owns the arena at `path`, and what it would cost.

    Raises:
        ValueError: a token is no token id.
        NotUnderstood: the engine refuses the prompt; a ValueError too.
        NotAnswered, FileNotFoundError, ArenaError: there is no engine that answers.
    """
    try:
        packed = array("i", tokens).tobytes()
    except (OverflowError, TypeError) as error:
        raise ValueError(f"a prompt's token ids are whole numbers of 32 bits: {error}") from error
    raw = ask(path, "quote", timeout_s=NAMING_S, tokens=packed, session=session, salt=salt)
    return msgspec.msgpack.decode(raw, type=Quote)


def session(path: Path, name: str) -> SessionDetail:
    """What the engine that owns the arena at `path` knows of a session.

    Raises:
        NotAnswered, FileNotFoundError, ArenaError: there is no engine that answers.
    """
    return msgspec.msgpack.decode(ask(path, "session", session=name), type=SessionDetail)


def chains(path: Path, since: int = 0) -> Chains:
    """The prompts that the engine which owns the arena at `path` remembers, as chains of blocks:
    those that changed since the answer with that stamp.

    Raises:
        NotAnswered, FileNotFoundError, ArenaError: there is no engine that answers.
    """
    return msgspec.msgpack.decode(ask(path, "chains", since=since), type=Chains)
