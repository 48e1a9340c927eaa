"""The ledgers that are kept, found by what a conversation begins with.

A scope is what may share: one model, one renderer, one tenant, one salt (I11). In it every boundary
between messages of every ledger has a mark; the longest conversation that a request begins with is
the last of its own marks that is known. Ledgers are never changed here: a turn works on a fork of
what was found, and what it commits takes its place, or stands beside it when another turn was
quicker or history went another way. On disk each is one file (docs/formats.md), written before the
client sees the end of the answer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvmem.agents.gateway.messages import Conversation, NotLedgered, extend, formed, root
from kvmem.context import Ledger, Renderer
from kvmem.errors import ConfigError

__all__ = ["Found", "Kept", "Scope", "Sessions"]

log = logging.getLogger("kvmem.gateway")
SUFFIX = ".ledger"


class Kept(msgspec.Struct, eq=False):
    """A ledger and its marks: `marks[n]` is that of its first n + 1 spans.

    `answers`: the messages up to an answer that was given an id, counted without the system's.
    """

    id: str
    scope: str
    ledger: Ledger
    marks: list[bytes]
    held_until: float = 0.0
    answers: dict[str, int] = {}
    file: Path | None = None


class Found(msgspec.Struct, frozen=True):
    """What a request begins with: the first `spans` spans of `kept`; `whole`: that is all of it."""

    kept: Kept
    spans: int
    whole: bool
    by: str


class Scope:
    """The ledgers of one scope. `named` is the last one of each session id that a client gave."""

    def __init__(self, digest: str, renderer: Renderer) -> None:
        self.digest, self.renderer = digest, renderer
        self.kept: dict[str, Kept] = {}
        self.named: dict[str, Kept] = {}
        self._index: dict[bytes, tuple[Kept, int]] = {}
        self._answers: dict[str, Kept] = {}

    @staticmethod
    def digest_of(model: str, renderer: Renderer, tenant: str, cache_salt: str) -> str:
        """32 hex digits."""
        parts = msgspec.json.encode([model, renderer.digest, tenant, cache_salt])
        return hashlib.blake2b(parts, digest_size=16).hexdigest()

    def marks(self, conversation: Conversation) -> list[bytes]:
        """Of the head, and after each message."""
        first = root(self.digest, conversation.system, conversation.tools)
        return [first, *extend([first], (), conversation.messages)]

    def find(self, marks: Sequence[bytes], name: str) -> Found | None:
        """The ledger with the longest beginning of these; of equals the one of that name."""
        mine = self.named.get(name) if name else None
        for n in range(len(marks) - 1, -1, -1):
            if mine is not None and len(mine.marks) > n and mine.marks[n] == marks[n]:
                return Found(mine, n + 1, len(mine.marks) == n + 1, "name")
            known = self._index.get(marks[n])
            if known is not None:
                kept, spans = known
                return Found(kept, spans, len(kept.marks) == spans, "prefix")
        return None

    def before(self, answer_id: str) -> list[dict[str, Any]] | None:
        """The messages up to that answer, without the system's; None where it is not known."""
        kept = self._answers.get(answer_id)
        if kept is None:
            return None
        told = _messages(kept.ledger)[: kept.answers[answer_id]]
        for message in told:
            message.pop("answer_id", None)
            for call in message.get("tool_calls") or ():
                arguments = msgspec.json.encode(call["function"]["arguments"])
                call["function"]["arguments"] = arguments.decode()
        return told

    def put(self, kept: Kept) -> None:
        """Takes one in, or a later state of it."""
        self.kept[kept.id] = kept
        if kept.ledger.session_id:
            self.named[kept.ledger.session_id] = kept
        for n, mark in enumerate(kept.marks):
            self._index[mark] = (kept, n + 1)
        for name in kept.answers:
            self._answers[name] = kept

    def drop(self, kept: Kept) -> None:
        """Forgets one."""
        self.kept.pop(kept.id, None)
        if self.named.get(kept.ledger.session_id) is kept:
            del self.named[kept.ledger.session_id]
        for mark in kept.marks:
            if self._index.get(mark, (None, 0))[0] is kept:
                del self._index[mark]
        for name in kept.answers:
            if self._answers.get(name) is kept:
                del self._answers[name]


class Sessions:
    """All scopes, at most `most` ledgers, on disk where a folder is given.

    Raises:
        ConfigError: another gateway has the folder, or it can't be written.
    """

    def __init__(self, folder: Path | None, most: int) -> None:
        self._folder, self._most = folder, most
        self._scopes: dict[str, Scope] = {}
        self._order: OrderedDict[str, Kept] = OrderedDict()
        self._lock: int | None = None
        if folder is not None:
            self._lock = _locked(folder)

    def __len__(self) -> int:
        return len(self._order)

    def all(self) -> tuple[Kept, ...]:
        """The kept ones, the longest unused first."""
        return tuple(self._order.values())

    def close(self) -> None:
        """Lets another gateway have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def knows(self, model: str, renderer: Renderer, tenant: str, cache_salt: str) -> bool:
        """Whether `scope` has nothing to read."""
        return Scope.digest_of(model, renderer, tenant, cache_salt) in self._scopes

    def scope(self, model: str, renderer: Renderer, tenant: str, cache_salt: str) -> Scope:
        """The scope, with what is on disk of it."""
        digest = Scope.digest_of(model, renderer, tenant, cache_salt)
        found = self._scopes.get(digest)
        if found is None:
            found = Scope(digest, renderer)
            self._read(found)
            self._scopes[digest] = found
        return found

    def keep(self, scope: Scope, found: Found | None, ledger: Ledger, marks: list[bytes],
             *, now: float, hold_s: float = 0.0, answer_id: str = "") -> Kept:  # fmt: skip
        """Takes in what a turn has committed, and writes it.

        It takes the place of what it began with, where that was whole and still is the last.
        """
        before = found.kept if found is not None and found.whole else None
        if before is not None and (
            scope.kept.get(before.id) is not before or before.ledger.session_id != ledger.session_id
        ):
            before = None
        kept = Kept(before.id if before else uuid.uuid4().hex, scope.digest, ledger, marks)
        kept.answers = dict(before.answers) if before else {}
        if answer_id:
            kept.answers[answer_id] = len(marks) - 1
        kept.held_until = max(now + hold_s, before.held_until if before else 0.0)
        if self._folder is not None:
            folder = self._folder / scope.digest
            kept.file = _write(ledger, folder / f"{kept.id}-{len(marks):06}{SUFFIX}",
                               before.file if before else None)  # fmt: skip
        scope.put(kept)
        self._order[kept.id] = kept
        self._order.move_to_end(kept.id)
        while len(self._order) > self._most:
            self._forget(now)
        return kept

    def used(self, found: Found) -> None:
        """It was asked for: it goes later than others."""
        if found.kept.id in self._order:
            self._order.move_to_end(found.kept.id)

    def _forget(self, now: float) -> None:
        """The one longest unused that no client wanted held until now; else just the oldest."""
        oldest = next(iter(self._order.values()))
        newest = next(reversed(self._order))
        victim = next((one for one in self._order.values() if one.held_until <= now), oldest)
        if victim.id == newest:
            victim = oldest
        del self._order[victim.id]
        self._scopes[victim.scope].drop(victim)
        if victim.file is not None:
            victim.file.unlink(missing_ok=True)

    def _read(self, scope: Scope) -> None:
        if self._folder is None:
            return
        files = sorted((self._folder / scope.digest).glob("*" + SUFFIX), key=_written)
        last = {_id(file): file for file in sorted(files)}  # the longest of each
        for file in files:
            if last[_id(file)] != file:  # a kill between two writes left it
                file.unlink(missing_ok=True)
                continue
            try:
                ledger = Ledger.load(file, scope.renderer)
                kept = Kept(_id(file), scope.digest, ledger, marks_of(scope, ledger), file=file)
                told = enumerate(_messages(ledger), 1)
                kept.answers = {m["answer_id"]: n for n, m in told if "answer_id" in m}
            except (ConfigError, NotLedgered) as error:
                log.warning("a session's file is left alone: %s", error)
                continue
            scope.put(kept)
            self._order[kept.id] = kept
        # A write that was cut off leaves its temporary file, under a dot.
        for rest in (self._folder / scope.digest).glob(f".*{SUFFIX}-*"):
            rest.unlink(missing_ok=True)
        if files:
            log.info("%d sessions read from %s", len(scope.kept), self._folder / scope.digest)


def marks_of(scope: Scope, ledger: Ledger) -> list[bytes]:
    """The marks that `Scope.marks` gives to the conversation in a ledger."""
    told = tuple(formed(one) for one in _messages(ledger))
    return scope.marks(Conversation(ledger.system, ledger.tools, told))


def _messages(ledger: Ledger) -> list[dict[str, Any]]:
    """Without the system's."""
    return ledger.messages()[0 if ledger.system is None else 1 :]


def _write(ledger: Ledger, file: Path, before: Path | None) -> Path | None:
    """The file that holds it now; where the disk fails, the one before (I9)."""
    try:
        # A name of its own: to replace a file makes some file systems write it out first.
        file.parent.mkdir(mode=0o700, exist_ok=True)
        ledger.save(file)
    except OSError as error:
        log.warning("a session could not be written: %s", error.strerror)
        return before
    if before is not None and before != file:
        before.unlink(missing_ok=True)
    return file


def _id(file: Path) -> str:
    return file.stem.partition("-")[0]


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"--sessions {folder} can't be used: {error.strerror}",
            next_step="Give a folder that can be written.",
            setting="sessions",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with contextlib.suppress(OSError):
            os.close(lock)
        raise ConfigError(
            f"Another gateway has --sessions {folder}",
            next_step="Give each gateway a folder of its own.",
            setting="sessions",
        ) from error
    return lock
