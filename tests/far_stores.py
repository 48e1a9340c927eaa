"""A far store in memory that does what it is told: fail, wait, be full."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from kvmem.store.far.base import Bytes

__all__ = ["MemoryStore"]


class MemoryStore:
    """See `kvmem.store.far.FarStore`.

    `error` is raised by every call while it is set; `gate`, where it is cleared, holds them up;
    `full` refuses what is put. `calls` are what was asked, in order.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.error: OSError | None = None
        self.full = False
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[str, int]] = []
        self.closed = False

    def _call(self, what: str, n: int) -> None:
        self.calls.append((what, n))
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error

    def sized(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        self._call("exists", len(names))
        return [name in self.values for name in names]

    def get(self, names: Sequence[bytes], rooms: Sequence[Bytes]) -> list[int]:
        self._call("get", len(names))
        sizes = []
        for name, room in zip(names, rooms, strict=True):
            value = self.values.get(name)
            kept = np.frombuffer(value or b"", np.uint8)[: len(room)]
            room[: len(kept)] = kept
            sizes.append(-1 if value is None else len(value))
        return sizes

    def put(self, names: Sequence[bytes], values: Sequence[Sequence[Bytes | bytes]]) -> list[bool]:
        self._call("put", len(names))
        if self.full:
            return [False] * len(names)
        self.values.update(
            (name, b"".join(bytes(part) for part in value))
            for name, value in zip(names, values, strict=True)
        )
        return [True] * len(names)

    def mark(self, name: bytes, new: bytes, *, replace: bool) -> bytes:
        self._call("mark", 1)
        if replace or name not in self.values:
            self.values[name] = new
        return self.values[name]

    def drop(self, names: Sequence[bytes]) -> None:
        self._call("drop", len(names))
        for name in names:
            self.values.pop(name, None)

    def close(self) -> None:
        self.closed = True
        self.gate.set()
