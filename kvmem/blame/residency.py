"""Whether what the answer depends on was in the served context: its value, not only its block.

A summary that keeps a value keeps the evidence, though the block that said it first is gone. So a
fact is there where a line of the served context says its value beside most of its terms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from kvmem.blame.evidence import Question, told
from kvmem.blame.values import Evidence, Piece, Residency, Turn
from kvmem.blame.words import holds, lines, terms, values

__all__ = ["residencies"]

SAYS = 0.5  # of a fact's terms, beside its value
DENIES = 0.8  # of them, beside another value
CUT = 12  # characters of its beginning that a truncated piece still has
_MARK = re.compile(r"truncated|cut off|elided|omitted|\[\.\.\.\]|\.\.\.|…", re.IGNORECASE)


class _Said(msgspec.Struct, frozen=True):
    """A served line, or two that follow one another: of which piece, its text, and the share of the
    fact's terms that it has."""

    index: int
    line: str
    share: float
    two: bool = False


def residencies(turn: Turn, evidence: Sequence[Evidence]) -> list[Residency]:
    """Of each piece of evidence, whether the served context says it, and what it says instead."""
    question = Question(turn)
    return [_residency(turn, question, one) for one in evidence]


def _residency(turn: Turn, question: Question, one: Evidence) -> Residency:
    piece = turn.full[one.index]
    wanted = set(one.group.split()) or question.terms
    same = next((p for p in turn.served if _same(p, piece)), None)
    spoken = [s for s in _spoken(turn.served, question, wanted) if s.share >= SAYS]
    hit = next((s for s in spoken if _says_all(s.line, one.values)), None)
    other = _otherwise(turn, spoken, one)
    epoch = next((e.number for e in turn.epochs if one.index in e.removed), None)
    value = hit is not None or same is not None
    cause, where, said = "", None, ""
    if value:
        where = same.index if same is not None else hit.index if hit is not None else None
        if other is not None:
            cause, said = "contradicted", other.line
    elif other is not None:
        stale = any(holds(other.line, old) for old in one.older)
        cause, where, said = "stale" if stale else "contradicted", other.index, other.line
    else:
        left = next((p for p in turn.served if _is_cut(p, piece)), None)
        cause = "lost" if left is None else "truncated"
        if left is not None:
            where, said = left.index, left.text[:200]
    return Residency(
        index=one.index, block=same is not None, value=value, where=where, cause=cause,
        said=said[:300], epoch=None if same is not None else epoch,
    )  # fmt: skip


def _same(a: Piece, b: Piece) -> bool:
    return a.role == b.role and a.text == b.text and a.call == b.call


def _spoken(pieces: Sequence[Piece], question: Question, wanted: set[str]) -> Iterator[_Said]:
    """Every line, and every two that follow one another, by what they have of a fact's terms."""
    for piece in pieces:
        before: tuple[str, set[str]] | None = None
        for line, text in told(piece):
            yield _Said(piece.index, line, question.coverage(text, wanted))
            if before is not None:
                share = question.coverage(text | before[1], wanted)
                yield _Said(piece.index, f"{before[0]} {line}", share, two=True)
            before = (line, text)


def _says_all(line: str, wanted: Sequence[str]) -> bool:
    """Whether a line says at least half of the values; of one, that one."""
    said = sum(holds(line, value) for value in wanted)
    return bool(wanted) and 2 * said >= len(wanted)


def _otherwise(turn: Turn, spoken: Sequence[_Said], one: Evidence) -> _Said | None:
    """The last line that gives the fact another value: an older one, or another candidate."""
    others = {*one.older, *(c for c in turn.candidates if c not in one.values)}
    found = None
    for said in spoken:
        if said.two or said.share < DENIES or _says_all(said.line, one.values):
            continue
        # A line of several facts: the clause that tells of this one.
        told_by = [said.line]
        if "{" not in said.line and "," in said.line:
            wanted = set(one.group.split())
            told_by = [c for c in re.split(r",\s+", said.line) if wanted <= terms(c)] or told_by
        if any(values(c) and any(holds(c, o) for o in others) for c in told_by):
            found = said
    return found


def _is_cut(served: Piece, piece: Piece) -> bool:
    """Whether a served piece is the beginning or the end of another, with less in it."""
    a, b = served.text.strip(), piece.text.strip()
    if served.role != piece.role or len(a) >= len(b) + 40 or a == b or not b:
        return False
    if served.call and served.call == piece.call and len(a) < len(b):
        return True
    kept = _MARK.split(a)[0].rstrip(" [(")
    if len(kept) >= min(CUT, len(b) // 2) and b.startswith(kept):
        return True
    last = next(iter(reversed(list(lines(a)))), "")
    return len(last) >= CUT and b.endswith(last)
