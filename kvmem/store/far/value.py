"""A block as a far store holds it: a head that says what it is, then the bytes of all ranks.

docs/formats.md is the grammar ("A far value"); a test holds the two together. A far store is
shared and nobody's own: all that comes back is checked against what was asked for (I1, I5, I11).
"""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvmem.types import Move

__all__ = ["Head", "head_bytes", "name_of", "prefix_of", "read_head"]

MAGIC = b"KVMEMFAR"
VERSION = 1
APPROXIMATE = 1
_FIXED = struct.Struct("<8sII32s32s32sIIQ")
_SUM = struct.Struct("<Q")


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a value says of itself: below which block it hangs (zeros: none), `share_bytes` of each
    rank, and the XXH3-64 of each share."""

    namespace: bytes
    key: bytes
    parent: bytes
    group: int
    share_bytes: int
    sums: tuple[int, ...]
    approximate: bool = False

    def encode(self) -> bytes:
        """`head_bytes(ranks)` bytes."""
        flags = APPROXIMATE if self.approximate else 0
        text = _FIXED.pack(
            MAGIC, VERSION, flags, self.namespace, self.key, self.parent, self.group,
            len(self.sums), self.share_bytes,
        )  # fmt: skip
        text += struct.pack(f"<{len(self.sums)}Q", *self.sums)
        return text + _SUM.pack(xxhash.xxh3_64_intdigest(text))


def head_bytes(ranks: int) -> int:
    """Bytes before the shares."""
    return _FIXED.size + 8 * ranks + _SUM.size


def name_of(namespace: bytes, mark: bytes, group: int, key: bytes) -> bytes:
    """Under which name a block is found; `mark` changes when all of a namespace is forgotten."""
    return b"%b%d:%b" % (prefix_of(namespace, mark), group, key.hex().encode())


def prefix_of(namespace: bytes, mark: bytes) -> bytes:
    """What the names of all of them begin with."""
    return b"kvmem:1:%b:%b:" % (namespace.hex().encode(), mark.hex().encode())


def read_head(
    value: npt.NDArray[np.uint8], move: Move, *, namespace: bytes, ranks: int, most: int
) -> Head | str:
    """The head of the block that was asked for, or why the value is not it.

    Args:
        value: all bytes of it.
        move: which block was asked for: full key, its parent's, group (I1, I2).
        namespace: the only one whose blocks are valid.
        ranks: how many shares.
        most: bytes of a share at most.
    """
    n_head = head_bytes(ranks)
    if len(value) < n_head:
        return "short"
    text = value[:n_head].tobytes()
    magic, version, flags, its_namespace, key, parent, group, its_ranks, share_bytes = (
        _FIXED.unpack_from(text)
    )
    if magic != MAGIC or version != VERSION or flags & ~APPROXIMATE:
        return "format"
    if its_namespace != namespace or its_ranks != ranks:
        return "namespace"
    if key != move.key or parent != move.parent or group != move.group:
        return "identity"
    if xxhash.xxh3_64_intdigest(text[:-8]) != _SUM.unpack_from(text, n_head - 8)[0]:
        return "header"
    if not 0 < share_bytes <= most or len(value) != n_head + ranks * share_bytes:
        return "length"
    return Head(
        namespace=namespace,
        key=key,
        parent=parent,
        group=group,
        share_bytes=share_bytes,
        sums=struct.unpack_from(f"<{ranks}Q", text, _FIXED.size),
        approximate=bool(flags & APPROXIMATE),
    )
