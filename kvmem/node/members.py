"""What a node is started with, and what it keeps of each engine that is attached to it."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvmem.errors import ConfigError
from kvmem.node.wire import KEY_BYTES, More, PackedKeys, Reserve

__all__ = ["Batch", "Engine", "Settings"]

MOST_REQUESTS = 1 << 16  # of an engine that have keys here
MOST_KEYS = 1 << 22  # of an engine's requests together: 128 MiB


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is started with; `path` is a private folder for its socket and its disk."""

    path: Path
    host_gb: float
    disk_gb: float = 0.0
    far: str | None = None
    eviction: str = "s3fifo"
    scrub_mb_s: float = 64.0
    tenant_share: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("host_gb", 0.0, 2.0**20), ("disk_gb", 0.0, 2.0**20), ("tenant_share", 0.0, 1.0),
            ("scrub_mb_s", 0.0, 1e6),
        ):  # fmt: skip
            value = getattr(self, name)
            least_too = name in ("disk_gb", "scrub_mb_s")
            if not (low <= value <= high and (value > low or least_too)):
                raise ConfigError(
                    f"A node's {name} cannot be {value!r}",
                    next_step=f"Give a number up to {high:,.0f}.",
                    setting=name,
                )
        if self.eviction not in ("s3fifo", "lru"):
            raise ConfigError(
                f"A node's eviction cannot be {self.eviction!r}",
                next_step="s3fifo or lru; the order agents is an engine's own.",
                setting="eviction",
            )


class Batch:
    """Slots of one `reserve` that were not all reported."""

    __slots__ = (
        "blocks", "doomed", "engine", "generations", "group", "keys", "left", "number", "request",
        "slots",
    )  # fmt: skip

    def __init__(
        self, number: int, engine: Engine, ask: Reserve, keys: PackedKeys, blocks: np.ndarray
    ) -> None:
        self.number = number
        self.engine = engine
        self.request = ask.request
        self.group = ask.group
        self.keys: Any = keys
        self.blocks = blocks
        self.slots = np.zeros(0, np.int32)
        self.generations = np.zeros(0, np.uint64)
        self.left = 0
        self.doomed = False  # what it holds must not be published


class Engine:
    """What a node knows of one engine."""

    def __init__(self, number: int, label: str, pid: int) -> None:
        self.number = number
        self.token = secrets.token_hex(16)
        self.label = label
        self.pid = pid
        self.attached = True  # its scheduler's half has a connection
        self.writers: set[object] = set()  # its workers that may write
        self.chains: dict[str, dict[int, PackedKeys]] = {}
        self.n_keys = 0
        self.tenant: dict[str, bytes] = {}
        self.batches: dict[int, Batch] = {}
        self.last: Batch | None = None  # published last

    def name(self, request: str) -> str:
        """A request as the cache knows it."""
        return f"{self.number}/{request}"

    def take(self, request: str, group: int, more: More) -> Any:
        """The request's keys in a group, `PackedKeys`, by what the engine says is new of them.

        Raises:
            ValueError: they are no keys, too many, or go on from what was never sent.
        """
        of = self.chains.get(request)
        if of is None:
            if len(self.chains) >= MOST_REQUESTS:
                raise ValueError(f"more than {MOST_REQUESTS:,} requests")
            of = self.chains[request] = {}
        had = of.get(group)
        n_had = len(had) if had is not None else 0
        if len(more.more) % KEY_BYTES or more.known > n_had:
            raise ValueError(f"keys of {len(more.more)} bytes after {more.known} of {n_had}")
        if had is not None and more.known == n_had and not more.more:
            return had
        before = had.upto(more.known) if had is not None and more.known else b""
        keys = PackedKeys(before + more.more) if before else PackedKeys(more.more)
        self.n_keys += len(keys) - n_had
        if self.n_keys > MOST_KEYS:
            self.n_keys -= len(keys) - n_had
            raise ValueError(f"more than {MOST_KEYS:,} keys at once")
        of[group] = keys
        return keys

    def forget(self, request: str) -> PackedKeys | None:
        """The request is over; the keys of its first group."""
        of = self.chains.pop(request, {})
        self.n_keys -= sum(len(keys) for keys in of.values())
        return of.get(0)
