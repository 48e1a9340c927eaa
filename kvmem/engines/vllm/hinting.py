"""Sessions and hints on their way from vLLM's requests, and from its server, to the `Cache`.

Each call passes a door: whatever fails in here costs a hint, never a request (I9).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from kvmem.cache import Who
from kvmem.engines.vllm.seen import Seen
from kvmem.hints import AnyAction, Hints, Receipt, read_hints

if TYPE_CHECKING:
    from kvmem.engines.vllm.scheduler import SchedulerHalf

__all__ = ["METHOD", "Hinting", "install"]

log = logging.getLogger("kvmem")

T = TypeVar("T")

METHOD = "kvmem_hints"  # of vLLM's EngineCore, once `install` has put it there
SALT_BYTES = 16


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the server hands to the engine: an envelope, or None for the last receipts."""

    envelope: Any = None
    cache_salt: str = ""


class Hinting:
    """The hints of a `SchedulerHalf`, in its thread."""

    def __init__(self, half: SchedulerHalf) -> None:
        self._half, self._cache = half, half.cache

    # -- a request's way ---------------------------------------------------------------------

    def matched(self, seen: Seen) -> None:
        """A prompt was looked up: a use of its branch, once a request. What it asks of other
        sessions is done now."""
        if not seen.hinted:
            seen.hinted = True
            self._safely("hints", lambda: self._matched(seen), None)

    def _matched(self, seen: Seen) -> None:
        keeping, sessions = self._cache.keeping, self._cache.sessions
        asked, who = seen.wishes.hints, self._who(seen)
        if keeping is not None:
            named = who if getattr(seen.request, "session_id", None) else None
            told = asked is not None
            agent = sessions.agent_of(named, told=told)
            ref = keeping.used(seen.request.request_id, seen.keys.of(0), agent)
            if named is not None and ref is not None:
                sessions.sent(named, ref, told=told)
            seen.branch = ref
        if asked is not None:
            seen.hint_receipts = [*asked.refused]
            for receipt in asked.refused:
                sessions.keep(who[0], receipt)
            seen.hint_receipts += [
                sessions.do(action, (who[0], action.session))
                for action in asked.actions
                if not _own(action, who)
            ]

    def finished(self, seen: Seen) -> list[dict[str, Any]] | None:
        """The reply is over: what the request asks of its own session is done; all its receipts,
        None where it asked for nothing."""
        return self._safely("hints", lambda: self._finished(seen), None)

    def _finished(self, seen: Seen) -> list[dict[str, Any]] | None:
        asked, keeping = seen.wishes.hints, self._cache.keeping
        if keeping is not None:
            keeping.replied(seen.request.request_id, seen.keys.of(0))
        if asked is None:
            return None
        who = self._who(seen)
        done = [
            self._cache.sessions.do(action, who, seen.branch)
            for action in asked.actions
            if _own(action, who)
        ]
        return [msgspec.to_builtins(one) for one in (*seen.hint_receipts, *done)]

    def _who(self, seen: Seen) -> Who:
        request = seen.request
        session = getattr(request, "session_id", None)
        salt = salt_of(getattr(request, "cache_salt", None))
        return salt, str(session) if session else f"request {request.request_id}"

    # -- the server's ------------------------------------------------------------------------

    def asked(self, text: str) -> str:
        """Does what an envelope asks, or tells the last receipts; JSON in and out."""
        none = '{"receipts":[]}'
        return self._safely("hints", lambda: self._asked(text), none)

    def _asked(self, text: str) -> str:
        asked = msgspec.json.decode(text, type=_Asked)
        sessions, salt = self._cache.sessions, salt_of(asked.cache_salt)
        if asked.envelope is None:
            return _told(sessions.receipts(salt))
        hints: Hints = read_hints(asked.envelope)
        for receipt in hints.refused:
            sessions.keep(salt, receipt)
        receipts = [*hints.refused]
        for action in hints.actions:
            if action.session:
                receipts.append(sessions.do(action, (salt, action.session)))
                continue
            do = str(action.__struct_config__.tag)
            receipts.append(Receipt(do=do, status="rejected", reason="say which session"))
            sessions.keep(salt, receipts[-1])
        self._half.page.touch()
        return _told(receipts)

    # -- inside ------------------------------------------------------------------------------

    def _safely(self, what: str, do: Callable[[], T], otherwise: T) -> T:
        try:
            return do()
        except Exception as error:  # I9: a door: it costs a hint
            log.exception("kvmem: %s failed; the request goes on without it", what)
            self._half.failed(what, f"{type(error).__name__}: {error}")
            return otherwise


def install() -> None:
    """Gives vLLM's `EngineCore` a method that its clients reach by `call_utility`; once a process.

    It runs on the thread of the scheduler, between steps, also while there are none.
    """
    from vllm.v1.engine.core import EngineCore

    if not hasattr(EngineCore, METHOD):
        setattr(EngineCore, METHOD, _ask)


def _ask(core: Any, text: str) -> str:
    half = _half_of(getattr(core.scheduler, "connector", None))
    return half.hinting.asked(text) if half is not None else "{}"


def _half_of(connector: Any) -> SchedulerHalf | None:
    """kvmem's half of the connector, or of one within vLLM's MultiConnector."""
    half: SchedulerHalf | None = getattr(connector, "_scheduler", None)
    if half is not None and hasattr(half, "hinting"):
        return half
    for inner in getattr(connector, "_connectors", ()):
        half = _half_of(inner)
        if half is not None:
            return half
    return None


def salt_of(salt: str | None) -> bytes:
    """A salt's digest; that of none is empty."""
    return hashlib.blake2b(salt.encode(), digest_size=SALT_BYTES).digest() if salt else b""


def _own(action: AnyAction, who: Who) -> bool:
    return not action.session or action.session == who[1]


def _told(receipts: list[Receipt]) -> str:
    return msgspec.json.encode({"receipts": receipts}).decode()
