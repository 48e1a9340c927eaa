"""What is loaded is what was stored, or the status says why not."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmem import _core
from kvmem.store.layout import DESCRIPTOR_BYTES, HEADER_BYTES, Header

NAMESPACE = bytes(range(32))
PATHS = ["plain", "avx2", "avx512"]
PATHS = PATHS[: PATHS.index(_core.cpu_path()) + 1]
OK, IDENTITY, GENERATION, CHECKSUM, RANGE = range(5)
SIZES = [1, 2, 7, 63, 64, 65, 240, 241, 1023, 1024, 1025, 2048, 4095, 4096, 4097]
SIZES += [12_288, 16_385, 98_304, 262_143, 2 << 20]


class Bench:
    """An arena in plain memory, a device of a few layers, and the copier between them."""

    def __init__(
        self,
        pieces: list[int],
        *,
        n_slots: int = 5,
        n_blocks: int = 6,
        gap: int = 0,
        shift: int = 0,
        path: str = "auto",
        threads: int = 1,
        namespace: bytes = NAMESPACE,
        ranks: int = 1,
    ) -> None:
        self.pieces, self.n_blocks = pieces, n_blocks
        self.header = Header(
            n_slots=n_slots,
            slot_bytes=sum(pieces),
            namespace=namespace,
            ranks=ranks,
            uid=0,
            owner_pid=1,
            owner_start=1,
        )
        self.arena = mmap.mmap(-1, self.header.total_bytes)
        self.arena[:HEADER_BYTES] = self.header.encode()
        self.path, self.threads, self.gap, self.shift = path, threads, gap, shift
        rng = np.random.default_rng(sum(pieces) * 31 + gap + shift)
        self.layers = [self._layer(rng, piece) for piece in pieces]
        self.copier = self.open()

    def _layer(self, rng: Any, piece: int) -> Any:
        """[n_blocks, piece + gap] of noise that begins `shift` bytes after a multiple of 64."""
        n_bytes = self.n_blocks * (piece + self.gap)
        room = np.empty(n_bytes + 128, np.uint8)
        begin = -room.ctypes.data % 64 + self.shift
        layer = room[begin : begin + n_bytes].reshape(self.n_blocks, piece + self.gap)
        layer[:] = rng.integers(0, 256, layer.shape, np.uint8)
        return layer

    def open(self) -> Any:
        copier = _core.SlotCopier(self.arena, self.threads, cpu_path=self.path)
        pieces = np.array(self.pieces, np.uint64)
        copier.register_layers(*self.layout(), pieces, self.n_blocks)
        return copier

    def layout(self) -> tuple[Any, Any]:
        """Base and stride of each layer."""
        bases = np.array([layer.ctypes.data for layer in self.layers], np.uint64)
        return bases, np.array([piece + self.gap for piece in self.pieces], np.uint64)

    def block(self, block_id: int) -> bytes:
        return b"".join(layer[block_id, :piece].tobytes() for layer, piece in self.rows())

    def rows(self) -> list[tuple[Any, int]]:
        return list(zip(self.layers, self.pieces, strict=True))

    def everything(self) -> bytes:
        return b"".join(layer.tobytes() for layer in self.layers)

    def store(self, block_ids: list[int], slots: list[int], generation: int = 1) -> Any:
        return self.copier.store(*request(block_ids, slots, generation))

    def load(
        self,
        block_ids: list[int],
        slots: list[int],
        generation: int = 1,
        *,
        keys: bytes | None = None,
        verify: bool = True,
    ) -> list[int]:
        arguments = request(block_ids, slots, generation)
        flags = np.full(len(slots), verify, np.uint8)
        return self.copier.load(*arguments[:3], keys or arguments[3], flags).tolist()

    def stamp(self, slot: int) -> int:
        at = HEADER_BYTES + slot * DESCRIPTOR_BYTES
        return int.from_bytes(self.arena[at : at + 8], "little")

    def slot_at(self, slot: int) -> int:
        return self.header.data_offset + slot * self.header.slot_stride


def key_of(slot: int) -> bytes:
    return bytes([slot % 251]) * 32


def request(block_ids: list[int], slots: list[int], generation: int) -> tuple[Any, Any, Any, bytes]:
    return (
        np.array(block_ids, np.int32),
        np.array(slots, np.int32),
        np.full(len(slots), generation, np.uint64),
        b"".join(key_of(slot) for slot in slots),
    )


def assert_round_trip(bench: Bench) -> None:
    """Blocks 0-2 go to slots 4, 0 and 2 and come back as blocks 3-5, and nothing else changes."""
    kept = [bench.block(i) for i in range(3)]
    gaps = [
        layer[:, piece:].copy() for layer, piece in zip(bench.layers, bench.pieces, strict=True)
    ]
    status, checksums = bench.store([0, 1, 2], [4, 0, 2])
    assert status.tolist() == [OK] * 3
    assert checksums.tolist() == [xxhash.xxh3_64_intdigest(block) for block in kept]
    for verify in (True, False):
        for layer in bench.layers:
            layer[3:] = 0
        for (layer, piece), gap in zip(bench.rows(), gaps, strict=True):
            layer[:, piece:] = gap
        assert bench.load([5, 3, 4], [4, 0, 2], verify=verify) == [OK] * 3
        assert [bench.block(i) for i in (5, 3, 4)] == kept
        assert [bench.block(i) for i in range(3)] == kept
        for (layer, piece), gap in zip(bench.rows(), gaps, strict=True):
            assert np.array_equal(layer[:, piece:], gap)
    at = bench.slot_at(1)
    assert not any(bench.arena[at : at + 64])  # a slot that nobody stored to


# ---- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES)
def test_a_block_comes_back_bit_for_bit(size: int, path: str) -> None:
    assert_round_trip(Bench([size], path=path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "pieces", [[1024] * 4, [12_288] * 7, [5, 1024, 3], [16_384, 1], [1, 16_384, 4096]]
)
def test_layers_lie_side_by_side_in_a_slot(pieces: list[int], threads: int, path: str) -> None:
    bench = Bench(pieces, threads=threads, path=path)
    bench.store([1], [3])
    at = bench.slot_at(3)
    assert bench.arena[at : at + sum(pieces)] == bench.block(1)
    assert_round_trip(Bench(pieces, threads=threads, path=path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shift", [1, 31, 32, 63])
@pytest.mark.parametrize("gap", [0, 1, 64, 4096])
def test_any_base_and_stride_will_do(shift: int, gap: int, path: str) -> None:
    assert_round_trip(Bench([12_288, 12_288], gap=gap, shift=shift, path=path))


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.integers(1, 40_000) | st.integers(1, 20).map(lambda n: n * 1024), min_size=1
    ).filter(lambda pieces: sum(pieces) < 400_000),
    gap=st.integers(0, 200),
    shift=st.integers(0, 63),
    path=st.sampled_from(PATHS),
    threads=st.sampled_from([1, 3]),
)
def test_any_geometry_round_trips(
    pieces: list[int], gap: int, shift: int, path: str, threads: int
) -> None:
    assert_round_trip(Bench(pieces, gap=gap, shift=shift, path=path, threads=threads))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 13])
def test_every_block_of_a_batch_arrives(n: int, threads: int) -> None:
    bench = Bench([4096, 2048], n_slots=n, n_blocks=2 * n, threads=threads)
    slots = list(range(n))[::-1]
    assert bench.store(list(range(n)), slots)[0].tolist() == [OK] * n
    assert bench.load(list(range(n, 2 * n)), slots) == [OK] * n
    assert [bench.block(i) for i in range(n)] == [bench.block(n + i) for i in range(n)]


def test_an_empty_batch_is_no_work() -> None:
    bench = Bench([64])
    assert bench.store([], [])[0].tolist() == []
    assert bench.load([], []) == []


# ---- what a load refuses ---------------------------------------------------------------------


@pytest.fixture(params=[[4096, 4096], [4095, 17]], ids=["in step", "staged"])
def full(request: pytest.FixtureRequest) -> Bench:
    """Slots 0-3 hold blocks 0-3 at generation 1; slot 4 was never used."""
    bench = Bench(request.param)
    assert bench.store([0, 1, 2, 3], [0, 1, 2, 3])[0].tolist() == [OK] * 4
    return bench


@pytest.mark.parametrize("byte", [0, 31])
@pytest.mark.parametrize("verify", [True, False])
def test_another_key_is_refused(full: Bench, byte: int, verify: bool) -> None:
    keys = bytearray(key_of(1) + key_of(2))
    keys[32 + byte] ^= 0x80
    before = full.block(5)
    assert full.load([4, 5], [1, 2], keys=bytes(keys), verify=verify) == [OK, IDENTITY]
    assert full.block(4) == full.block(1)
    assert full.block(5) == before


def test_a_block_of_another_group_is_refused(full: Bench) -> None:
    layers, strides = full.layout()
    full.copier.register_layers(layers, strides, np.array(full.pieces, np.uint64), 6, group=1)
    flags = np.ones(1, np.uint8)
    arguments = request([4], [1], 1)
    assert full.copier.load(*arguments, flags, group=1).tolist() == [IDENTITY]
    assert full.copier.load(*arguments, flags, group=0).tolist() == [OK]


def test_a_group_is_registered_once_and_before_its_use(full: Bench) -> None:
    layers, strides = full.layout()
    pieces = np.array(full.pieces, np.uint64)
    with pytest.raises(ValueError, match="registered already"):
        full.copier.register_layers(layers, strides, pieces, 6)
    with pytest.raises(ValueError, match="group must be 0 to 63"):
        full.copier.register_layers(layers, strides, pieces, 6, group=64)
    with pytest.raises(ValueError, match="register_layers"):
        full.copier.load(*request([4], [1], 1), np.ones(1, np.uint8), group=1)


def test_a_rank_that_the_arena_has_not_is_refused(full: Bench) -> None:
    with pytest.raises(ValueError, match="1 ranks and no rank 1"):
        _core.SlotCopier(full.arena, 1, rank=1)


def test_another_tenants_slot_is_refused(full: Bench) -> None:
    theirs = Bench(full.pieces, namespace=bytes(32))
    theirs.arena[HEADER_BYTES:] = full.arena[HEADER_BYTES:]
    assert full.load([4], [1]) == [OK]
    assert theirs.load([4], [1]) == [IDENTITY]


def test_a_slot_never_written_is_refused(full: Bench) -> None:
    assert full.load([4], [4]) == [GENERATION]


def test_a_slot_being_written_is_refused(full: Bench) -> None:
    at = HEADER_BYTES + DESCRIPTOR_BYTES
    full.arena[at : at + 8] = (full.stamp(1) - 1).to_bytes(8, "little")
    assert full.load([4], [1]) == [IDENTITY]


@pytest.mark.parametrize("verify", [True, False])
def test_a_slot_that_moved_on_is_refused(full: Bench, verify: bool) -> None:
    full.store([5], [1], generation=2)
    assert full.load([4], [1], verify=verify) == [GENERATION]
    assert full.load([4], [1], generation=3, verify=verify) == [GENERATION]
    assert full.load([4], [1], generation=2, verify=verify) == [OK]


@pytest.mark.parametrize("where", [0, 100, -1])
def test_a_flipped_bit_is_found_where_asked_for(full: Bench, where: int) -> None:
    at = full.slot_at(2) + where % full.header.slot_bytes
    full.arena[at] ^= 1
    block_ids, slots, generations, keys = request([4, 5], [2, 3], 1)
    for flags, wanted in (([1, 1], CHECKSUM), ([0, 1], OK)):
        got = full.copier.load(block_ids, slots, generations, keys, np.array(flags, np.uint8))
        assert got.tolist() == [wanted, OK]


@pytest.mark.parametrize(
    ("block", "slot"), [(-1, 0), (6, 0), (0, -1), (0, 5), (2**31 - 1, 0), (0, -(2**31))]
)
def test_ids_outside_touch_nothing(full: Bench, block: int, slot: int) -> None:
    arena, device = full.arena[:], full.everything()
    assert full.store([block], [slot], generation=9)[0].tolist() == [RANGE]
    assert full.load([block], [slot]) == [RANGE]
    assert (full.arena[:], full.everything()) == (arena, device)


def test_one_bad_id_spoils_no_other(full: Bench) -> None:
    status, _ = full.store([4, 99, 5], [4, 0, 77])
    assert status.tolist() == [OK, RANGE, RANGE]
    assert full.load([5, -1], [4, 1]) == [OK, RANGE]
    assert full.block(5) == full.block(4)


# ---- what a store refuses --------------------------------------------------------------------


@pytest.mark.parametrize("generation", [0, 1, 4, 2**62, 2**64 - 1])
def test_a_stale_writer_changes_nothing(full: Bench, generation: int) -> None:
    full.store([0], [1], generation=5)
    before = full.arena[:]
    status, checksums = full.store([4], [1], generation=generation)
    assert (status.tolist(), checksums.tolist()) == ([GENERATION], [0])
    assert full.arena[:] == before


def test_a_store_told_twice_is_done_once(full: Bench) -> None:
    (first,) = full.store([4], [4])[1].tolist()
    full.layers[0][4] ^= 0xFF
    status, checksums = full.store([4], [4])
    assert (status.tolist(), checksums.tolist()) == ([OK], [first])
    assert full.load([5], [4]) == [OK]
    assert xxhash.xxh3_64_intdigest(full.block(5)) == first


def test_a_slot_named_twice_is_refused_before_any_byte(full: Bench) -> None:
    before = full.arena[:]
    with pytest.raises(ValueError, match="a slot is in slots twice"):
        full.store([0, 1], [4, 4], generation=2)
    assert full.arena[:] == before


def test_a_block_named_twice_is_refused_before_any_byte(full: Bench) -> None:
    before = full.everything()
    with pytest.raises(ValueError, match="a block is in block_ids twice"):
        full.load([4, 4], [0, 1])
    assert full.everything() == before


# ---- what the door refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(slice(0, 1), b"X"), "magic"),
        (lambda a: a.__setitem__(slice(8, 9), b"\3"), "version 3"),
        (lambda a: a.__setitem__(slice(12, 16), b"\1\2\3\4"), "byte order"),
        (lambda a: a.__setitem__(slice(104, 105), b"\xff"), "damaged"),
    ],
)
def test_a_wrong_header_is_refused(change: Callable[[Any], None], message: str) -> None:
    bench = Bench([64])
    change(bench.arena)
    with pytest.raises(ValueError, match=message):
        bench.open()


def test_a_shorter_mapping_is_refused() -> None:
    bench = Bench([64])
    with pytest.raises(ValueError, match="geometry"):
        _core.SlotCopier(memoryview(bench.arena)[:-64], 1)


def test_layers_that_make_no_slot_are_refused() -> None:
    bench = Bench([64])
    copier = _core.SlotCopier(bench.arena, 1)
    base = np.array([bench.layers[0].ctypes.data], np.uint64)
    with pytest.raises(ValueError, match="make 65 bytes, a slot has 64"):
        copier.register_layers(base, np.array([65], np.uint64), np.array([65], np.uint64), 6)
    with pytest.raises(ValueError, match="are no memory"):
        copier.register_layers(base, np.array([2**63], np.uint64), np.array([64], np.uint64), 6)
    with pytest.raises(ValueError, match="register_layers"):
        copier.store(*request([0], [0], 1))


def test_arrays_of_another_length_are_refused(full: Bench) -> None:
    block_ids, slots, generations, keys = request([0, 1], [0, 1], 2)
    with pytest.raises(ValueError, match="same length"):
        full.copier.store(block_ids, slots[:1], generations, keys)
    with pytest.raises(ValueError, match="32 bytes for each"):
        full.copier.store(block_ids, slots, generations, keys[:-1])
    with pytest.raises(ValueError, match="verify"):
        full.copier.load(block_ids, slots, generations, keys, np.ones(1, np.uint8))


def test_arrays_of_another_type_are_refused_not_copied(full: Bench) -> None:
    block_ids, slots, generations, keys = request([0, 1], [0, 1], 2)
    for wrong in (block_ids.astype(np.int64), np.repeat(block_ids, 2)[::2]):
        with pytest.raises(TypeError):
            full.copier.store(wrong, slots, generations, keys)


def test_the_copier_keeps_its_arena_mapped() -> None:
    bench = Bench([64])
    with pytest.raises(BufferError):
        bench.arena.close()


# ---- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece", [1, 4095, 4096, 65_536, 65_537])
def test_rows_are_gathered_and_scattered(piece: int, threads: int, path: str) -> None:
    rng = np.random.default_rng(piece)
    pool = rng.integers(0, 256, (150, piece), np.uint8)
    ids = rng.permutation(150)[:130].astype(np.int32)
    out = np.zeros((130, piece), np.uint8)
    _core.gather(pool, ids, out, threads=threads, cpu_path=path)
    assert np.array_equal(out, pool[ids])
    back = np.zeros_like(pool)
    _core.scatter(out, ids, back, threads=threads, cpu_path=path)
    wanted = np.zeros_like(pool)
    wanted[ids] = out
    assert np.array_equal(back, wanted)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_rows_outside_the_pool_are_refused(wrong: int) -> None:
    pool, out = np.zeros((4, 8), np.uint8), np.zeros((1, 8), np.uint8)
    with pytest.raises(ValueError, match="outside the pool"):
        _core.gather(pool, np.array([wrong], np.int32), out)
    with pytest.raises(ValueError, match="outside the pool"):
        _core.scatter(out, np.array([wrong], np.int32), pool)
