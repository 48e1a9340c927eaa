"""Names the rule that a prompt broke, from the parts before and now."""

from __future__ import annotations

from collections import Counter

import msgspec

from kvmem.explain.lint.values import Part
from kvmem.explain.lint.volatile import volatile

__all__ = ["canonical", "classify", "first_difference", "says_the_same"]

MOST_JSON = 8 << 20  # characters of a text that is tried as JSON


def first_difference(before: list[Part], now: list[Part]) -> int | None:
    """The index of the first part before that does not stand there now; None: `now` extends it."""
    for i, part in enumerate(before):
        if i >= len(now) or not part.same(now[i]):
            return i
    return None


def classify(before: list[Part], now: list[Part], at: int, *, n_sent: int | None = None) -> str:
    """The name of the rule broken at part `at`, their first difference.

    Args:
        before: the earlier prompt, and the reply to it where that is known.
        now: the prompt that should have extended it.
        at: the first index where they differ.
        n_sent: parts of `before` that were sent; what follows is the reply.
    """
    if at >= len(now):
        return "turn-undone"
    old, new = before[at], now[at]
    if "tools" in (old.kind, new.kind):
        return _tools(old, new)
    if old.role == new.role:
        found = _small(old, new)
        if found is not None:
            return found
    if "system" in (old.kind, new.kind):
        return "system-changed"
    if n_sent is not None and at >= n_sent and new.role == "assistant":
        return "reply-rewritten"
    return _moved(before, now, at) or _edited(before, now, at)


def says_the_same(name: str, old: Part, new: Part) -> bool:
    """Whether the earlier form may stand for the new one: a model is told the same by both.

    Blanks at the ends of lines say nothing; within a line they may be a program's.
    """
    if name == "whitespace-changed":
        return _without_ends(old.text) == _without_ends(new.text)
    return name in ("tools-reordered", "json-reserialised")


def _without_ends(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _tools(old: Part, new: Part) -> str:
    if old.kind != new.kind:
        return "tools-changed"
    if old.pieces != new.pieces and sorted(old.pieces) == sorted(new.pieces):
        return "tools-reordered"
    same = [canonical(piece) for piece in old.pieces]
    if same == (others := [canonical(piece) for piece in new.pieces]):
        return "json-reserialised"
    if sorted(same) == sorted(others):
        return "tools-reordered"
    return volatile(old.text, new.text) or "tools-changed"


def _small(old: Part, new: Part) -> str | None:
    """The rules of one part that says the same, or nearly."""
    if old.text.split() == new.text.split() and not old.pieces and not new.pieces:
        return "whitespace-changed"
    if _same_json(old, new):
        return "json-reserialised"
    if old.thinking and not new.thinking and old.content.strip() == new.content.strip():
        return "thinking-stripped" if _same_pieces(old, new) else None
    if _same_pieces(old, new) and old.text.split() == new.text.split():
        return "whitespace-changed"
    found = volatile(old.text, new.text)
    if found == "volatile-counter" and old.kind != "system":
        return None  # a number that somebody changed
    return found


def _same_pieces(old: Part, new: Part) -> bool:
    return len(old.pieces) == len(new.pieces) and all(
        a == b or canonical(a) == canonical(b) for a, b in zip(old.pieces, new.pieces, strict=True)
    )


def _same_json(old: Part, new: Part) -> bool:
    if old.thinking != new.thinking or not _same_pieces(old, new):
        return False
    if old.content == new.content:
        return old.pieces != new.pieces
    if old.content[:1] not in ("{", "["):
        return False
    one, other = canonical(old.content), canonical(new.content)
    return one == other and one != old.content + "\0"


def canonical(text: str) -> str:
    """JSON text in its canonical form; other text as it is, marked so that the two differ."""
    if len(text) > MOST_JSON:
        return text + "\0"
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text + "\0"
    if isinstance(value, dict) and isinstance(value.get("arguments"), str):
        value["arguments"] = canonical(value["arguments"])
    return msgspec.json.encode(value, order="deterministic").decode()


def _moved(before: list[Part], now: list[Part], at: int) -> str | None:
    """The rules of whole messages that are gone, new or elsewhere, the rest untouched."""
    rest, rest_now = before[at:], now[at:]
    for n in range(1, len(rest)):
        if _begins(rest_now, rest[n:]):
            oldest = all(part.kind in ("system", "tools") for part in before[:at])
            return "history-truncated" if oldest else "message-removed"
    for n in range(1, len(rest_now) - len(rest) + 1):
        if _begins(rest_now[n:], rest):
            return "message-inserted"
    if len(rest) > 1 and len(rest_now) >= len(rest):
        moved = Counter(part.identity for part in rest_now[: len(rest)])
        if moved == Counter(part.identity for part in rest):
            return "messages-reordered"
    return None


def _begins(parts: list[Part], with_these: list[Part]) -> bool:
    return len(parts) >= len(with_these) and all(
        a.same(b) for a, b in zip(parts, with_these, strict=False)
    )


def _edited(before: list[Part], now: list[Part], at: int) -> str:
    """The rules of what was written anew."""
    old, new, rest, rest_now = before[at], now[at], before[at:], now[at:]
    size, size_now = (sum(len(part.text) for part in parts) for parts in (rest, rest_now))
    kept = {part.identity for part in rest_now}
    gone = sum(part.identity not in kept for part in rest)
    if len(rest) > len(rest_now) and gone == len(rest):
        head = sum(len(part.text) for part in before[:at] if part.kind == "message")
        return "history-compacted" if head < size and size_now < size else "turn-undone"
    if old.role == new.role:
        is_result = old.role in ("tool", "function") or _is_result(old)
        if is_result and len(new.text) < len(old.text):
            return "tool-result-cleared"
        return "history-edited"
    if gone > 1 and len(rest) > len(rest_now) and size_now * 2 < size:
        return "history-compacted"
    return "history-edited"


def _is_result(part: Part) -> bool:
    """Whether a message carries a tool's result, as Anthropic's user messages do."""
    content = part.origin.get("content") if isinstance(part.origin, dict) else None
    return isinstance(content, list) and any(
        isinstance(block, dict) and block.get("type") == "tool_result" for block in content
    )
