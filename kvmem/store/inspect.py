"""Looks at one slot of a running engine's arena, from another process: what it holds, and whether
its bytes are those that were stored.

Only what is looked at is read, no arena is mapped, and the engine does not notice.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Literal

import msgspec
import xxhash

from kvmem.store.arena import open_file
from kvmem.store.layout import DESCRIPTOR_BYTES, HEADER_BYTES, Header

__all__ = ["Inspected", "inspect"]

COMPLETE = 2
PIECE_BYTES = 1 << 20
_DESCRIPTOR = struct.Struct("<QIIQQ32s32s")  # docs/formats.md


class Inspected(msgspec.Struct, frozen=True):
    """What a slot says of itself and what is in it.

    `found`: "gone" where it holds another generation, or none; "identity" where it names another
    block, or what no block can be; "bytes" where a share has another checksum than the one it was
    stored with; "sound" where nothing is wrong any more. `bad_ranks` are whose shares.
    """

    found: Literal["gone", "identity", "bytes", "sound"]
    group: int | None = None
    length: int = 0
    bad_ranks: tuple[int, ...] = ()


def inspect(path: Path, slot: int, generation: int, key: bytes) -> Inspected:
    """Looks at a slot that should hold the block `key` under this generation.

    Raises:
        ArenaError: the file is no arena of this user, or its owner is gone.
        FileNotFoundError: there is no such arena.
        ValueError: it has no such slot.
    """
    fd, header = open_file(path)
    try:
        if not 0 <= slot < header.n_slots:
            raise ValueError(f"{path} has {header.n_slots:,} slots and no slot {slot}")
        return _look(fd, header, slot, generation, key)
    finally:
        os.close(fd)


def _look(fd: int, header: Header, slot: int, generation: int, key: bytes) -> Inspected:
    wanted = generation * 4 + COMPLETE
    groups, lengths, others, bad = [], [], [], []
    for rank in range(header.ranks):
        stamp, group, _, length, checksum, found, namespace = _descriptor(fd, header, slot, rank)
        if stamp != wanted:
            return Inspected("gone")
        groups.append(group)
        lengths.append(length)
        fits = 0 < length <= header.slot_bytes
        if found != key or namespace != header.namespace or not fits:
            others.append(rank)
        elif _digest(fd, header, slot, rank, length) != checksum:
            bad.append(rank)
    # As every reader does: what was read counts only if the slot has not moved on meanwhile.
    stamps = {_descriptor(fd, header, slot, rank)[0] for rank in range(header.ranks)}
    if stamps != {wanted}:
        return Inspected("gone")
    if others:
        return Inspected("identity", groups[0], lengths[0], tuple(others))
    return Inspected("bytes" if bad else "sound", groups[0], lengths[0], tuple(bad))


def _descriptor(fd: int, header: Header, slot: int, rank: int) -> tuple[int, ...]:
    at = HEADER_BYTES + DESCRIPTOR_BYTES * (slot * header.ranks + rank)
    return _DESCRIPTOR.unpack(os.pread(fd, _DESCRIPTOR.size, at))


def _digest(fd: int, header: Header, slot: int, rank: int, length: int) -> int:
    at = header.data_offset + header.slot_stride * (slot * header.ranks + rank)
    digest = xxhash.xxh3_64()
    for begin in range(0, length, PIECE_BYTES):
        digest.update(os.pread(fd, min(PIECE_BYTES, length - begin), at + begin))
    return digest.intdigest()
