"""A ledger's file: magic, checksum, and one msgpack map (docs/formats.md)."""

from __future__ import annotations

import os
import tempfile
from array import array
from pathlib import Path

import msgspec

from kvmem.context.spans import HEAD, ID, Link, Span, link
from kvmem.errors import ConfigError
from kvmem.hashing import xxh3_64

__all__ = ["HEADER_BYTES", "MAGIC", "Saved", "read", "read_checked", "write", "write_checked"]

MAGIC = b"KVMEMLG1"  # the last is the version
HEADER_BYTES = len(MAGIC) + 8  # and XXH3-64 of what follows, little-endian


class Saved(msgspec.Struct, frozen=True):
    """What is in the file. `tools` is canonical JSON, `ids` uint32, little-endian."""

    renderer: str
    system: str | None
    tools: bytes
    session_id: str
    cache_salt: str
    epoch: int
    supersedes: str
    spans: list[Span]
    ids: bytes


def write(path: Path, saved: Saved) -> None:
    """Private, and in one step: the file is the old one or the new one."""
    write_checked(path, MAGIC, msgspec.msgpack.encode(saved))


def write_checked(path: Path, magic: bytes, payload: bytes) -> None:
    """Magic, checksum and payload, mode 0600: the file is the old one or the new one."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(magic + xxh3_64(payload).to_bytes(8, "little") + payload)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path, renderer: str | None) -> tuple[Saved, Link]:
    """What `write` wrote, every digest looked at, and its last span; None takes any renderer's.

    Raises:
        ConfigError: it is no ledger, of another version or for another renderer, or damaged.
    """
    payload = read_checked(path, MAGIC, "ledger")
    try:
        saved = msgspec.msgpack.decode(payload, type=Saved)
    except msgspec.DecodeError as error:
        raise _unreadable(path, f"is no ledger: {error}") from error
    if renderer is not None and saved.renderer != renderer:
        raise _unreadable(path, "was made with another tokenizer or chat template")
    if len(saved.ids) % 4 or not saved.spans or saved.spans[0].role != HEAD:
        raise _unreadable(path, "is damaged: its spans and ids do not fit")
    ids = array(ID)
    ids.frombytes(saved.ids)
    last: Link | None = None
    for span in saved.spans:
        last = link(
            last, ids[span.start : span.stop], role=span.role, source=span.source,
            message=span.message, lead=span.lead, sampled=span.sampled, pinned=span.pinned,
        )  # fmt: skip
        if last.span != span:
            raise _unreadable(path, f"is damaged: tokens {span.start} to {span.stop}")
    if last is None or last.span.stop != len(ids):
        raise _unreadable(path, "is damaged: ids without a span")
    return saved, last


def read_checked(path: Path, magic: bytes, what: str) -> bytes:
    """The payload that `write_checked` wrote.

    Raises:
        ConfigError: the magic is another one, or the checksum differs.
    """
    data = path.read_bytes()
    if data[: len(magic)] != magic:
        raise _unreadable(path, f"is no {what} of this version")
    checksum, payload = data[len(magic) : HEADER_BYTES], data[HEADER_BYTES:]
    if xxh3_64(payload).to_bytes(8, "little") != checksum:
        raise _unreadable(path, "is damaged: its checksum differs")
    return payload


def _unreadable(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} {why}",
        next_step="Open it with the renderer that it was made with, or begin a new ledger.",
        path=path,
    )
