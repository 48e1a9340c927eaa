"""A ledger's tokens: spans that point at the ones before them, so that forks share their past.

A span never changes and knows only what is before it. A fork is a second ledger with the same last
span; taking it costs nothing, whatever the length.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

import msgspec

__all__ = ["HEAD", "Link", "Span", "chain", "link", "pack"]

HEAD = "head"
ID = "I"  # of array: unsigned, 32 bits


class Span(msgspec.Struct, frozen=True):
    """Tokens [start, stop) of a ledger.

    Args:
        role: "head", "user", "assistant", "tool", "system".
        source: "rendered" by the template, "sampled" by the model, "given" as ids.
        start: its first token.
        stop: the one after its last.
        lead: of its first tokens, those that end the turn before it.
        sampled: of its last tokens, those that the model chose.
        digest: 64 hex digits over its ids.
        message: canonical JSON of the message; empty for the head.
        pinned: whether edits of history leave it in.
    """

    role: str
    source: str
    start: int
    stop: int
    lead: int
    sampled: int
    digest: str
    message: bytes
    pinned: bool = False


class Link:
    """A span with its ids and what is before it; immutable."""

    __slots__ = ("before", "digest", "ids", "index", "span")

    def __init__(self, before: Link | None, span: Span, ids: array[int]) -> None:
        self.before = before
        self.span = span
        self.ids = ids
        self.index: int = 0 if before is None else before.index + 1
        above = b"" if before is None else before.digest
        self.digest: bytes = hashlib.sha256(above + bytes.fromhex(span.digest)).digest()


def pack(ids: Sequence[int]) -> array[int]:
    """Ids as an array of their own."""
    return array(ID, ids)


def link(
    before: Link | None,
    ids: Sequence[int] | array[int],
    *,
    role: str,
    source: str,
    message: bytes,
    lead: int = 0,
    sampled: int = 0,
    pinned: bool = False,
) -> Link:
    """The next span after `before`."""
    packed = pack(ids)
    start = 0 if before is None else before.span.stop
    span = Span(
        role=role,
        source=source,
        start=start,
        stop=start + len(packed),
        lead=lead,
        sampled=sampled,
        digest=hashlib.sha256(packed.tobytes()).hexdigest(),
        message=message,
        pinned=pinned,
    )
    return Link(before, span, packed)


def chain(last: Link, *, after: int = -1) -> list[Link]:
    """The links up to `last`, first to last, that come after number `after`."""
    found = []
    at: Link | None = last
    while at is not None and at.index > after:
        found.append(at)
        at = at.before
    return found[::-1]


def spans_of(last: Link) -> Iterator[Span]:
    """Their spans, first to last."""
    return (one.span for one in chain(last))
