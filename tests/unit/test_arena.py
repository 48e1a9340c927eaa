"""The arena's file: private, whole, bounded, and owned by whoever is alive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmem.errors import ArenaError, ArenaInUse, CapacityError, ConfigError
from kvmem.store import arena as arena_module
from kvmem.store.arena import Arena, list_live, sweep
from kvmem.store.layout import HEADER_BYTES, Header, slots_within

SPACE = b"n" * 32


def create(name: str, n_slots: int = 4, slot_bytes: int = 1000) -> Arena:
    return Arena.create(
        name, n_slots=n_slots, slot_bytes=slot_bytes, namespace=SPACE, group=0, label="model"
    )


@pytest.fixture
def arena(arena_name: str) -> Iterator[Arena]:
    arena = create(arena_name)
    yield arena
    arena.close(unlink=True)


def test_the_file_is_private_whatever_the_umask(arena_name: str) -> None:
    old = os.umask(0)
    try:
        arena = create(arena_name)
    finally:
        os.umask(old)
    assert arena.path.stat().st_mode & 0o777 == 0o600
    arena.close(unlink=True)


def test_both_halves_in_one_process_see_the_same_bytes(arena: Arena) -> None:
    other = Arena.open(arena.path)
    arena.buffer[arena.data_of(3)] = 77
    assert other.buffer[other.data_of(3)] == 77
    other.close(unlink=False)


def test_the_header_tells_the_owner_and_the_namespace(arena: Arena) -> None:
    header = Arena.open(arena.path).header
    assert (header.owner_pid, header.uid) == (os.getpid(), os.getuid())
    assert (header.namespace, header.label) == (SPACE, "model")


def test_a_second_owner_is_refused_and_told_who_has_it(arena: Arena, arena_name: str) -> None:
    with pytest.raises(ArenaInUse, match="'arena'") as error:
        create(arena_name)
    assert error.value.owner_pid == os.getpid()
    assert arena.path.exists()


def test_an_arena_that_is_closed_can_be_made_again(arena_name: str) -> None:
    create(arena_name).close(unlink=True)
    create(arena_name).close(unlink=True)


def test_a_name_left_by_its_owner_is_free_while_the_bytes_are_mapped(arena_name: str) -> None:
    owner = create(arena_name)
    path, buffer = owner.path, owner.buffer
    owner.close(unlink=False)
    assert path in sweep()
    buffer[-1] = 77  # I3: a mapping keeps its bytes, whatever becomes of the name
    second = create(arena_name)
    assert second.buffer[-1] == 0
    assert buffer[-1] == 77
    second.close(unlink=True)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a" * 65, "-a", "a b", "é"])
def test_a_name_that_could_point_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="arena"):
        create(name)


def test_a_budget_above_the_memory_is_refused_before_anything_is_made(arena_name: str) -> None:
    with pytest.raises(CapacityError, match="host_gb") as error:
        create(arena_name, n_slots=1 << 20, slot_bytes=1 << 30)
    assert error.value.asked_bytes > error.value.free_bytes


def test_a_lack_of_memory_while_it_is_made_leaves_nothing(
    arena_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "check_room", lambda n_bytes: None)
    with pytest.raises(CapacityError, match="host_gb"):
        create(arena_name, n_slots=1 << 20, slot_bytes=1 << 30)
    assert not list(Path("/dev/shm").glob(f"*{arena_name}*"))


def test_a_dead_name_that_changes_hands_while_it_is_removed_is_kept(
    arena_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Arena.path_of(arena_name)
    path.symlink_to("/proc/4194305/fd/7")  # above the kernel's highest pid
    look = arena_module._open_and_close
    made: list[Arena] = []

    def overtaken(link: Path) -> bool:
        dead = not look(link)
        monkeypatch.setattr(arena_module, "_open_and_close", look)
        made.append(create(arena_name))  # removes the dead one, and takes the name
        return not dead

    monkeypatch.setattr(arena_module, "_open_and_close", overtaken)
    assert path not in sweep()
    assert [live.path for live in list_live() if live.path == path] == [path]
    Arena.open(path).close(unlink=False)
    made[0].close(unlink=True)


@pytest.mark.parametrize("target", ["/proc/self/fd/0", "/etc/passwd", "/proc/1/fd/../../etc"])
def test_a_link_that_kvmem_did_not_make_is_refused_and_kept(arena_name: str, target: str) -> None:
    path = Arena.path_of(arena_name)
    path.symlink_to(target)
    try:
        with pytest.raises(ArenaError, match="not a private arena"):
            Arena.open(path)
        with pytest.raises(ArenaError, match="not a private arena"):
            create(arena_name)
        assert path not in sweep()
    finally:
        path.unlink()


def test_a_descriptor_that_is_another_file_by_now_is_a_dead_owners(
    arena_name: str, tmp_path: Path
) -> None:
    path = Arena.path_of(arena_name)
    with (tmp_path / "other").open("wb") as file:
        path.symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        with pytest.raises(ArenaError, match="gone"):
            Arena.open(path)
        assert path in sweep()


def test_a_pid_that_was_given_again_is_no_owner(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "_start_time", lambda pid: arena.header.owner_start + 1)
    assert arena.path not in [live.path for live in list_live()]


def test_a_name_taken_while_the_arena_is_made_is_refused(
    arena_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = arena_module._reserve
    first: list[Arena] = []

    def overtaken(fd: int, n_bytes: int) -> None:
        monkeypatch.setattr(arena_module, "_reserve", reserve)
        first.append(create(arena_name))
        reserve(fd, n_bytes)

    monkeypatch.setattr(arena_module, "_reserve", overtaken)
    with pytest.raises(ArenaInUse, match="'arena'"):
        create(arena_name)
    assert [live.path for live in list_live() if arena_name in live.path.name] == [first[0].path]
    first[0].close(unlink=True)


@pytest.mark.parametrize(
    "given",
    [{"n_slots": 0}, {"slot_bytes": 0}, {"namespace": b"short"}, {"group": -1}],
)
def test_a_shape_that_no_arena_has_is_refused(arena_name: str, given: dict[str, Any]) -> None:
    shape = {"n_slots": 4, "slot_bytes": 1000, "namespace": SPACE, "group": 0} | given
    with pytest.raises(ValueError, match="arena"):
        Arena.create(arena_name, **shape)
    assert not Arena.path_of(arena_name).exists()


def test_more_slots_than_there_can_be_names_the_budget(arena_name: str) -> None:
    with pytest.raises(CapacityError, match="host_gb"):
        create(arena_name, n_slots=2**31)


def test_a_link_in_the_place_of_the_file_is_refused(arena_name: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    path = Arena.path_of(arena_name)
    path.symlink_to(target)
    try:
        with pytest.raises(ArenaError):
            create(arena_name)
        with pytest.raises(ArenaError):
            Arena.open(path)
        assert target.read_bytes() == b"precious"
    finally:
        path.unlink()


def test_a_file_that_others_can_read_is_refused(arena: Arena) -> None:
    arena.path.chmod(0o644)
    with pytest.raises(ArenaError, match="private"):
        Arena.open(arena.path)


@pytest.mark.parametrize("at", [0, 8, 12, 24, 104, HEADER_BYTES - 8])
def test_a_damaged_header_is_refused(arena: Arena, at: int) -> None:
    arena.buffer[at] ^= 0xFF
    with pytest.raises(ArenaError):
        Arena.open(arena.path)


def test_a_file_that_was_cut_is_refused(arena: Arena, tmp_path: Path) -> None:
    page = bytes(arena.buffer[:HEADER_BYTES])
    with pytest.raises(ArenaError, match="geometry"):
        Header.decode(page, file_bytes=arena.header.total_bytes - 4096)


def test_a_newer_version_is_refused_by_number(arena: Arena) -> None:
    page = bytearray(arena.buffer[:HEADER_BYTES])
    page[8] = 3
    with pytest.raises(ArenaError, match="version 3"):
        Header.decode(bytes(page), file_bytes=arena.header.total_bytes)


def test_stats_are_the_last_value_written(arena: Arena) -> None:
    assert Arena.read_stats(arena.path) is None
    for n in range(5):
        arena.write_stats(b"value %d" % n)
        assert Arena.read_stats(arena.path) == b"value %d" % n


def test_a_torn_stats_value_gives_the_one_before(arena: Arena) -> None:
    arena.write_stats(b"whole")
    arena.write_stats(b"torn")
    at = bytes(arena.buffer).index(b"torn")
    arena.buffer[at] ^= 1
    assert Arena.read_stats(arena.path) == b"whole"


def test_stats_above_the_room_are_refused(arena: Arena) -> None:
    with pytest.raises(ArenaError, match="room"):
        arena.write_stats(b"x" * 40_000)


def test_live_arenas_are_listed_and_dead_ones_are_not(arena: Arena, arena_name: str) -> None:
    dead = arena.path.with_name(f"{arena.path.name}-dead")
    dead.symlink_to("/proc/4194305/fd/7")
    listed = [live.path for live in list_live()]
    assert arena.path in listed
    assert dead not in listed
    assert dead in sweep()


def test_an_arena_stays_within_its_budget() -> None:
    for budget in (3 << 20, 10 << 20, 1 << 30):
        for slot_bytes in (1, 1000, 98_304, 2_949_120):
            n = slots_within(budget, slot_bytes)
            header = Header(
                n_slots=n, slot_bytes=slot_bytes, namespace=SPACE, group=0, uid=0,
                owner_pid=1, owner_start=1,
            )  # fmt: skip
            assert n == 0 or header.total_bytes <= budget
