"""What lies in a running engine's arena and in stores on the disk, read from beside their owners.

Only descriptors and records are read, no block; nobody is locked out and no owner notices. What is
being written meanwhile may show or not. That the bytes are those stored is `inspect`'s and
`verify`'s to say.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from kvmem.errors import ArenaError, ConfigError
from kvmem.store.arena import list_live, open_file
from kvmem.store.folders import TABLE, Folder, folders
from kvmem.store.inspect import COMPLETE
from kvmem.store.layout import DESCRIPTOR_BYTES, HEADER_BYTES

__all__ = ["ArenaSurvey", "Place", "StoreSurvey", "arenas", "places", "stores"]

LEAST_PREFIX = 4  # hex digits of a key, to look for
MAGIC, VERSION = b"KVMEMDSK", 2
# docs/formats.md
_DESCRIPTOR = np.dtype(
    [("stamp", "<u8"), ("group", "<u4"), ("zero", "<u4"), ("length", "<u8"), ("checksum", "<u8"),
     ("key", "V32"), ("namespace", "V32"), ("reserved", "V32")]
)  # fmt: skip
_HEADER = np.dtype(
    [("magic", "S8"), ("version", "<u4"), ("order", "<u4"), ("n_records", "<u8"),
     ("unit_bytes", "<u8"), ("n_units", "<u8"), ("share_bytes", "<u8"), ("ranks", "<u4"),
     ("zero", "<u4"), ("namespace", "V32")]
)  # fmt: skip
_RECORD = np.dtype(
    [("key", "V32"), ("parent", "V32"), ("generation", "<u8"), ("payload", "<u8"),
     ("published", "<u8"), ("sequence", "<u8"), ("share_length", "<u4"), ("group", "<u4"),
     ("depth", "<u4"), ("codec", "<u4"), ("place", "<u4"), ("stored_length", "<u4"),
     ("checksum", "<u8")]
)  # fmt: skip
assert _DESCRIPTOR.itemsize == _RECORD.itemsize == DESCRIPTOR_BYTES


class ArenaSurvey(msgspec.Struct, frozen=True):
    """A running engine's host tier: slots that hold a whole block, by KV-cache group."""

    arena: str
    model: str
    pid: int
    namespace: str
    slots: int
    blocks: int
    writing: int
    slot_bytes: int
    ranks: int
    groups: dict[int, int]


class StoreSurvey(msgspec.Struct, frozen=True):
    """A store on the disk. `bytes` are what its blocks take, `capacity_bytes` what they may take;
    `deepest` is the longest prompt's number of blocks. `error` says why it can't be read."""

    folder: str
    namespace: str
    in_use: bool
    used_s: float
    blocks: int = 0
    records: int = 0
    bytes: int = 0
    capacity_bytes: int = 0
    deepest: int = 0
    groups: dict[int, int] = {}
    codecs: dict[int, int] = {}
    error: str = ""


class Place(msgspec.Struct, frozen=True):
    """Where a block lies: a slot of an arena, or a record of a store. `where` is its file name or
    folder; `parent` and `depth` are known of records only, `parent` empty for a prompt's first."""

    tier: str
    where: str
    key: str
    namespace: str
    number: int
    generation: int
    group: int
    bytes: int
    parent: str = ""
    depth: int | None = None
    codec: int = 0


def arenas() -> list[ArenaSurvey]:
    """The arenas of this user's running engines, by name."""
    found = []
    for live in list_live():
        try:
            rows = _descriptors(live.path)
        except (ArenaError, FileNotFoundError):
            continue  # it ended since it was listed
        header = live.header
        mine = rows[:, 0]  # all ranks write a block or none
        whole = mine[mine["stamp"] % 4 == COMPLETE]
        found.append(
            ArenaSurvey(
                arena=live.path.name,
                model=header.label,
                pid=header.owner_pid,
                namespace=header.namespace.hex(),
                slots=header.n_slots,
                blocks=len(whole),
                writing=int((mine["stamp"] % 4 == 1).sum()),
                slot_bytes=header.slot_bytes,
                ranks=header.ranks,
                groups=_counts(whole["group"]),
            )
        )
    return found


def stores(path: Path) -> list[StoreSurvey]:
    """The stores at or under a path, least recently used first; none where no path is."""
    path = path.expanduser()
    if (path / TABLE).is_file():
        there = [one for one in folders(path.parent) if one.path == path]
    else:
        there = folders(path)
    return [_survey(one) for one in there]


def places(prefix: str, path: Path) -> list[Place]:
    """Every place of the blocks whose keys begin with `prefix`, in running engines and on the disk.

    Raises:
        ConfigError: the prefix is no hex, or too short.
    """
    digits = prefix.lower()
    if len(digits) < LEAST_PREFIX or set(digits) - set("0123456789abcdef") or len(digits) > 64:
        raise ConfigError(
            f"{prefix!r} is not the beginning of a block's key",
            next_step=f"Give {LEAST_PREFIX} to 64 hex digits, as `kvmem quarantine` shows them.",
        )
    found: list[Place] = []
    for live in list_live():
        try:
            rows = _descriptors(live.path)[:, 0]
        except (ArenaError, FileNotFoundError):
            continue
        complete = np.flatnonzero(rows["stamp"] % 4 == COMPLETE)
        for slot in complete[_begin(rows["key"][complete], digits)].tolist():
            row = rows[slot]
            found.append(
                Place(
                    tier="host", where=live.path.name, key=row["key"].tobytes().hex(),
                    namespace=row["namespace"].tobytes().hex(), number=slot,
                    generation=int(row["stamp"]) // 4, group=int(row["group"]),
                    bytes=int(row["length"]) * live.header.ranks,
                )
            )  # fmt: skip
    for folder in folders(path.expanduser()):
        try:
            header, rows = _records(folder)
        except (OSError, ValueError):
            continue  # `stores` says so
        used = np.flatnonzero(rows["sequence"])
        for record in used[_begin(rows["key"][used], digits)].tolist():
            row = rows[record]
            if _is_whole(row, record):
                found.append(_place(folder, header, row, record))
    return found


def _place(folder: Folder, header: Any, row: Any, record: int) -> Place:
    parent = row["parent"].tobytes()
    return Place(
        tier="disk", where=str(folder.path), key=row["key"].tobytes().hex(),
        namespace=header["namespace"].tobytes().hex(), number=record,
        generation=int(row["generation"]), group=int(row["group"]),
        bytes=int(row["stored_length"]), parent=parent.hex() if any(parent) else "",
        depth=int(row["depth"]), codec=int(row["codec"]),
    )  # fmt: skip


def _descriptors(path: Path) -> Any:
    """The arena's descriptors, [n_slots, ranks], as they are at this moment."""
    fd, header = open_file(path)
    try:
        n_bytes = header.n_slots * header.ranks * DESCRIPTOR_BYTES
        raw = _read(fd, n_bytes, HEADER_BYTES)
    finally:
        os.close(fd)
    return np.frombuffer(raw, _DESCRIPTOR).reshape(header.n_slots, header.ranks)


def _survey(folder: Folder) -> StoreSurvey:
    same = (str(folder.path), folder.namespace, not folder.free, folder.used_s)
    try:
        header, rows = _records(folder)
    except (OSError, ValueError) as error:
        return StoreSurvey(*same, error=str(error))
    used = rows[rows["sequence"] > 0]
    unit = int(header["unit_bytes"])
    units = -(-(used["stored_length"].astype(np.int64) + DESCRIPTOR_BYTES) // unit)
    return StoreSurvey(
        str(folder.path), header["namespace"].tobytes().hex(), not folder.free, folder.used_s,
        blocks=len(used), records=len(rows), bytes=int(units.sum()) * unit,
        capacity_bytes=int(header["n_units"]) * unit,
        deepest=int(used["depth"].max()) + 1 if len(used) else 0,
        groups=_counts(used["group"]), codecs=_counts(used["codec"]),
    )  # fmt: skip


def _records(folder: Folder) -> tuple[Any, Any]:
    """A store's header and its records.

    Raises:
        OSError: it can't be read.
        ValueError: it is no table of this version, or damaged.
    """
    fd = os.open(folder.path / TABLE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        page = os.pread(fd, HEADER_BYTES, 0)
        if len(page) < HEADER_BYTES or page[:8] != MAGIC:
            raise ValueError("it has no table of a store")
        header = np.frombuffer(page[: _HEADER.itemsize], _HEADER)[0]
        if header["version"] != VERSION:
            raise ValueError(f"it is of version {int(header['version'])}")
        if xxhash.xxh3_64_intdigest(page[:4088]) != int.from_bytes(page[4088:], "little"):
            raise ValueError("its header is damaged")
        size = os.fstat(fd).st_size - HEADER_BYTES
        n = min(int(header["n_records"]), size // DESCRIPTOR_BYTES)
        return header, np.frombuffer(_read(fd, n * DESCRIPTOR_BYTES, HEADER_BYTES), _RECORD)
    finally:
        os.close(fd)


def _is_whole(row: Any, record: int) -> bool:
    raw = row.tobytes()
    return bool(xxhash.xxh3_64_intdigest(raw[:120]) ^ record == int(row["checksum"]))


def _begin(keys: Any, digits: str) -> Any:
    """Which of the keys begin with these hex digits."""
    whole = bytes.fromhex(digits[: len(digits) // 2 * 2])
    rows = np.frombuffer(keys.tobytes(), np.uint8).reshape(-1, 32)
    found = (rows[:, : len(whole)] == np.frombuffer(whole, np.uint8)).all(axis=1)
    if len(digits) % 2:
        found &= rows[:, len(whole)] >> 4 == int(digits[-1], 16)
    return found


def _counts(values: Any) -> dict[int, int]:
    which, n = np.unique(values, return_counts=True)
    return dict(zip(which.tolist(), n.tolist(), strict=True))


def _read(fd: int, n_bytes: int, at: int) -> bytes:
    parts = bytearray()
    while len(parts) < n_bytes:
        piece = os.pread(fd, min(1 << 24, n_bytes - len(parts)), at + len(parts))
        if not piece:
            raise ValueError("it is cut short")
        parts += piece
    return bytes(parts)
