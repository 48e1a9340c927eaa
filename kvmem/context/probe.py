"""Whether a renderer's pieces are the whole: conversations rendered both ways and compared.

Whole is what a server does with the same messages: the template over all of them, then encoded.
In pieces is what a ledger does. Where they differ the template, or the tokenizer, breaks a rule:

    thinking    an assistant's earlier thinking is left out, or put otherwise, later on
    arguments   a tool call's arguments are written in another form than the model's
    trimmed     blanks at the ends of a message are lost
    empty       a message without content is left out
    boundary    tokens of two messages are one token
    refused     the template does not take such a conversation
    rewritten   what came before is changed in another way

A ledger over such a renderer is still append-only: it keeps what was sent and sampled. But the
model then reads another history than its template would give it, so each rule is to be accepted by
name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from kvmem.context.renderer import Probed
from kvmem.errors import PrefixBroken

__all__ = ["RULES", "Break", "probe"]

RULES = ("thinking", "arguments", "trimmed", "empty", "boundary", "refused", "rewritten")
_TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}


class Break(msgspec.Struct, frozen=True):
    """One rule that a template breaks: in which conversation, at which token, and what stands there
    in the whole and in pieces."""

    rule: str
    conversation: str
    at: int
    whole: str
    pieces: str


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _call(arguments: Any) -> dict[str, Any]:
    call = {"id": "call00001", "type": "function"}
    return {**call, "function": {"name": "search", "arguments": arguments}}


def _conversations() -> Iterator[tuple[str, str, list[dict[str, Any]], list[Any]]]:
    """Name, the rule that is suspected where it differs, messages, tools."""
    yield "plain turns", "rewritten", [_user("One?"), _said("1"), _user("Two?"), _said("2")], []
    yield "many bytes", "boundary", [_user("größe 你好 🙂"), _said("да 🙂🙂"), _user("e\u0301")], []
    yield "lines", "boundary", [_user("a\n\nb\n"), _said("c\n\n\nd"), _user("\ne")], []
    yield "blanks", "trimmed", [_user("  indented  "), _said(" so  "), _user("then")], []
    yield "nothing", "empty", [_user("go on"), _said(""), _user("again")], []
    yield (
        "thinking", "thinking",
        [_user("Why?"), _said("<think>\nbecause\n</think>\n\nSo."), _user("And?"), _said("That.")],
        [],
    )  # fmt: skip
    yield "tools", "rewritten", [_user("Find it."), _said("Found."), _user("More.")], [_TOOL]
    yield (
        "a tool call", "arguments",
        [
            _user("Find it."),
            _said("", tool_calls=[_call({"q": "b", "a": [1, 2]})]),
            {"role": "tool", "tool_call_id": "call00001", "name": "search", "content": "yes"},
            _said("Found."),
            _user("Thanks."),
        ],
        [_TOOL],
    )  # fmt: skip


def probe(
    renderer: Probed, *, system: bool | None = None, tools: bool | None = None
) -> tuple[Break, ...]:
    """Every conversation both ways; the rules that are broken, none where all is as it should be.

    Tens of milliseconds.

    Args:
        renderer: whose.
        system: only with a system prompt, or only without; None tries both.
        tools: whether conversations with tools matter; None: they do.
    """
    with_system = (True, False) if system is None else (system,)
    found = []
    for name, suspected, messages, its_tools in _conversations():
        if its_tools and tools is False:
            continue
        for head in ("You are exact." if one else None for one in with_system):
            broken = _compare(renderer, name, suspected, messages, its_tools, head)
            if broken is not None:
                found.append(broken)
                break
    return tuple(found)


def _compare(
    renderer: Probed,
    name: str,
    suspected: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any],
    system: str | None,
) -> Break | None:
    first = [] if system is None else [{"role": "system", "content": system}]
    try:
        whole = renderer.whole([*first, *messages], tools)
    except PrefixBroken as error:
        return Break("refused", name, 0, str(error), "")
    try:
        pieces = _in_pieces(renderer, system, messages, tools)
    except PrefixBroken as error:
        return Break(suspected, name, int(getattr(error, "at", 0)), "", str(error))
    if whole == pieces:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(whole, pieces, strict=False)) if a != b),
        min(len(whole), len(pieces)),
    )
    texts = [renderer.decode(ids[max(0, at - 2) : at + 6]) for ids in (whole, pieces)]
    same_text = renderer.decode(whole) == renderer.decode(pieces)
    return Break("boundary" if same_text else suspected, name, at, texts[0], texts[1])


def _in_pieces(
    renderer: Probed,
    system: str | None,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any],
) -> list[int]:
    ids = renderer.head(system, tools)
    last = "system"
    for message in messages:
        if message["role"] == "assistant" and "tool_calls" not in message:
            ids += renderer.generation(last)
            ids += renderer.encode(message["content"])
            ids += renderer.close()
        else:
            ids += renderer.suffix(last, message)
        last = message["role"]
    return ids
