"""What a change of a prompt's text was: decoded, cut into messages and compared, on a thread.

The rules are the linter's, so that what is found while serving has the names that `kvmem lint`
gives it. No text leaves this file: the answer is a reason, a role and a message's number.
"""

from __future__ import annotations

import logging
import queue
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from kvmem.explain.lint.values import Part

__all__ = ["Broken", "Named", "Namer", "name"]

MOST_WAITING = 32
MOST_BYTES = 4 << 20  # of a prompt's tokens: beyond that nobody decodes it

log = logging.getLogger("kvmem")

Decode = Callable[[Sequence[int]], str]

# The linter's rules by what they are called here. Others are changes of a message.
OF_RULE = {
    "history-compacted": "context_compacted",
    "history-truncated": "context_compacted",
    "json-reserialised": "tool_args_reserialized",
    "message-removed": "context_compacted",
    "system-changed": "system_changed",
    "thinking-stripped": "template_rewrote_history",
    "tool-result-cleared": "context_compacted",
    "tools-changed": "tools_changed",
    "tools-reordered": "tools_changed",
    "turn-undone": "input_changed",
}


class Named(msgspec.Struct, frozen=True):
    """What was found: a reason, whose message, its number from 0 behind the head, the rule."""

    reason: str
    role: str = ""
    message: int | None = None
    rule: str = ""


class Broken:
    """A prompt, the one before it with its reply, and the first token that differs.

    `meant`: the one is known to go on from the other, since both name their session, or the last
    message of the one stands in the other.
    """

    __slots__ = ("done", "meant", "n_sent", "new", "old", "token", "verdict")

    def __init__(self, old: bytes, new: bytes, token: int, n_sent: int, *, meant: bool) -> None:
        self.old = old
        self.new = new
        self.token = token
        self.n_sent = n_sent
        self.meant = meant
        self.verdict: Named | None = None
        self.done = False


class Namer:
    """Names breaks, one after another, on a thread that begins with the first of them.

    Args:
        load: makes a decoder that leaves special tokens in; called once, on the thread. None for
            a model that has none: then nothing is named.
        failed: is told what went wrong.
    """

    def __init__(
        self, load: Callable[[], Decode | None], failed: Callable[[str], None] | None = None
    ) -> None:
        self._load = load
        self._failed = failed
        self._queue: queue.Queue[Broken | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._one_done = threading.Condition()

    def wait(self, broken: Broken, seconds: float) -> None:
        """Returns when this break is named or given up, or after so long."""
        with self._one_done:
            self._one_done.wait_for(lambda: broken.done, seconds)

    def submit(self, broken: Broken) -> None:
        """Has a break named, unless too many wait."""
        if max(len(broken.old), len(broken.new)) > MOST_BYTES:
            broken.done = True
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvmem-namer", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(broken)
        except queue.Full:
            broken.done = True

    def join(self) -> None:
        """Returns when all that was submitted is named."""
        self._queue.join()

    def close(self) -> None:
        """Ends the thread after what it is at."""
        if self._thread is not None:
            while True:
                try:
                    self._queue.get_nowait().done = True  # type: ignore[union-attr]
                    self._queue.task_done()
                except queue.Empty:
                    break
            self._queue.put(None)
            self._thread.join(5.0)
            self._thread = None

    def _run(self) -> None:
        decode: Decode | None = None
        loaded = False
        while (broken := self._queue.get()) is not None:
            try:
                if not loaded:
                    loaded = True
                    decode = self._load()
                if decode is not None:
                    broken.verdict = name(broken, decode)
            except Exception as error:  # noqa: BLE001 the top of a thread: a tokenizer is a plug-in
                log.warning("kvmem: a break was not named: %s", type(error).__name__)
                if self._failed is not None:
                    self._failed(f"{type(error).__name__}: {error}")
            finally:
                with self._one_done:
                    broken.done = True
                    self._one_done.notify_all()
                broken.old = broken.new = b""
                self._queue.task_done()
        self._queue.task_done()


def name(broken: Broken, decode: Decode) -> Named:
    """What the change was."""
    from kvmem.explain.lint.classify import classify, first_difference
    from kvmem.explain.misses.texts import cut, parts_of

    old_ids, new_ids = _ids(broken.old), _ids(broken.new)
    old, new = decode(old_ids), decode(new_ids)
    before, now = parts_of(old), parts_of(new)
    if now and now[-1].role == "assistant" and not now[-1].text:
        now.pop()  # it asks for the reply
    n_sent = len(parts_of(decode(old_ids[: broken.n_sent])))
    if before and n_sent and before[min(n_sent, len(before)) - 1].role == "assistant":
        n_sent -= 1  # the same, which the reply has filled
    at = first_difference(before, now)
    turns, reached = cut(new), len(decode(new_ids[: broken.token]))
    turn = next((i for i, (_, _, end) in enumerate(turns) if end > reached), len(turns))
    parts = now if at is None or at < len(now) else before
    if at is None or parts[at].origin > turn:  # what differs there is the same text
        where = next((i for i, part in enumerate(now) if part.origin == turn), len(now))
        return _of(now, where, "retokenized")
    if not broken.meant and not _share_messages(before, now):
        return Named("first_time")
    rule = classify(before, now, at, n_sent=n_sent)
    if rule == "history-edited" and _is_shorter(before, now, at):
        rule = "history-compacted"
    part = now[at] if at < len(now) else before[at]
    reason = OF_RULE.get(rule, "input_changed")
    if rule.startswith("volatile") and part.kind in ("system", "tools"):
        reason = f"{part.kind}_changed"
    if rule == "whitespace-changed" and part.role == "assistant":
        reason = "template_rewrote_history"
    if rule == "json-reserialised" and part.kind == "tools":
        reason = "tools_changed"
    return _of(now if at < len(now) else before, at, reason, rule)


def _share_messages(before: list[Part], now: list[Part]) -> bool:
    """Whether two prompts of unknown sessions are one conversation, and not two with one head."""
    had = {part.identity for part in before if part.kind == "message"}
    return not had or any(part.identity in had for part in now if part.kind == "message")


def _is_shorter(before: list[Part], now: list[Part], at: int) -> bool:
    """Whether messages from `at` on gave way to fewer, and what came after them was kept."""
    kept = {part.identity for part in before[at + 1 :]}
    return len(now) < len(before) and any(part.identity in kept for part in now[at:])


def _of(parts: list[Part], at: int, reason: str, rule: str = "") -> Named:
    if at >= len(parts):
        return Named(reason, "assistant", None, rule)
    message = sum(part.kind == "message" for part in parts[:at])
    head = parts[at].kind != "message"
    role = parts[at].kind if head else parts[at].role
    return Named(reason, role, None if head else message, rule)


def _ids(packed: bytes) -> list[int]:
    return array("i", packed).tolist()
