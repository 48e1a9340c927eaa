"""Memory that may be taken is the machine's or the container's, whichever is less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmem.errors import ArenaError, CapacityError
from kvmem.store import capacity
from kvmem.store.capacity import check_room, free_memory_bytes

GIB = 2**30


def machine(tmp_path: Path, *, available_gib: int, groups: str) -> tuple[Path, Path]:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: 1 kB\nMemAvailable: {available_gib * GIB // 1024} kB\n"
    )
    (proc / "self/cgroup").write_text(groups)
    return proc, cgroup


def limit(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def free(places: tuple[Path, Path]) -> int:
    return free_memory_bytes(proc=places[0], cgroup=places[1])


def test_without_a_limit_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    places = machine(tmp_path, available_gib=20, groups="0::/\n")
    limit(places[1], memory__max="max", memory__current=5 * GIB)
    assert free(places) == 20 * GIB


def test_the_limit_of_a_cgroup_above_counts_too(tmp_path: Path) -> None:
    places = machine(tmp_path, available_gib=20, groups="0::/pod/engine\n")
    limit(places[1] / "pod", memory__max=8 * GIB, memory__current=3 * GIB)
    limit(places[1] / "pod/engine", memory__max="max", memory__current=2 * GIB)
    assert free(places) == 5 * GIB


def test_page_cache_that_is_given_back_on_demand_is_free(tmp_path: Path) -> None:
    places = machine(tmp_path, available_gib=20, groups="0::/pod\n")
    limit(
        places[1] / "pod",
        memory__max=8 * GIB,
        memory__current=7 * GIB,
        memory__stat=f"anon 1\ninactive_file {2 * GIB}",
    )
    assert free(places) == 3 * GIB


def test_a_limit_of_version_1_counts(tmp_path: Path) -> None:
    places = machine(tmp_path, available_gib=20, groups="4:memory:/job\n0::/\n")
    limit(
        places[1] / "memory/job",
        memory__limit_in_bytes=6 * GIB,
        memory__usage_in_bytes=4 * GIB,
    )
    assert free(places) == 2 * GIB


def test_a_host_path_seen_inside_a_container_falls_back_to_its_root(tmp_path: Path) -> None:
    places = machine(tmp_path, available_gib=20, groups="0::/../../pod\n")
    limit(places[1], memory__max=4 * GIB, memory__current=1 * GIB)
    assert free(places) == 3 * GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    places = machine(tmp_path, available_gib=20, groups="0::/\n")
    limit(places[1], memory__max=1 * GIB, memory__current=2 * GIB)
    assert free(places) == 0


def test_a_kernel_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    places = machine(tmp_path, available_gib=1, groups="")
    (places[0] / "meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(ArenaError, match="MemAvailable"):
        free(places)


@pytest.mark.parametrize(
    ("shm_gib", "memory_gib", "short_of"), [(2, 9, "shared memory"), (9, 2, "memory")]
)
def test_a_budget_above_either_is_refused_with_both_figures(
    monkeypatch: pytest.MonkeyPatch, shm_gib: int, memory_gib: int, short_of: str
) -> None:
    monkeypatch.setattr(capacity, "_free_shm_bytes", lambda: shm_gib * GIB)
    monkeypatch.setattr(capacity, "free_memory_bytes", lambda: memory_gib * GIB)
    check_room(2 * GIB)
    with pytest.raises(
        CapacityError, match=f"'host_gb' .* 3.00 GiB of {short_of}.* Lower"
    ) as error:
        check_room(3 * GIB)
    assert (error.value.asked_bytes, error.value.free_bytes) == (3 * GIB, 2 * GIB)


def test_without_shared_memory_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "_SHM", Path("/dev/shm/no/such/folder"))
    with pytest.raises(CapacityError, match="/dev/shm"):
        check_room(1)


def test_this_machine_tells_its_free_memory() -> None:
    assert 1 << 20 < free_memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
