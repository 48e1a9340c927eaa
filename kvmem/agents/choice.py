"""What a child costs: by the prefix of its parent, or by a message of its own; told before it is
made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

__all__ = ["Choice", "Share", "Side", "choose"]

Share = Literal["prefix", "message"]
CACHED_PRICE = 0.1  # of a cached token against a computed one, as providers ask it


class Side(msgspec.Struct, frozen=True):
    """One way for all children together: tokens of their first prompts."""

    computed_tokens: int
    cached_tokens: int
    cached_price: float = CACHED_PRICE

    @property
    def price(self) -> float:
        """In computed tokens."""
        return self.computed_tokens + self.cached_price * self.cached_tokens


class Choice(msgspec.Struct, frozen=True):
    """Sharing the prefix against sending a message, for `n` children of one parent.

    Args:
        n: children.
        prefix_tokens: of the parent's ledger.
        prefix: with all of the parent's ledger before each child's text.
        message: with the head (system prompt and tools) alone before it.
        longer_tokens: so much longer may each message be before the prefix is as cheap: what the
            children must be told of the prefix has to fit in it. Negative where it is dearer.
    """

    n: int
    prefix_tokens: int
    prefix: Side
    message: Side
    longer_tokens: int

    @property
    def cheaper(self) -> Share:
        """The side with the lower price; the prefix where they are equal, for it loses nothing."""
        return "message" if self.message.price < self.prefix.price else "prefix"

    def explain(self) -> str:
        """One line."""
        children = "child" if self.n == 1 else "children"
        told = (
            f"{self.n} {children}: the prefix of {self.prefix_tokens:,} tokens costs "
            f"{self.prefix.price:,.0f} (computes {self.prefix.computed_tokens:,}, reuses "
            f"{self.prefix.cached_tokens:,}), a message costs {self.message.price:,.0f} (computes "
            f"{self.message.computed_tokens:,}, reuses {self.message.cached_tokens:,}): "
        )
        if self.cheaper == "prefix":
            return told + "the prefix is cheaper"
        return told + (
            f"a message is cheaper, as long as what it says of the prefix takes less than "
            f"{self.longer_tokens:,} tokens"
        )

    def __repr__(self) -> str:
        return f"<Choice {self.explain()}>"


def choose(
    *,
    prefix_tokens: int,
    head_tokens: int,
    known_tokens: int,
    tails: Sequence[int],
    block_tokens: int,
    cached_price: float = CACHED_PRICE,
) -> Choice:
    """The choice for children whose own texts are `tails` tokens long.

    An engine keeps whole blocks, so each child computes the rest of the last one again. What the
    engine does not know of the shared part is computed once, by the first child.

    Args:
        prefix_tokens: of the parent's ledger.
        head_tokens: of its head.
        known_tokens: of the ledger's first tokens, those that the engine has computed.
        tails: tokens of each child's own text.
        block_tokens: of the engine's blocks.
        cached_price: of a cached token against a computed one.
    """

    def side(shared: int) -> Side:
        whole = shared // block_tokens * block_tokens
        first = max(0, whole - known_tokens // block_tokens * block_tokens)
        n = len(tails)
        return Side(first + n * (shared - whole) + sum(tails), n * whole - first, cached_price)

    prefix, message = side(prefix_tokens), side(head_tokens)
    return Choice(
        n=len(tails),
        prefix_tokens=prefix_tokens,
        prefix=prefix,
        message=message,
        longer_tokens=int((prefix.price - message.price) / max(1, len(tails))),
    )
