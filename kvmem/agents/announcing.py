"""Where an orchestrator's knowledge goes: what an agent does next, told to whoever keeps KV.

A runtime tells its engine (`kvmem.agents.hinting`), and a listener of the user's where it is given.
"""

from __future__ import annotations

import logging
from typing import Literal, Protocol

import msgspec

__all__ = ["Announcer", "Hint", "announce_safely"]

log = logging.getLogger("kvmem.agents")


class Hint(msgspec.Struct, frozen=True):
    """What happens to a session's KV.

    Args:
        what: "tool_start": it is idle until the tool returns; "tool_end": its next turn comes now;
            "session_end": it is not asked again.
        session_id: as its requests carry it.
        n_tokens: of its ledger.
        tool: the tool's name.
        expected_s: how long the tool took so far, median; None while nothing is known.
        cache_salt: of its requests.
    """

    what: Literal["tool_start", "tool_end", "session_end"]
    session_id: str
    n_tokens: int
    tool: str = ""
    expected_s: float | None = None
    cache_salt: str = ""


class Announcer(Protocol):
    """Takes hints. It only puts them on their way: `announce` returns at once."""

    def announce(self, hint: Hint) -> None:
        """Takes one hint."""
        ...


def announce_safely(listener: Announcer, hint: Hint) -> None:
    """Announces; a listener that raises costs a line in the log and no turn (I9)."""
    try:
        listener.announce(hint)
    except Exception:  # I9: a listener's fault costs the hint, never the agent's turn
        log.exception("the hint %s of %s was lost", hint.what, hint.session_id)
