"""What docs/benchmarks.md says of each benchmark: its question, and of each key the aim.

The page is written for people and read here too, so that a report marks what the page promises.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

__all__ = ["Aim", "Benchmark", "benchmarks"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
_NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)")


class Aim(msgspec.Struct, frozen=True):
    """What a figure is to reach: `kind` the bound `value`, or `exact` equality with it."""

    kind: Literal["at least", "at most", "exact"]
    value: float | bool
    text: str

    @classmethod
    def read(cls, text: str) -> Aim | None:
        """The aim that a cell of the page states; None where it states no number."""
        text = text.strip()
        if text in ("true", "false"):
            return cls("exact", text == "true", text)
        found = _NUMBER.search(text)
        if found is None:
            return None
        value = float(found[1].replace(",", ""))
        for kind in ("at least", "at most"):
            if kind in text:
                return cls(kind, value, text)
        return cls("exact", value, text) if _NUMBER.fullmatch(text) else None

    def met(self, value: Any) -> bool | None:
        """Whether a figure reaches it; None where the figure is no number."""
        if isinstance(self.value, bool) or isinstance(value, bool):
            return value is self.value
        if not isinstance(value, int | float):
            return None
        if self.kind == "at least":
            return value >= self.value
        return value <= self.value if self.kind == "at most" else value == self.value


class Benchmark(msgspec.Struct, frozen=True):
    """One benchmark as the page has it: `keys` by name, in the page's order."""

    name: str
    question: str
    keys: dict[str, Aim | None]


def benchmarks(page: str | None = None) -> list[Benchmark]:
    """All that the page lists, in its order."""
    text = page if page is not None else PAGE.read_text(encoding="utf-8")
    head, _, tail = text.partition("## Keys")
    questions = re.findall(r"^\| `(bench_\w+)` \| (.*?) \|$", head, re.MULTILINE)
    parts = re.split(r"^\*\*(bench_\w+)\*\*", tail.partition("## Soak")[0], flags=re.MULTILINE)
    keys = {n: _keys(part) for n, part in zip(parts[1::2], parts[2::2], strict=True)}
    return [Benchmark(name, question, keys.get(name, {})) for name, question in questions]


def _keys(part: str) -> dict[str, Aim | None]:
    """Of a benchmark's table; where it has none, of its text: "`key` (at least 1.6)"."""
    rows = re.findall(r"^\| (`.*?) \|.*\|(.*?)\|$", part, re.MULTILINE)
    if rows:
        return {key: Aim.read(aim) for cell, aim in rows for key in re.findall(r"`(\w+)`", cell)}
    spoken = re.findall(r"`(\w+)`(?:\s+\(([^)]*)\))?", part)
    return {key: Aim.read(" ".join(aim.split())) for key, aim in spoken}
