"""Prompts as chains of keys, and the few moves that every test of the host tier makes."""

from __future__ import annotations

import hashlib

import numpy as np

from kvmem._core import HostTier
from kvmem.cache import Cache
from kvmem.types import GroupShape

BLOCKS = (GroupShape(1),)  # one full-attention group; tokens and blocks are the same


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


def turn(
    cache: Cache, request_id: str, keys: list[bytes], *, asks: int = 1, step: int = 1000
) -> int:
    """One request in the connector's order; returns how many blocks it found.

    It asks `asks` times before it is scheduled, and computes `step` blocks at a time.
    """
    for _ in range(asks):
        found = cache.acquire(request_id, [keys], start=0, limit=len(keys)).n_blocks
    for stop in range(min(found + step, len(keys)), len(keys) + step, step):
        stop = min(stop, len(keys))
        room = cache.reserve(request_id, 0, keys, range(stop))
        cache.publish(room.slots, room.generations, np.ones(len(room.slots), np.uint64))
        cache.hold(request_id, 0, keys, stop)
    cache.release(request_id)
    return found


def sound(tier: HostTier) -> bool:
    return tier.check_integrity() == []
