"""Reads Mooncake's traces (its FAST25 release): a line a request, `timestamp` in milliseconds, and
the chained `hash_ids` of its blocks of 512 tokens, without sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kvmem.explain.lint.lines import decode, records
from kvmem.explain.lint.values import Call, Fault

__all__ = ["NAME", "accepts", "calls"]

NAME = "mooncake"
BLOCK_TOKENS = 512


class _Row(msgspec.Struct):
    timestamp: float
    hash_ids: list[int]
    input_length: Annotated[int, msgspec.Meta(ge=0)] | None = None


def accepts(first: dict[str, Any]) -> bool:
    """Whether a log with this record is one of Mooncake's."""
    return "hash_ids" in first and "timestamp" in first


def calls(path: Path) -> Iterator[Call | Fault]:
    """Each request of the trace, a session by itself."""
    for record in records(path):
        row = record if isinstance(record, Fault) else decode(path, record, _Row)
        if isinstance(row, Fault):
            yield row
            continue
        line = record.line
        yield Call(
            line, f"request {line}", None, ids=row.hash_ids, tokens_per_id=BLOCK_TOKENS,
            input_tokens=row.input_length, at_s=row.timestamp / 1e3,
        )  # fmt: skip
