"""Blocks that left: when, from which tier, by which order, and to make room for whom.

The tiers say what became of a block, as long as they remember; this says more about it, and longer,
as long as there is room (I7). Keys are told apart by 64 of their bits: a wrong one is a wrong word
in an explanation, never a wrong block (I1).
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
    """The last departures by key.

    Thread safety: one thread adds and finds; `sort_in`, the costly half, may run in another beside
    it, since each of its steps is one operation of a dict or a deque.
    """

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._most = most
        self._by_key: dict[int, Departure] = {}
        self._order: deque[int] = deque()
        self._new: deque[tuple[bytes, Departure]] = deque(maxlen=MOST_NEW)

    def __len__(self) -> int:
        self.sort_in()
        return len(self._by_key)

    @property
    def is_empty(self) -> bool:
        """Whether nothing ever left."""
        return not self._by_key and not self._new

    def add(self, keys: bytes, departure: Departure) -> None:
        """Blocks left; 32 bytes a key."""
        self._new.append((keys, departure))

    def sort_in(self) -> None:
        """Makes what was added be found quickly."""
        while self._new:
            try:
                keys, departure = self._new.popleft()
            except IndexError:  # the other thread has it
                break
            for at in range(0, len(keys), KEY):
                mark = int.from_bytes(keys[at : at + 8], "little")
                if mark not in self._by_key:
                    self._order.append(mark)
                self._by_key[mark] = departure
        while len(self._by_key) > self._most:
            try:
                self._by_key.pop(self._order.popleft(), None)
            except IndexError:
                break

    def find(self, key: bytes) -> Departure | None:
        """How the block with this key left last, if that is remembered."""
        if self._new:
            self.sort_in()
        return self._by_key.get(int.from_bytes(key[:8], "little"))
