"""An arena that nobody else sees, for trying out what will be done to the real one."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem.store.layout import HEADER_BYTES, Header

__all__ = ["Scratch"]


class Scratch:
    """`n_slots` empty slots in private memory, laid out as an arena's; gone with the object.

    Args:
        n_slots: how many.
        slot_bytes: of a share.
        ranks: shares of a slot.
        namespace: 32 bytes.
    """

    def __init__(self, n_slots: int, slot_bytes: int, ranks: int, namespace: bytes) -> None:
        self.header = Header(
            n_slots=n_slots, slot_bytes=slot_bytes, namespace=namespace, ranks=ranks,
            uid=os.getuid(), owner_pid=os.getpid(), owner_start=0,
        )  # fmt: skip
        memory = mmap.mmap(-1, self.header.total_bytes)
        memory[:HEADER_BYTES] = self.header.encode()
        self.buffer: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)

    def share(self, slot: int, rank: int) -> npt.NDArray[np.uint8]:
        """The bytes of a rank's share of a slot."""
        header = self.header
        at = header.data_offset + (slot * header.ranks + rank) * header.slot_stride
        return self.buffer[at : at + header.slot_bytes]

    def copier_of(self, device: npt.NDArray[np.uint8], rank: int) -> Any:
        """A copier between these slots and `device`, uint8 [blocks, slot_bytes]."""
        from kvmem._core import SlotCopier

        copier = SlotCopier(self.buffer, 1, rank)
        width = np.array([device.shape[1]], np.uint64)
        copier.register_layers(np.array([device.ctypes.data], np.uint64), width, width, len(device))
        return copier
