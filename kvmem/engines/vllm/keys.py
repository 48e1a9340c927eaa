"""The keys under which a request's blocks are stored, in each KV-cache group.

The engine hashes a request's tokens once, every `hash_tokens`; the hash of a block is the hash at
its end. That is the key itself in a model's first group. What else tells blocks apart, the other
groups' index and a `tweak` for an adapter or for weights that were changed live, is hashed into it:

    key = SHA-256(engine's hash | group as 4 bytes, little-endian | tweak)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from kvmem.types import GroupShape

__all__ = ["Chains"]


class Chains:
    """A request's keys by group; they follow the engine's list of hashes.

    That grows at its end; a streamed session cuts its last ones off, and grows others.

    Args:
        hashes: the engine's own list, chained: a hash that is still there had the same before it.
        shapes: the model's groups.
        hash_tokens: tokens of one hash; every group's blocks are so many, or a multiple.
        tweak: see `tweak`.
    """

    def __init__(
        self, hashes: list[Any], shapes: Sequence[GroupShape], hash_tokens: int, tweak: bytes = b""
    ) -> None:
        self._hashes = hashes
        self._units = [shape.block_tokens // hash_tokens for shape in shapes]
        self._tweak = tweak
        self._keys: list[list[bytes]] = [[] for _ in shapes]
        self._made_of: list[list[bytes]] = [[] for _ in shapes]

    @property
    def tweak(self) -> bytes:
        """What else these blocks depend on; nothing for the weights of the start alone."""
        return self._tweak

    @tweak.setter
    def tweak(self, value: bytes) -> None:
        if value != self._tweak:
            self._tweak = value
            self._keys = [[] for _ in self._units]
            self._made_of = [[] for _ in self._units]

    def __len__(self) -> int:
        """How many groups."""
        return len(self._units)

    def of(self, group: int) -> list[Any]:
        """The keys of the group's blocks whose tokens the engine has hashed; not to be changed."""
        unit = self._units[group]
        if group == 0 and unit == 1 and not self._tweak:
            return self._hashes
        keys, made_of = self._keys[group], self._made_of[group]
        while keys and self._hashes[len(keys) * unit - 1 : len(keys) * unit] != made_of[-1:]:
            keys.pop()
            made_of.pop()
        for at in range((len(keys) + 1) * unit - 1, len(self._hashes), unit):
            keys.append(self._key(group, self._hashes[at]))
            made_of.append(self._hashes[at])
        return keys

    def all(self) -> list[list[Any]]:
        """`of` every group."""
        return [self.of(group) for group in range(len(self._units))]

    def _key(self, group: int, of_engine: bytes) -> bytes:
        if group == 0 and not self._tweak:
            return of_engine
        text = of_engine + group.to_bytes(4, "little") + self._tweak
        return hashlib.sha256(text).digest()
