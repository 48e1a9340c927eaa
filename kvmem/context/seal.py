"""What makes a prompt's head another one every time: clocks, ids, counters, paths, unordered JSON.

The head, system prompt and tools, is the prefix of everything: one volatile word in it and nothing
behind it is ever found again. It belongs at the tail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec

from kvmem.context.renderer import canonical

__all__ = ["Finding", "find_volatile", "move_to_tail"]

_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_HEX = "[0-9a-f]"
_TEMP = r"(?:/tmp|/var/folders|/private/tmp|\bC:\\Users\\[^\\\s]+\\AppData\\Local\\Temp)"
_COUNTED = "turn|step|attempt|iteration|request|message"
_NAMED = "sess|session|req|request|run|trace|thread|msg|conv"
# The most telling first: a piece is told of once.
_PATTERNS = (
    ("uuid", rf"\b{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}\b"),
    (
        "timestamp",
        r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)?",
    ),
    ("date", r"\b\d{4}-\d\d-\d\d\b"),
    ("date", rf"\b\d{{1,2}} {_MONTH},? \d{{4}}\b|\b{_MONTH} \d{{1,2}},? \d{{4}}\b"),
    ("clock", r"\b(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?(?: ?[ap]\.?m\.?)?\b"),
    ("epoch", r"\b1[5-9]\d{8}(?:\d{3})?(?:\.\d+)?\b"),
    ("path", rf"{_TEMP}[/\\][\w./\\-]*[\w/\\]"),
    ("id", rf"\b(?:0x)?(?={_HEX}*\d)(?={_HEX}*[a-f]){_HEX}{{16,64}}\b"),
    ("id", rf"\b(?:{_NAMED})[_-](?=\w*\d)\w{{8,}}\b"),
    (
        "counter",
        rf"\b(?:{_COUNTED})\s*(?:#|no\.?|number)?\s*[:=]?\s*\d+(?:\s*(?:of|/)\s*\d+)?\b",
    ),
)
_RULES = tuple((rule, re.compile(pattern, re.IGNORECASE)) for rule, pattern in _PATTERNS)


class Finding(msgspec.Struct, frozen=True):
    """One volatile piece: characters [start, stop) of `where` ("system" or "tools.N")."""

    rule: str
    where: str
    start: int
    stop: int
    text: str

    @property
    def repair(self) -> str:
        """What to do about it."""
        if self.rule == "unordered":
            return "Give the keys in order: they came in another order than they are written in."
        return f"Take {self.text!r} out of the head and append it at the tail, in a message."


def find_volatile(system: str | None, tools: Sequence[Any] = ()) -> tuple[Finding, ...]:
    """Every volatile piece of a head, by place; none means that it can be sealed."""
    found = list(_in_text("system", system or ""))
    for index, tool in enumerate(tools):
        where = f"tools.{index}"
        text = tool if isinstance(tool, str) else json.dumps(tool, ensure_ascii=False, default=str)
        found += _in_text(where, text)
        if not isinstance(tool, str) and _unordered(tool):
            found.append(Finding("unordered", where, 0, len(text), text))
    return tuple(sorted(found, key=lambda f: (f.where, f.start)))


def move_to_tail(system: str) -> tuple[str, str]:
    """The system prompt with every volatile piece out of it, and the text that says them instead:
    to be appended in a message, each time anew. Empty where nothing is volatile.
    """
    kept, said, at = [], [], 0
    for number, found in enumerate(find_volatile(system), 1):
        name = f"{found.rule} {number}"
        kept += [system[at : found.start], f"[{name}: said at the end]"]
        said.append(f"{name}: {found.text}")
        at = found.stop
    return "".join([*kept, system[at:]]), "\n".join(said)


def _in_text(where: str, text: str) -> Iterator[Finding]:
    taken = [False] * len(text)
    for rule, pattern in _RULES:
        for match in pattern.finditer(text):
            if any(taken[match.start() : match.end()]):
                continue
            taken[match.start() : match.end()] = [True] * (match.end() - match.start())
            yield Finding(rule, where, match.start(), match.end(), match[0])


def _unordered(value: Any) -> bool:
    """Whether something in it has no order of its own: a set says another thing every run."""
    if isinstance(value, AbstractSet):
        return True
    if isinstance(value, Mapping):
        return any(_unordered(one) for one in value.values())
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and any(_unordered(one) for one in value)
    )


def digest_of(system: str | None, tools: Sequence[Any]) -> bytes:
    """What a sealed head is compared by."""
    return canonical({"system": system, "tools": list(tools)})
