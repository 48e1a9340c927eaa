"""docs/formats.md takes a real arena apart; what it says is what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import xxhash

from kvmem._core import DiskCodec, DiskStore, SlotCopier
from kvmem.errors import ArenaError
from kvmem.node import wire
from kvmem.store.arena import Arena
from kvmem.store.far.value import Head, name_of, read_head
from kvmem.store.layout import Header, Stats
from kvmem.store.switch import set_switch
from kvmem.types import Move

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
SPACE = bytes(range(32))
KEYS = b"a" * 32 + b"b" * 32
PIECE = 500
RANK = 1

Fields = dict[str, int | bytes | str]


def section(title: str) -> str:
    return PAGE.split(f"\n### {title}\n")[1].split("\n### ")[0]


def rows(title: str) -> list[tuple[int, int, str, str]]:
    found = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| (\w+) \|", section(title), re.MULTILINE)
    return [(int(at), int(n), kind, name) for at, n, kind, name in found]


def parse(title: str, data: bytes) -> Fields:
    fields: Fields = {}
    for at, n, kind, name in rows(title):
        piece = data[at : at + n]
        if kind == "number":
            fields[name] = int.from_bytes(piece, "little")
        else:
            fields[name] = piece.rstrip(b"\0").decode() if kind == "text" else piece
    return fields


@pytest.fixture
def arena(arena_name: str) -> Iterator[Arena]:
    arena = Arena.create(
        arena_name, n_slots=3, slot_bytes=2 * PIECE, namespace=SPACE, ranks=2, label="SmolLM2"
    )
    yield arena
    arena.close(unlink=True)


@pytest.fixture
def stored(arena: Arena) -> tuple[Arena, bytes]:
    """An arena with blocks 1 and 0 in slots 0 and 2 at generations 7 and 9; block 0's bytes."""
    device = np.random.default_rng(3).integers(0, 256, (2, 2, PIECE), dtype=np.uint8)
    copier = SlotCopier(arena.buffer, threads=1, rank=RANK)
    copier.register_layers(
        np.array([layer.ctypes.data for layer in device], np.uint64),
        np.full(2, PIECE, np.uint64),
        np.full(2, PIECE, np.uint64),
        2,
        group=5,
    )
    ids, slots = np.array([1, 0], np.int32), np.array([0, 2], np.int32)
    status, _ = copier.store(ids, slots, np.array([7, 9], np.uint64), KEYS, group=5)
    assert status.tolist() == [0, 0]
    return arena, device[:, 0].tobytes()


@pytest.mark.parametrize(
    ("title", "size"),
    [
        ("header", 4096),
        ("descriptor", 128),
        ("stats", 24),
        ("switch", 4096),
        ("diskheader", 4096),
        ("record", 128),
        ("slotheader", 128),
        ("farheader", 128),
    ],
)
def test_the_fields_follow_each_other_without_gaps(title: str, size: int) -> None:
    end = 0
    for at, n, _, _ in rows(title):
        assert at == end
        end = at + n
    assert end == size


def test_a_real_header_reads_as_the_page_says(arena: Arena) -> None:
    data = arena.path.read_bytes()
    fields = parse("header", data)
    header = arena.header
    assert fields["magic"] == b"KVMEMARN"
    assert fields["byte_order"] == 0x01020304
    assert fields["total_bytes"] == len(data)
    assert (fields["n_slots"], fields["slot_bytes"], fields["slot_stride"]) == (3, 1000, 1024)
    assert fields["descriptors_offset"] == 4096
    assert fields["stats_offset"] == 8192
    assert fields["stats_bytes"] == 65536
    assert fields["data_offset"] == 2 << 20
    assert (fields["ranks"], fields["namespace"], fields["label"]) == (2, SPACE, "SmolLM2")
    assert (fields["uid"], fields["owner_pid"]) == (header.uid, header.owner_pid)
    assert (fields["owner_start"], fields["creator"]) == (header.owner_start, header.creator)
    assert not any(data[296:4088])
    assert fields["header_checksum"] == xxhash.xxh3_64_intdigest(data[:4088])


def test_a_real_descriptor_reads_as_the_page_says(stored: tuple[Arena, bytes]) -> None:
    arena, block = stored
    data = arena.path.read_bytes()
    header = parse("header", data)
    assert isinstance(header["descriptors_offset"], int)
    fields = parse("descriptor", data[header["descriptors_offset"] + (2 * 2 + RANK) * 128 :][:128])
    assert fields["stamp"] == 9 * 4 + 2
    assert (fields["group"], fields["length"]) == (5, 1000)
    assert (fields["key"], fields["namespace"]) == (KEYS[32:], SPACE)
    assert fields["checksum"] == xxhash.xxh3_64_intdigest(block)
    assert (fields["zero"], fields["reserved"]) == (bytes(4), bytes(32))


def test_the_slot_holds_the_pieces_side_by_side(stored: tuple[Arena, bytes]) -> None:
    arena, block = stored
    header = parse("header", arena.path.read_bytes()[:4096])
    assert isinstance(header["data_offset"], int)
    assert isinstance(header["slot_stride"], int)
    at = header["data_offset"] + (2 * 2 + RANK) * header["slot_stride"]
    assert arena.path.read_bytes()[at : at + len(block)] == block


def test_an_empty_slot_has_stamp_zero(stored: tuple[Arena, bytes]) -> None:
    data = stored[0].path.read_bytes()
    stamps = [parse("descriptor", data[4096 + 128 * i :][:128])["stamp"] for i in range(6)]
    # Slots 0 and 2 of the second of two ranks; rank 0's shares were never written.
    assert [bool(stamp) for stamp in stamps] == [False, True, False, False, False, True]


def test_real_stats_read_as_the_page_says(arena: Arena) -> None:
    for value in (b"one", b"two", b"three"):
        arena.write_stats(value)
    region = arena.path.read_bytes()[8192 : 8192 + 65536]
    for s, value in ((3, b"three"), (2, b"two")):
        buffer = region[(s % 2) * 32768 :][:32768]
        fields = parse("stats", buffer)
        assert (fields["sequence"], fields["length"]) == (s, len(value))
        assert buffer[24 : 24 + len(value)] == value
        assert fields["value_checksum"] == xxhash.xxh3_64_intdigest(buffer[8 : 24 + len(value)])
    assert f"at most {Stats.ROOM:,}" in section("stats")


def test_a_real_switch_reads_as_the_page_says(arena: Arena) -> None:
    states = [(True, True), (False, True), (True, False), (False, False)]
    for n, (loads, stores) in enumerate(states):
        if n:
            set_switch(arena.path, loads=loads, stores=stores)
        page = arena.path.read_bytes()[8192 + 65536 :][:4096]  # directly after the stats
        fields = parse("switch", page)
        assert (fields["flags"], fields["sequence"]) == (loads + 2 * stores, n)
        assert fields["switch_checksum"] == xxhash.xxh3_64_intdigest(page[:4]) & 0xFFFFFFFF
        assert fields["reserved"] == bytes(4088)


def test_the_example_is_what_its_header_encodes_to() -> None:
    page = Header(
        n_slots=2,
        slot_bytes=1000,
        namespace=SPACE,
        ranks=1,
        uid=1000,
        owner_pid=4242,
        owner_start=123456,
        creator="0.1.0",
        label="SmolLM2-135M",
    ).encode()
    lines = [f"{at:06x}  {page[at : at + 16].hex(' ')}" for at in range(0, 4096, 16)]
    written = [line for line in lines if not line.endswith(" ".join(["00"] * 16))]
    assert re.findall(r"^[0-9a-f]{6}  .*$", section("header"), re.MULTILINE) == written


@pytest.mark.parametrize("version", [1, 3])
def test_any_other_version_is_refused_by_both_sides(arena: Arena, version: int) -> None:
    arena.buffer[8:12] = version.to_bytes(4, "little")
    with pytest.raises(ArenaError, match=f"version {version}"):
        Arena.open(arena.path)
    with pytest.raises(ValueError, match=f"version {version}"):
        SlotCopier(arena.buffer, threads=1)


def test_a_real_disk_store_reads_as_the_page_says(
    stored: tuple[Arena, bytes], tmp_path: Path
) -> None:
    """Block 0, of one rank's share of two: the other rank stores the same bytes."""
    arena, block = stored
    device = np.frombuffer(block + block, np.uint8).copy()
    copier = SlotCopier(np.frombuffer(arena.buffer, np.uint8), 1, 0)
    piece = np.array([2 * PIECE], np.uint64)
    copier.register_layers(np.array([device.ctypes.data], np.uint64), piece, piece, 1, 5)
    one, two = np.array([0], np.int32), np.array([2], np.int32)
    status, _ = copier.store(one, two, np.array([9], np.uint64), KEYS[32:], group=5)
    assert status.tolist() == [0]
    store = DiskStore(
        str(tmp_path), np.frombuffer(arena.buffer, np.uint8), 100_000, SPACE, threads=1, codec=False
    )
    for ticket, number in enumerate((1, 3)):  # the first one takes the first unit
        assert store.begin(True, ticket, 2, 9, number, 4, 5, KEYS[32:], KEYS[:32], 6)
        store.wait(10)
        ((_, status_code, _, _, n_bytes, *_),) = store.poll()
        assert status_code == 0
    assert store.drop(1) == 0
    store.close()

    table = (tmp_path / "table.kvd").read_bytes()
    head = parse("diskheader", table)
    assert head["magic"] == b"KVMEMDSK"
    assert (head["version"], head["byte_order"], head["ranks"]) == (2, 0x01020304, 2)
    assert (head["unit_bytes"], head["share_bytes"]) == (4096, 2 * PIECE)
    assert head["namespace"] == SPACE
    n_blocks = (100_000 - 4096) // (4096 + 2 * 128)
    assert (head["n_records"], head["n_units"]) == (2 * n_blocks, n_blocks)
    assert len(table) == 4096 + 128 * int(str(head["n_records"]))
    assert head["header_checksum"] == xxhash.xxh3_64_intdigest(table[:4088])

    raw = table[4096 + 128 * 3 :][:128]
    record = parse("record", raw)
    sums = [xxhash.xxh3_64_intdigest(block)] * 2
    packed = b"".join(s.to_bytes(8, "little") for s in sums)
    assert (record["key"], record["parent"]) == (KEYS[32:], KEYS[:32])
    assert (record["generation"], record["group"], record["depth"]) == (4, 5, 6)
    assert (record["share_length"], record["codec"], record["place"]) == (len(block), 0, 1)
    assert record["stored_length"] == 2 * len(block)
    assert record["payload_checksum"] == xxhash.xxh3_64_intdigest(packed)
    assert record["published_checksum"] == sums[0] ^ sums[1]
    assert record["record_checksum"] == xxhash.xxh3_64_intdigest(raw[:120]) ^ 3
    assert table[4096 : 4096 + 128 * 3] == bytes(128 * 3)

    slot = (tmp_path / "data.kvd").read_bytes()[4096 * 1 :][:4096]
    about = parse("slotheader", slot)
    assert about["magic"] == b"KVMEMBLK"
    assert about["namespace"] == SPACE
    for name in ("generation", "key", "payload_checksum", "share_length", "group", "codec",
                 "stored_length"):  # fmt: skip
        assert about[name] == record[name]
    assert about["slot_checksum"] == xxhash.xxh3_64_intdigest(slot[:120])
    assert about["stored_checksum"] == xxhash.xxh3_64_intdigest(block + block)
    assert slot[128 : 128 + 2 * len(block)] == block + block
    assert not any(slot[128 + 2 * len(block) :])
    assert n_bytes == 4096


def test_int8_blocks_are_as_the_page_says() -> None:
    """In numpy, by the page's words alone: scale, numbers, rounding."""
    draw = np.random.default_rng(3)
    values = (draw.standard_normal(150) * np.repeat([1.0, 300.0, 1e-40], 50)).astype(np.float32)
    stored = np.asarray(DiskCodec().encode(10, values.view(np.uint8)))
    assert len(stored) == 3 * 2 + 150
    scales = (stored[:6].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    numbers = stored[6:].view(np.int8)
    for group, scale in enumerate(scales):
        at = slice(64 * group, 64 * group + 64)
        largest = np.abs(values[at]).max()
        if largest < 2.0**-100:
            assert scale == 0
            assert not numbers[at].any()
            continue
        step = np.float32(largest) / np.float32(127)
        assert step <= scale <= step * np.float32(1 + 2**-7)
        assert (numbers[at] == np.round(values[at] / scale)).all()
    back = np.empty(150, np.float32)
    assert DiskCodec().decode(10, stored, back.view(np.uint8))
    assert (back == numbers * np.repeat(scales, 64)[:150]).all()


def test_the_example_of_a_far_value_is_one() -> None:
    shares = [b"kvme", b"mfar"]
    move = Move(0, 1, b"a" * 32, 0, 0, 0, 0, parent=b"b" * 32)
    head = Head(
        namespace=SPACE, key=move.key, parent=move.parent, group=1, share_bytes=4,
        sums=tuple(xxhash.xxh3_64_intdigest(share) for share in shares),
    )  # fmt: skip
    value = head.encode() + b"".join(shares)
    lines = re.findall(r"^[0-9a-f]{6}  ((?:[0-9a-f]{2} ?)+)$", section("farheader"), re.MULTILINE)
    assert bytes.fromhex("".join(lines)) == value
    fields = parse("farheader", value)
    assert (fields["magic"], fields["version"], fields["flags"]) == (b"KVMEMFAR", 1, 0)
    assert (fields["namespace"], fields["key"], fields["parent"]) == (SPACE, b"a" * 32, b"b" * 32)
    assert (fields["group"], fields["ranks"], fields["share_length"]) == (1, 2, 4)
    data = np.frombuffer(value, np.uint8)
    assert read_head(data, move, namespace=SPACE, ranks=2, most=4) == head
    assert name_of(SPACE, b"\1\2", 1, move.key) == b"kvmem:1:%b:0102:1:%b" % (
        SPACE.hex().encode(), b"61" * 32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("title", "messages"), [("noderequests", wire.Request), ("nodereplies", wire.Reply)]
)
def test_the_nodes_messages_are_those_on_the_page(title: str, messages: Any) -> None:
    told = re.findall(r"^\| (\d+) \| (\w+) \| (.+) \|$", section(title), re.MULTILINE)
    wanted = [
        (str(one.__struct_config__.tag), one.__name__, ", ".join(one.__struct_fields__) or "-")
        for one in get_args(messages)
    ]
    assert told == wanted


def test_a_greeting_is_a_map_of_the_names_on_the_page() -> None:
    text = PAGE.split("## The node's socket")[1]
    for kind in (wire.Hello, wire.Welcome):
        (names,) = re.findall(rf"^{kind.__name__}: ([\w, ]+)\.", text, re.MULTILINE)
        assert tuple(names.split(", ")) == kind.__struct_fields__
    body = wire.frame(wire.Welcome(refused="why"))
    assert int.from_bytes(body[:4], "little") == len(body) - 4
    assert msgspec.msgpack.decode(body[4:])["magic"] == "kvmem-node"
    assert f"Version {wire.VERSION}." in text
