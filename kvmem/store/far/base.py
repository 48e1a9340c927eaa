"""What a far tier asks of a store: named values, in batches, each call over by its timeout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Bytes", "FarStore", "Unsupported"]

Bytes = npt.NDArray[np.uint8]


class Unsupported(OSError):
    """The store can't do this at all: trying again is of no use."""


class FarStore(Protocol):
    """A shared store of named values. All methods may be called from any thread.

    Each raises OSError where the store fails or does not answer in its time; one that raised may be
    asked again. A value is opaque: who wrote it, and whether it is whole, the caller finds out.
    """

    def sized(self, most_bytes: int) -> None:
        """Told once, before anything is asked: no value is longer."""

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        """Whether there is a value of each name. One that is no value of ours may count as none."""

    def get(self, names: Sequence[bytes], rooms: Sequence[Bytes]) -> list[int]:
        """The values, each into its room: how long it is, -1 for one that is not there.

        Of one that is longer than its room no more than the room is filled, and the answer may be
        any length beyond it, so that no stranger's value takes memory without bound (I7).
        """

    def put(self, names: Sequence[bytes], values: Sequence[Sequence[Bytes | bytes]]) -> list[bool]:
        """Stores each value, given in parts, whole or not at all; False for those that there is no
        room for."""

    def mark(self, name: bytes, new: bytes, *, replace: bool) -> bytes:
        """The small value of that name; `new` where there is none yet, or with `replace` always.

        Raises:
            Unsupported: the store can't replace a value.
        """

    def drop(self, names: Sequence[bytes]) -> None:
        """These values are not needed any more; where the store can't remove, nothing happens."""

    def close(self) -> None:
        """Ends all connections; calls under way raise OSError."""
