"""The copier for where an engine keeps its KV: the CPU's, or a GPU's.

Both move blocks between device memory and one rank's shares of an arena's slots, with the same
statuses (`kvmem._core.SlotCopier`). A GPU's is `kvmem._cuda`, which is there only where kvmem was
built with nvcc; it comes after whatever is on the calling thread's current stream.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from kvmem._core import SlotCopier
from kvmem.errors import EngineError, UnsupportedEngine

if TYPE_CHECKING:
    import torch

__all__ = ["Copier", "Regions", "copier_for"]

Ids = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.uint8]


class Regions:
    """Where a KV-cache group's blocks lie: of each layer the address of block 0, bytes from block
    to block, and bytes of a block. The memory stays the engine's."""

    __slots__ = ("bases", "pieces", "strides")

    def __init__(self) -> None:
        self.bases: list[int] = []
        self.strides: list[int] = []
        self.pieces: list[int] = []

    def add(self, base: int, stride: int, piece: int) -> None:
        """One more layer, or state of a layer."""
        self.bases.append(base)
        self.strides.append(stride)
        self.pieces.append(piece)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all layers."""
        return sum(self.pieces)

    def arrays(self) -> tuple[Words, Words, Words]:
        """As `register_layers` takes them."""
        bases, strides, pieces = (
            np.asarray(values, np.uint64) for values in (self.bases, self.strides, self.pieces)
        )
        return bases, strides, pieces


class Copier(Protocol):
    """What both copiers do; see `kvmem._core.SlotCopier`."""

    def store(
        self, block_ids: Ids, slots: Ids, generations: Words, keys: bytes, group: int = 0
    ) -> tuple[Flags, Words]:
        """Device to arena: statuses and checksums."""
        ...

    def load(
        self,
        block_ids: Ids,
        slots: Ids,
        generations: Words,
        keys: bytes,
        verify: Flags,
        group: int = 0,
    ) -> Flags:
        """Arena to device: statuses."""
        ...


class _OnGpu:
    """A `kvmem._cuda.GpuCopier` that follows torch's current stream."""

    def __init__(self, copier: Any, device: torch.device) -> None:
        self._copier = copier
        self._device = device

    def _after(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _told(self, status: Flags) -> None:
        if (status == DEVICE_FAILED).any():
            raise EngineError(
                f"The copy to or from {self._device} failed: {self._copier.error}",
                next_step="Start the engine again; nothing that was stored before is lost.",
            )

    def store(
        self, block_ids: Ids, slots: Ids, generations: Words, keys: bytes, group: int = 0
    ) -> tuple[Flags, Words]:
        status, sums = self._copier.store(block_ids, slots, generations, keys, group, self._after())
        self._told(status)
        return status, sums

    def load(
        self,
        block_ids: Ids,
        slots: Ids,
        generations: Words,
        keys: bytes,
        verify: Flags,
        group: int = 0,
    ) -> Flags:
        status = self._copier.load(
            block_ids, slots, generations, keys, verify, group, self._after()
        )
        self._told(status)
        return status


DEVICE_FAILED = 5


def copier_for(
    device: torch.device,
    arena: npt.NDArray[np.uint8],
    groups: Sequence[Regions],
    n_blocks: int,
    *,
    threads: int = 1,
    rank: int = 0,
) -> Copier:
    """A copier between the groups' blocks and the arena's slots.

    Args:
        device: where the blocks are.
        arena: the arena's bytes; they are kept alive.
        groups: of each KV-cache group, in the engine's order.
        n_blocks: of each group.
        threads: of the CPU's copier, the caller counted.
        rank: whose shares.

    Raises:
        UnsupportedEngine: there is no copier for that device.
        ValueError: the regions are no memory of the device, or larger than a slot.
        RuntimeError: the GPU refused.
    """
    if device.type == "cpu":
        copier = SlotCopier(arena, threads, rank)
        _register(copier, groups, n_blocks)
        return copier
    if device.type != "cuda":
        raise UnsupportedEngine(
            f"kvmem does not serve KV on {device} yet", next_step="Use a CPU or a CUDA GPU."
        )
    try:
        cuda = importlib.import_module("kvmem._cuda")
    except ImportError as error:
        raise UnsupportedEngine(
            f"kvmem was built without its CUDA half, and the KV is on {device}",
            next_step="Put nvcc on the PATH and install kvmem from its sources again.",
        ) from error
    ordinal = device.index if device.index is not None else 0
    on_gpu = cuda.GpuCopier(arena, ordinal, rank)
    _register(on_gpu, groups, n_blocks)
    return _OnGpu(on_gpu, device)


def _register(copier: Any, groups: Sequence[Regions], n_blocks: int) -> None:
    for group, regions in enumerate(groups):
        copier.register_layers(*regions.arrays(), n_blocks, group)
