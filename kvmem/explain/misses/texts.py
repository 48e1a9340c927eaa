"""A decoded prompt cut into its messages, by the marks that chat templates write.

What is not one of these forms is one part of plain text, in which a change is a change of the
input, no more.
"""

from __future__ import annotations

import re

from kvmem.explain.lint.values import Part

__all__ = ["cut", "parts_of"]

# Each a turn: who speaks, and what is said up to the end's mark, or the end of the prompt.
_FORMS = (
    re.compile(r"<\|im_start\|>(?P<role>\w+)\n?(?P<text>.*?)(?:<\|im_end\|>|\Z)", re.DOTALL),
    re.compile(
        r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n*(?P<text>.*?)"
        r"(?:<\|eot_id\|>|<\|eom_id\|>|\Z)",
        re.DOTALL,
    ),
    re.compile(r"<start_of_turn>(?P<role>\w+)\n?(?P<text>.*?)(?:<end_of_turn>|\Z)", re.DOTALL),
    re.compile(
        r"<\|start\|>(?P<role>\w+)(?:<\|channel\|>\w+)?<\|message\|>(?P<text>.*?)"
        r"(?:<\|end\|>|<\|return\|>|<\|call\|>|\Z)",
        re.DOTALL,
    ),
    re.compile(
        r"<\|(?P<role>system|user|assistant)\|>\n?(?P<text>.*?)"
        r"(?:<\|end\|>|(?=<\|(?:system|user|assistant)\|>)|\Z)",
        re.DOTALL,
    ),
)
_ROLES = {"model": "assistant", "developer": "system", "ipython": "tool", "function": "tool"}
_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT = re.compile(r"\A\s*<tool_response>")


def cut(text: str) -> list[tuple[str, str, int]]:
    """The turns of a prompt: role, text, and the character after its end's mark."""
    for form in _FORMS:
        found = [(_ROLES.get(m["role"], m["role"]), m["text"], m.end())
                 for m in form.finditer(text)]  # fmt: skip
        if found:
            return found
    return [("text", text, len(text))] if text else []


def parts_of(text: str) -> list[Part]:
    """A prompt's turns as the linter's parts; `origin` is the turn's number."""
    parts: list[Part] = []
    for i, (role, said, _) in enumerate(cut(text)):
        if role == "text":
            parts.append(Part("text", "text", said, content=said, origin=i))
        elif role == "tools":
            parts.append(_tools(said, i))
        elif role == "system":
            parts += _head(said, i)
        else:
            parts.append(_message(role, said, i))
    return parts


def _tools(text: str, turn: int) -> Part:
    pieces = tuple(line for line in text.splitlines() if line.strip())
    return Part("tools", "tools", text, pieces=pieces, origin=turn)


def _head(text: str, turn: int) -> list[Part]:
    """A system prompt, and the tools that a template has put into it, as two parts."""
    tools = _TOOLS.search(text)
    rest = text if tools is None else text[: tools.start()] + text[tools.end() :]
    parts = [Part("system", "system", rest, content=rest, origin=turn)]
    return [*parts, _tools(tools[1], turn)] if tools is not None else parts


def _message(role: str, text: str, turn: int) -> Part:
    thinking = _THINK.search(text) if role == "assistant" else None
    content = text if thinking is None else text[: thinking.start()] + text[thinking.end() :]
    pieces = tuple(call.strip() for call in _CALL.findall(content))
    if role == "user" and _RESULT.search(text):
        role = "tool"
    return Part(
        "message",
        role,
        text,
        content=_CALL.sub("", content),
        thinking="" if thinking is None else thinking[1],
        pieces=pieces,
        origin=turn,
    )
