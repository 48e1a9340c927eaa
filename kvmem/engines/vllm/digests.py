"""SHA-256 over files, remembered by path, inode, size, mtime and ctime."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

__all__ = ["FileDigest", "file_digest", "whole_digest"]

READ_BYTES = 8 << 20


class FileDigest(msgspec.Struct, frozen=True):
    """What a file held: 64 hex digits, valid while the other fields are the file's."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    digest: str

    def is_of(self, stat: os.stat_result) -> bool:
        """Whether a file with this `stat` is the one that was read."""
        there = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        return there == (self.inode, self.size, self.mtime_ns, self.ctime_ns)


def file_digest(path: Path, known: Mapping[str, FileDigest]) -> FileDigest:
    """The file's digest: what `known` has under its resolved path if it is still that file.

    Raises:
        OSError: the file can't be read.
    """
    path = path.resolve()
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        had = known.get(str(path))
        if had is not None and had.is_of(stat):
            return had
        digest = hashlib.sha256()
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return FileDigest(
        stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, digest.hexdigest()
    )


def whole_digest(label: bytes, files: Iterable[tuple[str, FileDigest]]) -> bytes:
    """32 bytes over the names and digests of several files, in their order."""
    whole = hashlib.sha256(label + b"\0")
    for name, file in files:
        encoded = name.encode()
        whole.update(len(encoded).to_bytes(4, "big") + encoded)
        whole.update(bytes.fromhex(file.digest))
    return whole.digest()
