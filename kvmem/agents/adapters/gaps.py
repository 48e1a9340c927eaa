"""What every adapter does: names sessions, announces tools, sees a history that was edited."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from kvmem.agents.announcing import Announcer, Hint, announce_safely

__all__ = ["Conversation", "Conversations"]

log = logging.getLogger("kvmem.agents")
MOST = 1024  # conversations that are remembered
TIMES = 32  # of a tool, that its median is of
_canonical = msgspec.json.Encoder(order="sorted", enc_hook=str).encode


class Conversation:
    """One session as an adapter sees it. Threads may share it.

    Args:
        session_id: as its requests carry it.
        announcer: is told of its tools and its end; None: nobody.
        took: how long tools took, shared by all conversations.
    """

    def __init__(
        self, session_id: str, announcer: Announcer | None, took: dict[str, deque[float]]
    ) -> None:
        self.session_id = session_id
        self.n_tokens = 0  # of its last prompt and answer
        self._announcer, self._took = announcer, took
        self._sent: list[bytes] = []

    @property
    def headers(self) -> dict[str, str]:
        """By which the gateway finds the session."""
        return {"X-Session-ID": self.session_id}

    def sends(self, messages: Sequence[Any]) -> int | None:
        """Notes what a request holds; the first message that differs from the last request's.

        A message that differs costs all tokens from there on; it is logged, and nothing is changed.
        """
        try:
            told = [hashlib.blake2b(_canonical(one), digest_size=16).digest() for one in messages]
        except (TypeError, ValueError) as error:  # what is no JSON can't be compared: say nothing
            log.debug("session %s: its messages are no JSON: %s", self.session_id, error)
            self._sent = []
            return None
        before, self._sent = self._sent, told
        for n, one in enumerate(before):
            if n >= len(told) or told[n] != one:
                log.warning(
                    "session %s: message %d of %d was edited or left out; from there on the prompt"
                    " is computed anew. Append instead, or edit seldom and much at once.",
                    self.session_id, n, len(before),
                )  # fmt: skip
                return n
        return None

    def heard(self, n_tokens: int | None) -> None:
        """Notes the tokens of the last prompt and its answer."""
        self.n_tokens = n_tokens or self.n_tokens

    def started(self, tool: str) -> Callable[[], None]:
        """Announces that a tool runs; what is returned announces, once, that it has ended."""
        began = time.monotonic()
        took = self._took.setdefault(tool, deque(maxlen=TIMES))
        self._announce("tool_start", tool, statistics.median(took) if took else None)
        over = threading.Event()

        def ended() -> None:
            if not over.is_set():
                over.set()
                took.append(time.monotonic() - began)
                self._announce("tool_end", tool)

        return ended

    @contextlib.contextmanager
    def gap(self, tool: str) -> Iterator[None]:
        """Announces a tool's start, and its end however it ends."""
        ended = self.started(tool)
        try:
            yield
        finally:
            ended()

    def end(self) -> None:
        """Announces that it is not asked again."""
        self._announce("session_end")

    def _announce(self, what: Any, tool: str = "", expected_s: float | None = None) -> None:
        if self._announcer is not None:
            hint = Hint(what, self.session_id, self.n_tokens, tool, expected_s)
            announce_safely(self._announcer, hint)


class Conversations:
    """The conversations of an adapter, by the id that its framework gives them.

    Args:
        announcer: see `Conversation`.
        prefix: is put before each id, where ids of several frameworks could be the same.
    """

    def __init__(self, announcer: Announcer | None = None, *, prefix: str = "") -> None:
        self._announcer, self._prefix = announcer, prefix
        self._took: dict[str, deque[float]] = {}
        self._known: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str) -> Conversation:
        """The conversation of that id; of more than 1024 the one longest unused is forgotten."""
        with self._lock:
            known = self._known.get(name)
            if known is None:
                known = Conversation(self._prefix + name, self._announcer, self._took)
                self._known[name] = known
            self._known.move_to_end(name)
            if len(self._known) > MOST:
                self._known.popitem(last=False)
            return known
