"""Reads logs of requests: OpenAI chat completions and responses, Anthropic messages.

A line is a request's body, or an object that holds it as `request`, `body`, `params` or `kwargs`,
with what came back beside it as `response`. The three may stand mixed in one file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmem.explain.lint.lines import decode, records
from kvmem.explain.lint.readers.parts import (
    HEAD_ROLES,
    WrongMessage,
    json_text,
    message_part,
    tools_part,
)
from kvmem.explain.lint.values import Call, Fault, Part

__all__ = ["NAME", "accepts", "body_of", "calls"]

NAME = "requests"
_HOLDERS = ("request", "body", "params", "kwargs", "input")
_SESSIONS = ("session_id", "session", "sessionId", "conversation_id", "thread_id", "trace_id")
_AGENTS = ("agent", "agent_id", "agent_name")
_IN_BODY = ("prompt_cache_key", "conversation", "session_id")
_FIX = "Log each request as it was sent; the rest was read."


def accepts(first: dict[str, Any]) -> bool:
    """Whether a log that begins with this record is one of requests."""
    return body_of(first) is not None


def body_of(record: dict[str, Any]) -> dict[str, Any] | None:
    """The request's own body in a record of a log, however deep; None where there is none."""
    held: Any = record
    for _ in range(3):
        if _is_body(held):
            return held
        inner = [held[name] for name in _HOLDERS if isinstance(held.get(name), dict)]
        if not inner:
            return None
        held = inner[0]
    return None


def calls(path: Path) -> Iterator[Call | Fault]:
    """Each request of the log."""
    for record in records(path):
        value = record if isinstance(record, Fault) else decode(path, record, dict[str, Any])
        if isinstance(value, Fault):
            yield value
            continue
        body = body_of(value)
        if body is None:
            yield Fault(str(path), record.line, "no request in this record", _FIX)
            continue
        try:
            yield _call(record.line, value, body)
        except WrongMessage as error:
            yield Fault(str(path), record.line, str(error), _FIX)


def _is_body(value: dict[str, Any]) -> bool:
    if "messages" in value:
        return True
    return ("model" in value or "instructions" in value) and not isinstance(
        value.get("input", {}), dict
    )


def _call(line: int, record: dict[str, Any], body: dict[str, Any]) -> Call:
    parts = _responses(body) if "messages" not in body else _messages(body)
    model, salt = body.get("model"), body.get("cache_salt")
    return Call(
        line,
        _named(record, _SESSIONS) or _session_in(body),
        _named(record, _AGENTS),
        parts=parts,
        reply=_reply(record),
        model=model if isinstance(model, str) else None,
        cache_salt=salt if isinstance(salt, str) else "",
        record=record,
        body=body,
    )


def _messages(body: dict[str, Any]) -> list[Part]:
    messages = body["messages"]
    if not isinstance(messages, list):
        raise WrongMessage("messages is no list")
    parts = [message_part(message, i) for i, message in enumerate(messages)]
    tools = tools_part(body.get("tools") or body.get("functions"))
    if body.get("system"):
        system = message_part({"role": "system", "content": body["system"]}, None)
        parts.insert(0, system)
        return [tools, *parts] if tools else parts  # Anthropic's order: tools, system, messages
    n_head = next((i for i, p in enumerate(parts) if p.role not in HEAD_ROLES), len(parts))
    return [*parts[:n_head], tools, *parts[n_head:]] if tools else parts


def _responses(body: dict[str, Any]) -> list[Part]:
    parts: list[Part] = []
    if body.get("instructions"):
        parts.append(message_part({"role": "system", "content": body["instructions"]}, None))
    tools = tools_part(body.get("tools"))
    if tools:
        parts.append(tools)
    given = body["input"]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise WrongMessage("input is neither text nor list")
    return parts + [item_part(item, i) for i, item in enumerate(given)]


def item_part(item: Any, index: int | None) -> Part:
    """An item of the responses API as a part: a message, a call, its output, or reasoning.

    Raises:
        WrongMessage: not an object, or of a role that there is not.
    """
    if not isinstance(item, dict):
        raise WrongMessage(f"item {index} is no JSON object")
    kind = item.get("type", "message")
    if kind == "message":
        return message_part(item, index)
    if kind == "reasoning":
        thought = json_text(item.get("content") or item.get("summary") or "")
        part = message_part({"role": "assistant", "reasoning": thought}, index)
    elif str(kind).endswith("_output"):
        output = item.get("output")
        part = message_part({"role": "tool", "content": output}, index)
    elif "arguments" in item or "input" in item:
        call = {"name": item.get("name"), "arguments": item.get("arguments", item.get("input"))}
        part = message_part({"role": "assistant", "tool_calls": [call]}, index)
    else:
        part = message_part({"role": "assistant", "content": json_text(item)}, index)
    return Part(
        part.kind, part.role, part.text, index, part.content, part.thinking, part.pieces, item
    )


def _reply(record: dict[str, Any]) -> Part | None:
    response = record.get("response")
    if not isinstance(response, dict):
        return None
    if isinstance(response.get("body"), dict):
        response = response["body"]
    choices = response.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        message = choices[0].get("message")
        return message_part(message, None) if isinstance(message, dict) else None
    if isinstance(response.get("content"), list) and response.get("role") == "assistant":
        return message_part(response, None)
    return None


def _named(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    places = [record, record.get("metadata")]
    for place in places:
        for name in names if isinstance(place, dict) else ():
            if isinstance(place.get(name), str | int):  # type: ignore[union-attr]
                return str(place[name])  # type: ignore[index]
    return None


def _session_in(body: dict[str, Any]) -> str | None:
    found = _named(body, (*_SESSIONS, *_IN_BODY))
    metadata = body.get("metadata")
    if found is None and isinstance(metadata, dict) and isinstance(metadata.get("user_id"), str):
        # Claude Code's: user_..._account_..._session_<uuid>
        _, mark, session = metadata["user_id"].rpartition("session_")
        return session if mark else None
    return found
