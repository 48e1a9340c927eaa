"""The live switch's record: whole or not at all, whoever writes, and damage keeps the last good."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from kvmem.errors import ArenaError
from kvmem.store import Arena, Switch, read_switch, set_switch
from kvmem.store.switch import SwitchReader

ROOT = Path(__file__).resolve().parents[2]
STATES = [Switch(loads=a, stores=b) for a, b in itertools.product((True, False), repeat=2)]


class Told:
    """What a reader says beside its answers."""

    def __init__(self) -> None:
        self.damage: list[str] = []
        self.changes: list[Switch] = []


@pytest.fixture
def arena(arena_name: str) -> Iterator[Arena]:
    arena = Arena.create(arena_name, n_slots=4, slot_bytes=64, namespace=bytes(32))
    yield arena
    arena.close(unlink=True)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def reader(arena: Arena, told: Told) -> SwitchReader:
    return SwitchReader(arena, on_damage=told.damage.append, on_change=told.changes.append)


def put(arena: Arena, word: int) -> None:
    at = arena.header.switch_offset
    arena.buffer[at : at + 8] = word.to_bytes(8, "little")


def got(arena: Arena) -> int:
    at = arena.header.switch_offset
    return int.from_bytes(arena.buffer[at : at + 8], "little")


# -- the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("sequence", [0, 1, 255, (1 << 24) - 1])
def test_a_record_reads_back(state: Switch, sequence: int) -> None:
    assert Switch.decode(state.encode(sequence)) == (sequence, state)


def test_the_count_of_changes_starts_again_after_its_last() -> None:
    assert Switch.decode(Switch().encode(1 << 24)) == (0, Switch())


@pytest.mark.parametrize("state", STATES)
def test_any_flipped_bit_is_seen(state: Switch) -> None:
    word = state.encode(77)
    assert [bit for bit in range(64) if Switch.decode(word ^ 1 << bit)] == []


def test_zeros_are_no_record() -> None:
    assert Switch.decode(0) is None


def test_a_flag_of_the_future_is_not_taken_for_one_of_today() -> None:
    low = 1 << 2
    whole = low | (xxhash.xxh3_64_intdigest(low.to_bytes(4, "little")) & 0xFFFFFFFF) << 32
    assert Switch.decode(whole) is None


def test_no_mixture_of_two_records_bytes_passes_for_one() -> None:
    for old, new in itertools.permutations(STATES, 2):
        before, after = (s.encode(n).to_bytes(8, "little") for n, s in ((6, old), (7, new)))
        for cut in range(1, 8):
            torn = after[:cut] + before[cut:]
            assert torn in (before, after) or not Switch.decode(int.from_bytes(torn, "little"))


# -- the page -------------------------------------------------------------------------------------


def test_an_arena_starts_with_both_on(arena: Arena, reader: SwitchReader, told: Told) -> None:
    assert reader.read() == read_switch(arena.path) == Switch(loads=True, stores=True)
    assert told.changes == []


def test_a_change_is_seen_at_the_next_look(arena: Arena, reader: SwitchReader, told: Told) -> None:
    for state in [*STATES[1:], STATES[0]]:
        assert set_switch(arena.path, loads=state.loads, stores=state.stores) == state
        assert reader.read() == reader.read() == read_switch(arena.path) == state
    assert told.changes == [*STATES[1:], STATES[0]]


def test_what_is_not_given_stays(arena: Arena) -> None:
    assert set_switch(arena.path, loads=False) == Switch(loads=False, stores=True)
    assert set_switch(arena.path, stores=False) == Switch(loads=False, stores=False)
    assert set_switch(arena.path, loads=True) == Switch(loads=True, stores=False)


def test_stats_and_blocks_beside_it_are_untouched(arena: Arena) -> None:
    header = arena.header
    around = (header.stats_offset, header.switch_offset, header.data_offset, header.total_bytes)
    for at, end in itertools.pairwise(around):
        arena.buffer[at + 8 : end] = b"\xa5" * (end - at - 8)
    before = bytearray(arena.buffer)
    set_switch(arena.path, loads=False)
    before[header.switch_offset : header.switch_offset + 8] = got(arena).to_bytes(8, "little")
    assert bytes(arena.buffer) == bytes(before)


@pytest.mark.parametrize("word", [0, 2**64 - 1, Switch().encode(3) ^ 1 << 40])
def test_a_damaged_record_keeps_the_last_good_one_and_is_told_once(
    arena: Arena, reader: SwitchReader, told: Told, word: int
) -> None:
    set_switch(arena.path, loads=False)
    assert not reader.read().loads
    put(arena, word)
    assert [reader.read() for _ in range(3)] == [Switch(loads=False, stores=True)] * 3
    assert len(told.damage) == 1
    assert f"{word:#018x}" in told.damage[0]
    set_switch(arena.path, loads=True, stores=True)
    assert reader.read() == Switch()
    assert len(told.damage) == 1


def test_half_a_change_of_a_damaged_record_is_refused_and_a_whole_one_writes_it_anew(
    arena: Arena,
) -> None:
    put(arena, 0)
    for ask in (lambda: read_switch(arena.path), lambda: set_switch(arena.path, loads=False)):
        with pytest.raises(ArenaError, match=r"damaged.*both loads and stores"):
            ask()
    assert got(arena) == 0
    set_switch(arena.path, loads=False, stores=True)
    assert read_switch(arena.path) == Switch(loads=False, stores=True)


def test_an_engine_that_ended_cannot_be_switched(arena_name: str) -> None:
    arena = Arena.create(arena_name, n_slots=4, slot_bytes=64, namespace=bytes(32))
    path = arena.path
    arena.close(unlink=True)
    with pytest.raises(FileNotFoundError):
        set_switch(path, loads=False)


# -- other processes ------------------------------------------------------------------------------

TOGGLE = """
import sys
from pathlib import Path
from kvmem.store import set_switch
path, field, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for n in range(times):
    set_switch(path, **{field: n % 2 == 0})
"""
HOLD = """
import fcntl, signal, sys
from pathlib import Path
from kvmem.store.arena import open_file
fd, _ = open_file(Path(sys.argv[1]))
fcntl.flock(fd, fcntl.LOCK_EX)
print("ready", flush=True)
signal.pause()
"""


def started(program: str, *arguments: object) -> subprocess.Popen[str]:
    """The program in a process of its own, once it has said that it is ready."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_writers_at_once_lose_no_change_and_no_reader_sees_half_of_one(
    arena: Arena, reader: SwitchReader, told: Told
) -> None:
    times = 501
    writers = [started(TOGGLE, arena.path, field, times) for field in ("loads", "stores")]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        reader.read()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert told.damage == []
    assert Switch.decode(got(arena)) == (2 * times, Switch(loads=True, stores=True))


def test_a_writer_that_was_killed_keeps_nobody_out(arena: Arena) -> None:
    holder = started(HOLD, arena.path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert set_switch(arena.path, loads=False) == Switch(loads=False, stores=True)
