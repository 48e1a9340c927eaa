"""Stores of several models and engines under one path and one budget."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from kvmem.errors import ConfigError
from kvmem.store.folders import LOCK, claim, folders, trim

A, B = b"\xaa" * 32, b"\xbb" * 32
MIB = 1 << 20


def fill(folder: Path, n_bytes: int, used_s: float) -> None:
    (folder / "data").write_bytes(bytes(n_bytes))
    os.utime(folder, (used_s, used_s))


def hold(folder: Path) -> int:
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_a_namespace_gets_its_own_folder_again(tmp_path: Path) -> None:
    root = tmp_path / "new" / "path"
    mine = claim(root, A)
    assert mine.name == "aa" * 16 + "-0"
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert claim(root, A) == mine
    assert claim(root, B).name == "bb" * 16 + "-0"


def test_engines_side_by_side_have_a_store_each(tmp_path: Path) -> None:
    first = claim(tmp_path, A)
    fd = hold(first)
    second = claim(tmp_path, A)
    assert second.name == "aa" * 16 + "-1"
    os.close(fd)
    assert claim(tmp_path, A) in (first, second)


def test_idle_stores_go_oldest_first_until_the_budget_holds(tmp_path: Path) -> None:
    stores = [claim(tmp_path, bytes([n]) * 32) for n in range(4)]
    for n, folder in enumerate(stores):
        fill(folder, MIB, 1000.0 + n)
    own = stores[3]
    assert trim(own, 5 * MIB) == 0
    assert trim(own, 3 * MIB + MIB // 2) == 1
    assert [f.path for f in folders(tmp_path)] == stores[1:]
    assert trim(own, 3 * MIB + MIB // 2, soon_bytes=MIB) == 1
    assert [f.path for f in folders(tmp_path)] == stores[2:]


def test_a_store_that_is_open_is_never_removed_and_not_counted(tmp_path: Path) -> None:
    other, own = claim(tmp_path, A), claim(tmp_path, B)
    fill(other, 4 * MIB, 1000.0)
    fd = hold(other)
    assert trim(own, MIB) == 0
    os.close(fd)
    assert trim(own, MIB) == 1
    assert not other.exists()


def test_what_a_killed_engine_was_removing_goes_with_the_next(tmp_path: Path) -> None:
    own, other = claim(tmp_path, A), claim(tmp_path, B)
    fill(other, MIB, 1000.0)
    left = other.rename(other.with_name(other.name + ".gone"))
    assert [f.path for f in folders(tmp_path)] == [own]  # nobody opens it
    trim(own, 10 * MIB)
    assert not left.exists()


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    own = claim(tmp_path, A)
    others = [tmp_path / "photos", tmp_path / ("cc" * 16), tmp_path / ("cc" * 16 + "-0x")]
    for folder in others:
        folder.mkdir()
        (folder / "data").write_bytes(bytes(MIB))
    link = tmp_path / ("dd" * 16 + "-0")
    link.symlink_to(others[0])
    assert trim(own, 0) == 0
    assert all(folder.exists() for folder in [*others, link])


def test_a_path_that_cannot_be_used_is_told_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"disk_path.*local disk"):
        claim(tmp_path / "file" / "below", A)
