"""Processes that are killed with an arena in their hands: the memory is free at once, and the
dangling name goes at the next start."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmem.store.arena import Arena, list_live, sweep
from kvmem.store.layout import HEADER_BYTES

CREATE = """
from kvmem.store.arena import Arena
arena = Arena.create({name!r}, n_slots=8, slot_bytes=1000, namespace=b"n" * 32)
"""
OPEN = """
from pathlib import Path
from kvmem.store.arena import Arena
arena = Arena.open(Path({path!r}))
"""
# The child says that it is there, and waits until it is told or killed.
WAIT = "print('ready', flush=True); input()"


@contextmanager
def child(program: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_bytes_have_no_name_so_the_kernel_frees_them_with_their_last_user(
    arena_name: str,
) -> None:
    path = Arena.path_of(arena_name)
    with child(CREATE.format(name=arena_name) + WAIT):
        assert path.stat().st_nlink == 0
        assert path.stat().st_blocks * 512 >= HEADER_BYTES  # they are there, and were reserved
        assert path.lstat().st_blocks == 0
    assert path in sweep()


def test_the_name_of_a_killed_owner_leads_nowhere_and_is_swept(arena_name: str) -> None:
    path = Arena.path_of(arena_name)
    with child(CREATE.format(name=arena_name) + WAIT) as owner:
        assert path in [live.path for live in list_live()]
        assert path not in sweep()
        kill(owner)
        assert not path.exists()
        assert path.is_symlink()
        assert path not in [live.path for live in list_live()]
        assert path in sweep()
    assert not path.is_symlink()


def test_the_name_of_a_killed_owner_is_free_for_the_next(arena_name: str) -> None:
    with child(CREATE.format(name=arena_name) + WAIT) as owner:
        kill(owner)
    arena = Arena.create(arena_name, n_slots=2, slot_bytes=64, namespace=b"m" * 32)
    assert arena.header.namespace == b"m" * 32
    arena.close(unlink=True)


def test_a_worker_outliving_its_scheduler_keeps_its_bytes_until_it_ends(arena_name: str) -> None:
    path = Arena.path_of(arena_name)
    fill = "arena.buffer[-1] = 77; "
    tell = "print('ready', flush=True); input(); print(arena.buffer[-1], flush=True); input()"
    with (
        child(CREATE.format(name=arena_name) + fill + WAIT) as owner,
        child(OPEN.format(path=str(path)) + tell) as worker,
    ):
        kill(owner)
        assert path in sweep()  # a name only: what the worker has mapped stays (I3)
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "77\n"


def test_a_killed_worker_does_not_cost_its_scheduler_the_arena(arena_name: str) -> None:
    arena = Arena.create(arena_name, n_slots=2, slot_bytes=64, namespace=b"m" * 32)
    with child(OPEN.format(path=str(arena.path)) + WAIT) as worker:
        kill(worker)
    assert arena.path not in sweep()
    Arena.open(arena.path).close(unlink=False)
    arena.close(unlink=True)


def test_a_new_worker_of_a_dead_owner_is_refused(arena_name: str) -> None:
    from kvmem.errors import ArenaError

    path = Arena.path_of(arena_name)
    with child(CREATE.format(name=arena_name) + WAIT) as owner:
        kill(owner)
    with pytest.raises(ArenaError, match="gone"):
        Arena.open(path)
    sweep()


POINTS = ["fchmod", "_reserve", "pwrite", "_map", "_link"]


DIE = """
import os, signal
from kvmem.store import arena
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
{point} = die
"""


def killed_at(point: str, arena_name: str) -> list[Path]:
    """The files left by a process that was killed when it came to `point`."""
    program = DIE.format(point=point) + CREATE.format(name=arena_name)
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    return list(Path("/dev/shm").glob(f"*{arena_name}*"))


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_before_the_arena_has_its_name_leaves_nothing(arena_name: str, point: str) -> None:
    module = "os" if point in ("fchmod", "pwrite") else "arena"
    assert killed_at(f"{module}.{point}", arena_name) == []


def test_a_kill_right_after_it_has_its_name_leaves_what_the_next_start_reclaims(
    arena_name: str,
) -> None:
    path = Arena.path_of(arena_name)
    assert killed_at("arena.Arena.__init__", arena_name) == [path]
    assert path in sweep()
    assert not path.is_symlink()


def test_an_owner_that_just_ends_takes_its_file_along(arena_name: str) -> None:
    program = CREATE.format(name=arena_name)
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not Arena.path_of(arena_name).is_symlink()


def test_a_forked_child_that_ends_leaves_its_parents_file(arena_name: str) -> None:
    program = (
        CREATE.format(name=arena_name)
        + """
import os, sys
pid = os.fork()
if pid == 0:
    sys.exit(0)  # runs the finalizers of the parent's objects
os.waitpid(pid, 0)
assert arena.path.exists()
"""
    )
    subprocess.run([sys.executable, "-c", program], check=True)
