"""The benchmark of faults sees what it is there to see: each of its verdicts, broken on purpose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import _faults, bench_faults
from benchmarks._faults import CHAIN, SHARE_BYTES
from benchmarks.bench_faults import DATA, Tally, filled, flips, kills, torn
from kvmem.store.arena import sweep
from kvmem.store.folders import TABLE

VERDICTS = ("wrong", "undetected", "lost_beyond_bound")


def draw() -> np.random.Generator:
    return np.random.default_rng(5)


def verdicts(tally: Tally) -> dict[str, int]:
    return {what: tally[what] for what in VERDICTS if tally[what]}


def test_a_store_that_is_right_is_right(tmp_path: Path) -> None:
    tally = Tally()
    kills(tmp_path, 2, draw(), tally)
    flips(tmp_path, 8, draw(), tally)
    sweep()  # what the killed ones left in /dev/shm
    assert verdicts(tally) == {}
    assert (tally["kills"], tally["flips"]) == (2, 8)


def test_bytes_of_another_key_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = filled(tmp_path / "store", 1, 2)
    monkeypatch.setattr(_faults, "block_of", lambda key: np.zeros(SHARE_BYTES, np.uint8))
    tally = Tally()
    assert tally.read_all(tmp_path / "store", numbers) == [CHAIN, CHAIN]
    assert verdicts(tally) == {"wrong": 2 * CHAIN}


def test_one_other_byte_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, real = filled(tmp_path / "store", 1, 2), _faults.block_of

    def block_of(key: bytes) -> Any:
        block = real(key).copy()
        block[-1] ^= key == _faults.chain_of(numbers[1])[CHAIN - 1]
        return block

    monkeypatch.setattr(_faults, "block_of", block_of)
    tally = Tally()
    tally.read_all(tmp_path / "store", numbers)
    assert verdicts(tally) == {"wrong": 1}


def test_a_damaged_block_that_is_answered_is_undetected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_faults, "damage", lambda folder, layout, keys, draw: {keys[0]})
    tally = Tally()
    flips(tmp_path, 8, draw(), tally)
    assert verdicts(tally) == {"undetected": 1}


def cut(root: Path, file: str, n_bytes: int) -> None:
    (folder,) = root.iterdir()
    os.truncate(folder / file, n_bytes)


def test_what_was_told_and_is_gone_after_a_kill_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, told = bench_faults.kill_once, []

    def kill_once(root: Path, *args: Any) -> list[int]:
        told.extend(real(root, *args))
        cut(root, TABLE, 4096)
        return told

    monkeypatch.setattr(bench_faults, "kill_once", kill_once)
    monkeypatch.setattr(bench_faults, "POINTS", ("after_record",) * 4)
    tally = Tally()
    kills(tmp_path, 1, np.random.default_rng(1), tally)
    sweep()
    assert told
    assert verdicts(tally) == {"lost_beyond_bound": CHAIN * len(told)}


def test_what_was_flushed_and_is_gone_after_a_power_cut_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Tally.read_all

    def read_all(self: Tally, root: Path, numbers: list[int]) -> list[int]:
        cut(root, DATA, 0)
        return real(self, root, numbers)

    monkeypatch.setattr(Tally, "read_all", read_all)
    tally = Tally()
    torn(tmp_path, 1, draw(), tally)
    assert tally["lost_beyond_bound"] == tally["torn"] * bench_faults.CHAINS * CHAIN
    assert tally["wrong"] == 0
