"""Proof that blocks come back as they were, through the live engine's own layout, before any hit.

Some device blocks of each KV-cache group are filled with a pattern, moved out by the very copier
that loads and stores use, wiped, and moved into other blocks. What is filled and what is compared
is looked up in the engine's tensors as the engine indexes them, never by the copier's own
addresses: a copier that mistakes keys for values, one layer for the next, or a block for its
neighbour, moves bytes whose checksums all hold. Blocks beside them must be untouched. What was
there is put back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from kvmem.engines.copiers import Copier

__all__ = ["N_SLOTS", "prove"]

N_SLOTS = 2
LEAST_BLOCKS = 4  # of the device: the engine's null block, one out, one in, one beside them


def prove(
    groups: Sequence[Sequence[torch.Tensor]],
    n_device_blocks: int,
    copier: Copier,
) -> str:
    """Empty, or what went wrong.

    Args:
        groups: of each KV-cache group, the engine's tensors in the copier's order; the first
            dimension of each is blocks, or a whole number of kernel blocks for each.
        n_device_blocks: of each group.
        copier: over `N_SLOTS` empty slots of its own, with these tensors registered.
    """
    import torch

    if n_device_blocks < LEAST_BLOCKS:
        return f"{n_device_blocks} device blocks are too few to try it on"
    n = min(N_SLOTS, (n_device_blocks - 2) // 2)
    sources = list(range(1, 1 + n))
    targets = list(range(2 * n, n, -1))  # in the other order
    beside = [block for block in (0, 2 * n + 1) if block < n_device_blocks]
    blocks = sources + targets + beside
    with torch.inference_mode():  # the tensors are the engine's
        for group, tensors in enumerate(groups):
            views = [_View(tensor, n_device_blocks) for tensor in tensors]
            before = [[view.read(block) for block in blocks] for view in views]
            try:
                error = _group(group, views, copier, sources, targets, beside)
            finally:
                for view, kept in zip(views, before, strict=True):
                    for block, data in zip(blocks, kept, strict=True):
                        view.write(block, data)
            if error:
                return f"KV-cache group {group}: {error}"
    return ""


class _View:
    """A tensor's blocks as the engine indexes them, as bytes."""

    def __init__(self, tensor: torch.Tensor, n_device_blocks: int) -> None:
        self._tensor = tensor
        self._each = tensor.shape[0] // n_device_blocks

    def _rows(self, block: int) -> torch.Tensor:
        return self._tensor[block * self._each : (block + 1) * self._each]

    def read(self, block: int) -> torch.Tensor:
        """A copy of the block's bytes, in the host's memory."""
        import torch

        rows = self._rows(block).clone(memory_format=torch.contiguous_format)
        return rows.view(torch.uint8).cpu()

    def write(self, block: int, data: torch.Tensor) -> None:
        rows = self._rows(block)
        rows.copy_(data.view(rows.dtype).view(rows.shape))

    def pattern(self, block: int, seed: str) -> torch.Tensor:
        """Bytes that no other block, layer or use has."""
        import torch

        shape = self.read(block).shape
        digest = hashlib.sha256(f"{seed} {block}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        return torch.from_numpy(draw.integers(0, 256, tuple(shape), np.uint8))


def _group(
    group: int,
    views: Sequence[_View],
    copier: Copier,
    sources: list[int],
    targets: list[int],
    beside: list[int],
) -> str:
    slots = np.arange(len(sources), dtype=np.int32)
    generations = np.full(len(sources), group + 1, np.uint64)
    keys = b"".join(hashlib.sha256(f"{group} {block}".encode()).digest() for block in sources)
    every = sources + targets + beside
    # What each block must hold in the end; of the targets, what the sources hold before.
    after = [{block: view.pattern(block, f"{i} wiped") for block in every}
             for i, view in enumerate(views)]  # fmt: skip
    for i, (view, wanted) in enumerate(zip(views, after, strict=True)):
        for source, target in zip(sources, targets, strict=True):
            wanted[target] = view.pattern(source, f"{i} stored")
            view.write(source, wanted[target])
    status, _ = copier.store(np.array(sources, np.int32), slots, generations, keys, group)
    if status.any():
        return f"a block was not stored: status {int(status.max())}"
    for i, (view, wanted) in enumerate(zip(views, after, strict=True)):
        for block in every:
            wiped = block in targets
            view.write(block, view.pattern(block, f"{i} before") if wiped else wanted[block])
    checked = np.ones(len(sources), np.uint8)
    status = copier.load(np.array(targets, np.int32), slots, generations, keys, checked, group)
    if status.any():
        return f"a block was not loaded: status {int(status.max())}"
    for i, (view, wanted) in enumerate(zip(views, after, strict=True)):
        for block in every:
            if not bool((view.read(block) == wanted[block]).all()):
                what = "came back as another" if block in targets else "was written over"
                return f"block {block} of tensor {i} {what}"
    return ""
