"""The arena file's bytes: header page, slot descriptors, stats, switch, data.

docs/formats.md is the grammar, `csrc/copy/slot_table.h` the native side; tests hold the three
together.
"""

from __future__ import annotations

import struct

import msgspec
import xxhash

from kvmem.errors import ArenaError

__all__ = [
    "DESCRIPTOR_BYTES",
    "HEADER_BYTES",
    "STATS_BYTES",
    "SWITCH_BYTES",
    "VERSION",
    "Header",
    "Stats",
    "Switch",
    "slots_within",
]

MAGIC = b"KVMEMARN"
VERSION = 2
BYTE_ORDER = 0x01020304
HEADER_BYTES = 4096
DESCRIPTOR_BYTES = 128
STATS_BYTES = 65536
SWITCH_BYTES = 4096
DATA_ALIGN = 2 << 20
SLOT_ALIGN = 64
_SEQUENCE = (1 << 24) - 1

_FIELDS = struct.Struct("<8sII8Q2I2Q32s32s128s")
_NEXT_STEP = "Remove the file if no kvmem of another version uses it, or choose another `arena`."


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


def slots_within(budget_bytes: int, slot_bytes: int, *, ranks: int = 1) -> int:
    """How many slots an arena of at most `budget_bytes` holds, all its parts counted (I7)."""
    each = ranks * (_up(slot_bytes, SLOT_ALIGN) + DESCRIPTOR_BYTES)
    # With both roundings at their worst.
    fixed = HEADER_BYTES + STATS_BYTES + SWITCH_BYTES + 4096 + DATA_ALIGN
    return max(0, (budget_bytes - fixed) // each)


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first page: geometry, namespace and owner. Immutable once the file has a name.

    A slot is `ranks` shares of `slot_bytes` side by side, each with a descriptor.
    """

    n_slots: int
    slot_bytes: int
    namespace: bytes
    ranks: int
    uid: int
    owner_pid: int
    owner_start: int
    creator: str = ""
    label: str = ""

    @property
    def slot_stride(self) -> int:
        """Bytes from a share to the next."""
        return _up(self.slot_bytes, SLOT_ALIGN)

    @property
    def stats_offset(self) -> int:
        """Where the stats region begins; the descriptors end at or before it."""
        return _up(HEADER_BYTES + self.n_slots * self.ranks * DESCRIPTOR_BYTES, 4096)

    @property
    def switch_offset(self) -> int:
        """Where the switch's page begins: after the stats, with no gap."""
        return self.stats_offset + STATS_BYTES

    @property
    def data_offset(self) -> int:
        """Where slot 0 begins."""
        return _up(self.switch_offset + SWITCH_BYTES, DATA_ALIGN)

    @property
    def total_bytes(self) -> int:
        """The file's size."""
        return self.data_offset + self.n_slots * self.ranks * self.slot_stride

    def encode(self) -> bytes:
        """The page's 4,096 bytes."""
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            BYTE_ORDER,
            self.total_bytes,
            self.n_slots,
            self.slot_bytes,
            self.slot_stride,
            HEADER_BYTES,
            self.stats_offset,
            STATS_BYTES,
            self.data_offset,
            self.ranks,
            self.uid,
            self.owner_pid,
            self.owner_start,
            self.namespace,
            _text(self.creator, 32),
            _text(self.label, 128),
        )
        page = fields.ljust(HEADER_BYTES - 8, b"\0")
        return page + struct.pack("<Q", xxhash.xxh3_64_intdigest(page))

    @classmethod
    def decode(cls, page: bytes, *, file_bytes: int) -> Header:
        """The header of a file of `file_bytes`, everything in it checked.

        Raises:
            ArenaError: it is no arena, of another version or byte order, damaged, or of another
                size than its own geometry says.
        """
        if len(page) < HEADER_BYTES or page[:8] != MAGIC:
            raise ArenaError("The file is no kvmem arena", next_step=_NEXT_STEP)
        version, order = struct.unpack_from("<II", page, 8)
        if order != BYTE_ORDER:
            raise ArenaError("The arena has the other byte order", next_step=_NEXT_STEP)
        if version != VERSION:
            raise ArenaError(
                f"The arena has version {version}, this kvmem reads version {VERSION}",
                next_step="Give both halves of the engine the same kvmem, then start again.",
                version=version,
            )
        (checksum,) = struct.unpack_from("<Q", page, HEADER_BYTES - 8)
        if checksum != xxhash.xxh3_64_intdigest(page[: HEADER_BYTES - 8]):
            raise ArenaError("The arena's header is damaged", next_step=_NEXT_STEP)
        fields = _FIELDS.unpack_from(page)
        header = cls(
            n_slots=fields[4],
            slot_bytes=fields[5],
            ranks=fields[11],
            uid=fields[12],
            owner_pid=fields[13],
            owner_start=fields[14],
            namespace=fields[15],
            creator=fields[16].rstrip(b"\0").decode("utf-8", "replace"),
            label=fields[17].rstrip(b"\0").decode("utf-8", "replace"),
        )
        derived = (
            header.total_bytes,
            header.n_slots,
            header.slot_bytes,
            header.slot_stride,
            HEADER_BYTES,
            header.stats_offset,
            STATS_BYTES,
            header.data_offset,
        )
        if fields[3:11] != derived or header.total_bytes != file_bytes:
            raise ArenaError(
                f"The arena's geometry does not fit its {file_bytes:,} bytes",
                next_step=_NEXT_STEP,
                file_bytes=file_bytes,
            )
        return header


def _text(value: str, room: int) -> bytes:
    """UTF-8 that fits, cut between characters."""
    return value.encode()[: room - 1].decode("utf-8", "ignore").encode()


class Stats:
    """The stats region: two buffers, each with its own sequence number and checksum.

    The writer fills the buffer that is not the newest; a reader takes the newest whose checksum
    holds. So a reader never takes a torn value, and finds an old one whole while a new one is
    being written.
    """

    BUFFER_BYTES = STATS_BYTES // 2
    _HEAD = struct.Struct("<QQQ")  # checksum of the rest, sequence, length
    ROOM = BUFFER_BYTES - _HEAD.size

    @classmethod
    def pack(cls, sequence: int, payload: bytes) -> tuple[int, bytes]:
        """Where in the region value number `sequence` (from 1) goes, and its bytes."""
        rest = struct.pack("<QQ", sequence, len(payload)) + payload
        checksum = struct.pack("<Q", xxhash.xxh3_64_intdigest(rest))
        return (sequence % 2) * cls.BUFFER_BYTES, checksum + rest

    @classmethod
    def unpack(cls, region: bytes) -> tuple[int, bytes] | None:
        """The newest whole value and its number; None when there is none in these bytes."""
        best: tuple[int, bytes] | None = None
        for at in (0, cls.BUFFER_BYTES):
            checksum, sequence, length = cls._HEAD.unpack_from(region, at)
            if sequence == 0 or length > cls.ROOM or (best and best[0] > sequence):
                continue
            end = at + cls._HEAD.size + length
            if checksum == xxhash.xxh3_64_intdigest(region[at + 8 : end]):
                best = (sequence, region[at + cls._HEAD.size : end])
        return best


class Switch(msgspec.Struct, frozen=True):
    """Whether an engine may answer prompts from kvmem, and store what it computes.

    Its record is one word of 64 bits, which a processor loads or stores at once: flags, a count of
    the changes, and a checksum of both, so that damage shows and zeros are no record.
    """

    loads: bool = True
    stores: bool = True

    def encode(self, sequence: int) -> int:
        """The record's word; `sequence` counts the changes, modulo 2^24."""
        low = self.loads | self.stores << 1 | (sequence & _SEQUENCE) << 8
        return low | _switch_checksum(low) << 32

    @classmethod
    def decode(cls, word: int) -> tuple[int, Switch] | None:
        """The sequence and the state in a record's word; None when it is torn or damaged."""
        low = word & 0xFFFFFFFF
        if word >> 32 != _switch_checksum(low) or (low & 0xFF) > 3:
            return None
        return low >> 8, cls(loads=bool(low & 1), stores=bool(low & 2))


def _switch_checksum(low: int) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<I", low)) & 0xFFFFFFFF
