"""Reads rollouts of Codex: one JSON line for each item; old files hold the items bare.

A call begins where an item of the model's follows one that is not. `compacted` replaces the
history, `thread_rolled_back` takes turns back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmem.explain.lint.lines import decode, records
from kvmem.explain.lint.readers.parts import WrongMessage, message_part
from kvmem.explain.lint.readers.requests import item_part
from kvmem.explain.lint.values import Call, Fault, Part

__all__ = ["NAME", "accepts", "calls"]

NAME = "codex"
_LINES = frozenset({"session_meta", "response_item", "event_msg", "turn_context", "compacted"})
_ITEMS = frozenset({"message", "reasoning", "function_call", "function_call_output",
                    "local_shell_call", "local_shell_call_output", "custom_tool_call",
                    "custom_tool_call_output", "web_search_call"})  # fmt: skip
_FIX = "Take the line out; the rest was read."


def accepts(first: dict[str, Any]) -> bool:
    """Whether a file that begins with this record is a rollout of Codex."""
    if str(first.get("type")) in _LINES and "payload" in first:
        return True
    return str(first.get("type")) in _ITEMS or ({"id", "timestamp", "instructions"} <= first.keys())


class _Thread:
    """What the model has been sent so far, and whether it is answering now."""

    def __init__(self) -> None:
        self.session = ""
        self.parts: list[Part] = []
        self.answering = False

    def add(self, line: int, item: Any) -> Call | None:
        """Appends an item; the call that it begins, where it begins one."""
        part = item_part(item, len(self.parts))
        call = None
        if part.role == "assistant" and not self.answering and self.parts:
            call = Call(line, self.session, "main", parts=list(self.parts))
        self.answering = part.role == "assistant"
        self.parts.append(part)
        return call

    def restart(self, payload: dict[str, Any]) -> None:
        """Puts a compacted history in place of the old one."""
        items = payload.get("replacement_history")
        if not isinstance(items, list):
            summary = {"role": "user", "content": str(payload.get("message", ""))}
            items = [summary]
        self.parts = [part for part in self.parts if part.message is None]
        for item in items:
            self.parts.append(item_part(item, len(self.parts)))
        self.answering = False

    def roll_back(self, n_turns: int) -> None:
        """Takes the last turns back, each from the user's message on."""
        for _ in range(n_turns):
            at = [i for i, part in enumerate(self.parts) if part.role == "user"]
            if at:
                del self.parts[at[-1] :]
        self.answering = False


def calls(path: Path) -> Iterator[Call | Fault]:
    """Each call that the rollout shows."""
    thread = _Thread()
    for record in records(path):
        value = record if isinstance(record, Fault) else decode(path, record, dict[str, Any])
        if isinstance(value, Fault):
            yield value
            continue
        try:
            call = _line(record.line, thread, value)
        except WrongMessage as error:
            yield Fault(str(path), record.line, str(error), _FIX)
            continue
        if call is not None:
            yield call


def _line(line: int, thread: _Thread, value: dict[str, Any]) -> Call | None:
    kind, payload = value.get("type"), value.get("payload")
    if not isinstance(payload, dict):
        if str(kind) in _ITEMS:
            return thread.add(line, value)
        if "instructions" in value:
            _meta(thread, value)
        return None
    if kind == "response_item" and str(payload.get("type")) in _ITEMS:
        return thread.add(line, payload)
    if kind == "session_meta":
        _meta(thread, payload)
    elif kind == "compacted":
        thread.restart(payload)
    elif kind == "event_msg" and payload.get("type") == "thread_rolled_back":
        turns = payload.get("num_turns", 1)
        thread.roll_back(turns if isinstance(turns, int) else 1)
    return None


def _meta(thread: _Thread, payload: dict[str, Any]) -> None:
    session = str(payload.get("id", ""))
    if session == thread.session and thread.parts:
        return  # written again when a rollout is resumed
    thread.session, thread.parts, thread.answering = session, [], False
    given = payload.get("base_instructions") or payload.get("instructions")
    text = given.get("text") if isinstance(given, dict) else given
    if isinstance(text, str) and text:
        thread.parts.append(message_part({"role": "system", "content": text}, None))
