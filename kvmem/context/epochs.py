"""Edits of history, and their price: the prefix before the first edit stays, all behind it is paid
for again."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvmem.context.spans import HEAD, Link
from kvmem.errors import PrefixBroken

__all__ = ["Drop", "Edit", "Quote", "Replace", "Undo", "edited", "quote"]


class Drop(msgspec.Struct, frozen=True):
    """Leaves out spans `first` to `last`, but for pinned ones. The head is span 0."""

    first: int
    last: int


class Replace(msgspec.Struct, frozen=True):
    """Puts one message in place of spans `first` to `last`: a summary, a shorter tool result.
    Pinned ones stay, after it."""

    first: int
    last: int
    message: Any


class Undo(msgspec.Struct, frozen=True):
    """Leaves out the last `turns` user messages and all after the first of them, but for pinned
    spans."""

    turns: int = 1


Edit = Drop | Replace | Undo


class Quote(msgspec.Struct, frozen=True):
    """The price of an edit.

    Args:
        tokens_before, tokens_after: of the ledger.
        tokens_kept: of the prefix that both have.
        blocks_kept: whole blocks of it, which the engine can reuse.
        blocks_lost: whole blocks of the old ledger that are behind it.
        tokens_to_prefill: what the next request computes, but for its own new tokens.
        seconds: that, at the measured speed.
        break_even_turns: after so many turns the shorter history has saved, by reading fewer cached
            tokens a turn, what the edit cost; infinite where it saves nothing.
    """

    tokens_before: int
    tokens_after: int
    tokens_kept: int
    blocks_kept: int
    blocks_lost: int
    tokens_to_prefill: int
    seconds: float
    break_even_turns: float

    def explain(self) -> str:
        """One line for people."""
        turns = self.break_even_turns
        pays = f"pays from turn {math.ceil(turns):,} on" if math.isfinite(turns) else "never pays"
        return (
            f"{self.tokens_before:,} tokens become {self.tokens_after:,}; {self.tokens_kept:,} "
            f"stay cached, {self.tokens_to_prefill:,} are computed in {self.seconds:.2f} s: {pays}"
        )


def quote(
    old: array[int],
    new: array[int],
    prefill_tokens_s: float,
    block_tokens: int,
    cached_price: float,
) -> Quote:
    """The price of going from the one to the other; `cached_price` is what a cached token costs a
    turn, in computed ones (a tenth, by the providers' price lists)."""
    kept = _common(old, new)
    blocks = kept // block_tokens
    again = len(new) - blocks * block_tokens
    saved = (len(old) - len(new)) * cached_price
    extra = again * (1 - cached_price)
    return Quote(
        tokens_before=len(old),
        tokens_after=len(new),
        tokens_kept=kept,
        blocks_kept=blocks,
        blocks_lost=len(old) // block_tokens - blocks,
        tokens_to_prefill=again,
        seconds=again / prefill_tokens_s,
        break_even_turns=extra / saved if saved > 0 else math.inf,
    )


def _common(a: array[int], b: array[int]) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare at the speed of memory
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def edited(links: Sequence[Link], edits: Sequence[Edit]) -> list[Link | Mapping[str, Any]]:
    """The history after the edits, in order of their spans; messages stand for what is put in.

    Raises:
        PrefixBroken: an edit names no span, or one that another edit names.
    """
    parts: list[Link | Mapping[str, Any]] = list(links)
    taken: set[int] = set()
    put: dict[int, Mapping[str, Any]] = {}
    for edit in edits:
        first, last = _reach(links, edit)
        if not 1 <= first <= last < len(links):
            raise PrefixBroken(
                f"Spans {first} to {last} can't be edited: there are 1 to {len(links) - 1}",
                next_step="The head is span 0 and stays; see the ledger's `spans`.",
            )
        reach = set(range(first, last + 1))
        if reach & taken:
            raise PrefixBroken(
                f"Span {min(reach & taken)} is in two edits", next_step="Give each span to one."
            )
        taken |= reach
        if isinstance(edit, Replace):
            put[first] = edit.message
    new: list[Link | Mapping[str, Any]] = []
    for index, part in enumerate(parts):
        if index in put:
            new.append(put[index])
        if index not in taken or links[index].span.pinned:
            new.append(part)
    return new


def _reach(links: Sequence[Link], edit: Edit) -> tuple[int, int]:
    if not isinstance(edit, Undo):
        return edit.first, edit.last
    users = [link.index for link in links if link.span.role == "user"]
    if not 1 <= edit.turns <= len(users):
        raise PrefixBroken(
            f"There are {len(users)} turns, not {edit.turns}", next_step="Undo fewer of them."
        )
    assert links[0].span.role == HEAD
    return users[-edit.turns], len(links) - 1
