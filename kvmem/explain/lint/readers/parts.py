"""Messages of every API as parts of a prompt: content, thinking, tool calls and tool results."""

from __future__ import annotations

from typing import Any

import msgspec

from kvmem.explain.lint.values import Part

__all__ = ["HEAD_ROLES", "WrongMessage", "message_part", "tools_part"]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
HEAD_ROLES = frozenset({"system", "developer"})
_THINKING = ("reasoning_content", "reasoning", "thinking")


class WrongMessage(ValueError):
    """A message that no API would take; the text says why."""


def message_part(message: Any, index: int | None) -> Part:
    """A message as a part.

    Args:
        message: {"role", "content", ...} of OpenAI's chat completions or Anthropic's messages.
        index: its place among the request's messages.

    Raises:
        WrongMessage: not an object, or of a role that there is not.
    """
    if not isinstance(message, dict):
        raise WrongMessage(f"message {index} is no JSON object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise WrongMessage(f"message {index} has the role {role!r}")
    thinking, content, pieces = _blocks(message.get("content"), index)
    for name in _THINKING:
        if isinstance(message.get(name), str) and message[name]:
            thinking.append(message[name])
            break
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise WrongMessage(f"message {index} has tool_calls that are no list")
    pieces += [_call(call.get("function", call)) for call in calls if isinstance(call, dict)]
    if isinstance(message.get("function_call"), dict):
        pieces.append(_call(message["function_call"]))
    return _part(str(role), index, thinking, content, pieces, message)


def tools_part(tools: Any) -> Part | None:
    """The tools of a request as a part; None where it has none.

    Raises:
        WrongMessage: `tools` is no list.
    """
    if not tools:
        return None
    if not isinstance(tools, list):
        raise WrongMessage("tools is no list")
    pieces = tuple(json_text(tool) for tool in tools)
    return Part("tools", "tools", "\n".join(pieces), pieces=pieces, origin=tools)


def json_text(value: Any) -> str:
    """A value as JSON in the order that it came in; a text as it is."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _part(
    role: str,
    index: int | None,
    thinking: list[str],
    content: list[str],
    pieces: list[str],
    origin: Any,
) -> Part:
    thought, said = "\n".join(thinking), "\n".join(content)
    text = said
    if thought:
        text = f"<think>\n{thought}\n</think>\n{said}"
    if pieces:
        text = "\n".join([text, *pieces]) if text else "\n".join(pieces)
    return Part(
        "system" if role in HEAD_ROLES else "message",
        role,
        text,
        message=index,
        content=said,
        thinking=thought,
        pieces=tuple(pieces),
        origin=origin,
    )


def _call(function: Any) -> str:
    """A tool call as one line; its id is left out, since few templates write it."""
    if not isinstance(function, dict):
        return json_text(function)
    arguments = function.get("arguments", function.get("input", {}))
    return f'{{"name": {json_text([function.get("name")])[1:-1]}, "arguments": {_json(arguments)}}}'


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) and arguments else json_text(arguments or {})


def _blocks(content: Any, index: int | None) -> tuple[list[str], list[str], list[str]]:
    """Thinking, texts and tool calls of a message's content."""
    if content is None:
        return [], [], []
    if isinstance(content, str):
        return [], [content], []
    if isinstance(content, dict):
        return [], [json_text(content)], []
    if not isinstance(content, list):
        raise WrongMessage(f"message {index} has a content that is {type(content).__name__}")
    thinking: list[str] = []
    texts: list[str] = []
    calls: list[str] = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif not isinstance(block, dict):
            raise WrongMessage(f"message {index} has a content block that is no object")
        elif block.get("type") in ("thinking", "redacted_thinking"):
            thinking.append(str(block.get("thinking") or block.get("data") or ""))
        elif block.get("type") == "tool_use":
            calls.append(_call(block))
        else:
            texts.append(_block_text(block, index))
    return thinking, texts, calls


def _block_text(block: dict[str, Any], index: int | None) -> str:
    if isinstance(block.get("text"), str):
        return block["text"]
    if block.get("type") == "tool_result":
        _, texts, _ = _blocks(block.get("content"), index)
        return "\n".join(texts)
    # A cache breakpoint is no part of what is read.
    return json_text({name: block[name] for name in block if name != "cache_control"})
