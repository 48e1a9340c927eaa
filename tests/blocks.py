"""Prompts as chains of keys, and the few moves that every test of the host tier makes."""

from __future__ import annotations

import hashlib

from kvmem._core import HostTier


def chain(prompt: str, n: int, parent: bytes = b"") -> list[bytes]:
    """n chained keys; prompts of another name share none of them."""
    keys = []
    for i in range(n):
        parent = hashlib.sha256(parent + f"{prompt} {i}".encode()).digest()
        keys.append(parent)
    return keys


def put(tier: HostTier, keys: list[bytes]) -> int:
    """Stores what is missing of `keys`; returns how many blocks match afterwards."""
    _, slots, generations, _ = tier.reserve(keys, 0, len(keys))
    tier.publish(slots, generations, generations)
    return tier.match(keys)


def use(tier: HostTier, keys: list[bytes]) -> int:
    lease, n, _, _ = tier.acquire(keys, 0, len(keys))
    if lease:
        tier.release(lease)
    return n


def sound(tier: HostTier) -> bool:
    return tier.check_integrity() == []
