"""Reads ShareGPT: a conversation a record; every reply in it is a call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmem.explain.lint.lines import decode, records
from kvmem.explain.lint.readers.parts import WrongMessage, message_part, tools_part
from kvmem.explain.lint.values import Call, Fault, Part

__all__ = ["NAME", "accepts", "calls"]

NAME = "sharegpt"
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant",
    "function": "tool",
}  # fmt: skip
_FIX = "Use human, gpt, system, tool; the rest was read."


def accepts(first: dict[str, Any]) -> bool:
    """Whether a file that begins with this record is of ShareGPT's form."""
    turns = first.get("conversations")
    return isinstance(turns, list)


def calls(path: Path) -> Iterator[Call | Fault]:
    """Each reply of each conversation as a call."""
    for n, record in enumerate(records(path)):
        value = record if isinstance(record, Fault) else decode(path, record, dict[str, Any])
        if isinstance(value, Fault):
            yield value
            continue
        try:
            parts = _parts(value)
        except WrongMessage as error:
            yield Fault(str(path), record.line, str(error), _FIX)
            continue
        session = f"{value.get('id', 'conversation')}#{n}"
        for i, part in enumerate(parts):
            if part.role == "assistant" and i and parts[i - 1].role != "assistant":
                yield Call(record.line, session, "main", parts=parts[:i])


def _parts(value: dict[str, Any]) -> list[Part]:
    turns = value.get("conversations")
    if not isinstance(turns, list):
        raise WrongMessage("no conversations in this record")
    parts = []
    if isinstance(value.get("system"), str) and value["system"]:
        parts.append(message_part({"role": "system", "content": value["system"]}, None))
    tools = value.get("tools")
    if isinstance(tools, str) and tools:
        parts.append(Part("tools", "tools", tools, pieces=(tools,), origin=tools))
    elif (listed := tools_part(tools)) is not None:
        parts.append(listed)
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise WrongMessage(f"turn {i} is no JSON object")
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise WrongMessage(f"turn {i} is from {turn.get('from', turn.get('role'))!r}")
        content = turn.get("value", turn.get("content"))
        parts.append(message_part({"role": role, "content": content}, i))
    return parts
