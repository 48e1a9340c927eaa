"""Blocks that left: when, from which tier, by which order, and to make room for whom.

That a block was evicted is the index's word, never this one's: what is remembered here only says
more about it, as long as there is room (I7).
"""

from __future__ import annotations

from collections import deque

import msgspec

__all__ = ["Departure", "Gone"]

MOST_KEYS = 1 << 15  # about 150 bytes each
MOST_NEW = 1 << 11  # evictions that nobody has asked of: 32 bytes a block
KEY = 32


class Departure(msgspec.Struct, frozen=True, gc=False):
    """One time at which room was made; `salt` is of the request that it was made for."""

    at_s: float
    tier: str
    policy: str
    request_id: str
    salt: bytes


class Gone:
    """The last departures by key. They are sorted in when somebody asks."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._most = most
        self._by_key: dict[int, Departure] = {}
        self._order: deque[int] = deque()
        self._new: deque[tuple[bytes, Departure]] = deque(maxlen=MOST_NEW)

    def __len__(self) -> int:
        self._sort_in()
        return len(self._by_key)

    def add(self, keys: bytes, departure: Departure) -> None:
        """Blocks left; 32 bytes a key."""
        self._new.append((keys, departure))

    def _sort_in(self) -> None:
        while self._new:
            keys, departure = self._new.popleft()
            for at in range(0, len(keys), KEY):
                mark = int.from_bytes(keys[at : at + 8], "little")
                if mark not in self._by_key:
                    self._order.append(mark)
                self._by_key[mark] = departure
        while len(self._order) > self._most:
            self._by_key.pop(self._order.popleft(), None)

    def find(self, key: bytes) -> Departure | None:
        """How the block with this key left last, if that is remembered."""
        self._sort_in()
        return self._by_key.get(int.from_bytes(key[:8], "little"))
