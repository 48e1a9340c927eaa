"""The prompts that an engine remembers as chains of blocks, for whoever draws them as a tree.

A chain is the blocks of a prompt with its reply. Chains that begin alike share their first blocks.
Of each block only the first 8 bytes of its key are told: enough to tell a million apart, and
`kvmem inspect block` takes them. Salts are digests, and there is no text (I11).
"""

from __future__ import annotations

import msgspec

__all__ = ["Chain", "Chains"]


class Chain(msgspec.Struct, frozen=True, array_like=True):
    """`number` is its own while it is remembered; `marks` has 8 bytes a block; `tenant` is "" where
    the request had no salt."""

    number: int
    session: str
    tenant: str
    request_id: str
    marks: bytes


class Chains(msgspec.Struct, frozen=True):
    """What changed since `since` was asked for, and what is remembered now.

    `known` are the numbers of all chains, 8 bytes each, little-endian; `host` and `disk` how many
    blocks of each are there from its first on, 4 bytes each; -1 where that is not known: under an
    adapter, other weights or approximate KV, and where the model has several KV-cache groups.
    `more`: so much changed that it is not all told; ask again with `stamp`.
    """

    stamp: int
    changed: tuple[Chain, ...]
    known: bytes
    host: bytes
    disk: bytes
    block_tokens: int
    more: bool = False
    took_s: float = 0.0
