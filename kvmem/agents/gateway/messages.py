"""A request's conversation in one form, and marks that say which conversations begin alike.

Frameworks send the same history in many spellings: content as text or as a list of parts, arguments
with blanks or without, ids of their own for calls, fields that are empty or left out. A mark is a
digest over everything up to a message with such spellings taken out. What the model sampled is
found by it and stands in the ledger as it was sampled, whatever the spelling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvmem.errors import KVMemError

_canonical = msgspec.json.Encoder(order="sorted").encode

__all__ = ["Conversation", "NotLedgered", "extend", "formed", "read", "root"]

Marks = tuple[bytes, ...]
# Fields of a chat request that change what the engine renders of the messages.
RENDERED_BY = (
    "add_special_tokens", "chat_template", "continue_final_message", "documents", "echo",
    "media_io_kwargs", "mm_processor_kwargs", "prompt_embeds", "truncate_prompt_tokens",
)  # fmt: skip


class NotLedgered(KVMemError):
    """A request that is handed on as it is; `reason` is what usage says of it."""


class Conversation(msgspec.Struct, frozen=True):
    """Messages as a template takes them.

    Args:
        system: the first message's text where that is the system's.
        tools: as the server gives them to its template.
        messages: the rest.
    """

    system: str | None
    tools: tuple[dict[str, Any], ...]
    messages: tuple[dict[str, Any], ...]

    @property
    def offset(self) -> int:
        """Of a client's messages, those that are not in `messages`."""
        return 0 if self.system is None else 1


def read(body: Mapping[str, Any]) -> Conversation:
    """The conversation of a chat request.

    Raises:
        NotLedgered: it holds media, or fields by which the engine renders it otherwise.
    """
    for name in RENDERED_BY:
        if body.get(name):
            raise NotLedgered(f"{name} is set", reason="template_fields")
    if body.get("add_generation_prompt") is False:
        raise NotLedgered("add_generation_prompt is off", reason="template_fields")
    formed_all = [formed(message) for message in body["messages"]]
    tools = tuple(_tool(tool) for tool in body.get("tools") or ())
    if formed_all and formed_all[0]["role"] == "system":
        return Conversation(formed_all[0]["content"], tools, tuple(formed_all[1:]))
    return Conversation(None, tools, tuple(formed_all))


def formed(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the server forms it for its template: text in one piece, arguments as an object.

    Raises:
        NotLedgered: it holds media.
    """
    role = message["role"]
    told: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _text(message.get("content")),
    }
    calls = message.get("tool_calls")
    if calls:
        told["tool_calls"] = [_call(call) for call in calls]
    for name in ("tool_call_id", "name"):
        if message.get(name):
            told[name] = message[name]
    return told


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") in {"text", "input_text", "output_text", "refusal"}:
            texts.append(str(part.get("text") or part.get("refusal") or ""))
        else:
            raise NotLedgered(f"a part of type {part.get('type')}", reason="media")
    return "\n".join(texts)  # as vLLM's renderer does


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise NotLedgered("a call of no function", reason="custom_tool")
    return {
        "id": call.get("id"),
        "type": "function",
        "function": {"name": function["name"], "arguments": _arguments(function.get("arguments"))},
    }


def _arguments(given: Any) -> Any:
    if isinstance(given, Mapping):
        return dict(given)
    try:
        found = json.loads(given or "{}")
    except json.JSONDecodeError:
        return {}  # as vLLM does with what a model wrote wrongly
    return found if isinstance(found, dict) else {}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise NotLedgered("a tool that is no function", reason="custom_tool")
    told = {name: function.get(name) for name in ("name", "description", "parameters")}
    for name in ("strict", "defer_loading"):
        if function.get(name) is not None:
            told[name] = function[name]
    return {"type": "function", "function": told}


# -- marks ---------------------------------------------------------------------------------------


def root(scope: str, conversation_system: str | None, tools: Sequence[Any]) -> bytes:
    """The mark of a head."""
    return _digest(scope.encode(), _canonical([conversation_system, list(tools)]))


def extend(marks: Sequence[bytes], before: Sequence[Mapping[str, Any]],
           messages: Sequence[Mapping[str, Any]]) -> list[bytes]:  # fmt: skip
    """The marks after each of `messages`, which follow `before`."""
    ids: list[Any] = []
    for message in before:
        ids = _ids(message, ids)
    found: list[bytes] = []
    last = marks[-1]
    for message in messages:
        last = _digest(last, _canonical(_told(message, ids)))
        ids = _ids(message, ids)
        found.append(last)
    return found


def _ids(message: Mapping[str, Any], ids: list[Any]) -> list[Any]:
    """The ids of the calls that results may be of."""
    if message["role"] == "assistant":
        return [call["id"] for call in message.get("tool_calls") or ()]
    return ids


def _told(message: Mapping[str, Any], ids: Sequence[Any]) -> list[Any]:
    """What makes the message another one: no ids, which frameworks make anew, but their order."""
    role, content = message["role"], message["content"]
    if role != "assistant":
        place = ids.index(message["tool_call_id"]) if message.get("tool_call_id") in ids else -1
        return [role, content, place]
    calls = [
        [call["function"]["name"], call["function"]["arguments"]]
        for call in message.get("tool_calls") or ()
    ]
    return [role, content.strip(), calls]


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()
