"""kvmem verify: what is bad is named, what hangs below it too, and nothing else is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvmem._core import xxh3_64
from kvmem.cli import app
from kvmem.errors import ConfigError
from kvmem.store.verify import stores_of, verify
from tests.unit.test_disk import Host, files, keys, place, start

__all__ = ["start"]  # the fixture


def filled(start: Callable[..., Host]) -> tuple[Host, list[list[bytes]], dict[str, Path]]:
    host = start()
    chains = [keys(6), [*keys(3), *keys(2, seed=1)], keys(4, seed=2)]
    for chain in chains:
        host.put(chain)
        host.settle()
    return host, chains, files(host)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def number(host_files: dict[str, Path], key: bytes) -> int:
    raw = host_files["table.kvd"].read_bytes()
    (at,) = [at for at in range(4096, len(raw), 128) if raw[at : at + 32] == key]
    return (at - 4096) // 128


def test_a_whole_store_is_sound(start: Callable[..., Host]) -> None:
    host, _, _ = filled(start)
    host.close()
    told: list[tuple[int, int]] = []
    report = verify(host.disk.folder, progress=lambda *n: told.append(n))
    assert (report.status, report.records, report.blocks, report.bad) == ("sound", 12, 12, ())
    assert report.namespace == host.arena.header.namespace.hex()
    assert report.bytes >= 12 * 10_000
    assert told[-1] == (12, 12)


def test_a_store_in_use_is_left_alone(start: Callable[..., Host]) -> None:
    host, _, _ = filled(start)
    report = verify(host.disk.folder, repair=True)
    assert report.status == "busy"
    assert "in use" in report.error


@pytest.mark.parametrize(
    ("where", "why"), [(128 + 77, "bytes"), (0, "header"), (16, "header"), (120, "header")]
)
def test_a_flipped_bit_takes_what_hangs_below_it(
    start: Callable[..., Host], where: int, why: str
) -> None:
    host, chains, paths = filled(start)
    at, third = place(host, chains[0][2]), number(paths, chains[0][2])
    below = {number(paths, key) for key in (*chains[0][3:], *chains[1][3:])}
    host.close()
    flip(paths["data.kvd"], at + where)
    before = paths["table.kvd"].read_bytes()
    report = verify(host.disk.folder)
    assert report.status == "damaged"
    assert {(bad.record, bad.why) for bad in report.bad} == {
        (third, why), *((record, "parent") for record in below)
    }  # fmt: skip
    assert (report.records, report.blocks) == (12, 6)
    assert paths["table.kvd"].read_bytes() == before
    # Repaired, it is sound, and what was whole still answers.
    assert verify(host.disk.folder, repair=True).status == "repaired"
    assert verify(host.disk.folder).status == "sound"
    again = start()
    assert [again.get(chain, f"r{i}") for i, chain in enumerate(chains)] == [2, 2, 4]


def test_damage_to_records_is_named(start: Callable[..., Host]) -> None:
    host, chains, paths = filled(start)
    last, other = number(paths, chains[0][5]), number(paths, chains[2][3])
    one, two = place(host, chains[0][5]), place(host, chains[2][3])
    host.close()
    flip(paths["table.kvd"], 4096 + 128 * last + 70)
    report = verify(host.disk.folder)
    assert [(bad.record, bad.key, bad.why) for bad in report.bad] == [(last, "", "record")]
    flip(paths["table.kvd"], 4096 + 128 * last + 70)
    # Two slots in one another's place are whole, and neither is what its record says.
    raw = bytearray(paths["data.kvd"].read_bytes())
    size = 12_288
    raw[one : one + size], raw[two : two + size] = raw[two : two + size], raw[one : one + size]
    paths["data.kvd"].write_bytes(raw)
    report = verify(host.disk.folder)
    assert {(bad.record, bad.why) for bad in report.bad} == {
        (last, "identity"), (other, "identity")
    }  # fmt: skip


def test_a_file_cut_off_is_named(start: Callable[..., Host]) -> None:
    host, chains, paths = filled(start)
    at = place(host, chains[2][3])
    host.close()
    with paths["data.kvd"].open("r+b") as data:
        data.truncate(at + 200)
    assert "short" in {bad.why for bad in verify(host.disk.folder).bad}


@pytest.mark.parametrize("at", [0, 8, 20, 4095])
def test_a_damaged_header_is_unreadable(start: Callable[..., Host], at: int) -> None:
    host, _, paths = filled(start)
    host.close()
    flip(paths["table.kvd"], at)
    report = verify(host.disk.folder, repair=True)
    assert report.status == "unreadable"
    assert "table.kvd" in report.error


def test_stores_are_found_under_the_path(start: Callable[..., Host], tmp_path: Path) -> None:
    host, _, _ = filled(start)
    assert stores_of(tmp_path / "disk") == [host.disk.folder]
    assert stores_of(host.disk.folder) == [host.disk.folder]
    with pytest.raises(ConfigError, match="no disk store"):
        stores_of(tmp_path / "none")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments])


def test_the_command_tells_people_and_machines(start: Callable[..., Host]) -> None:
    host, chains, paths = filled(start)
    at = place(host, chains[0][2])
    folder = str(host.disk.folder)
    busy = run(folder)
    assert (busy.exit_code, "Stop it first" in busy.stdout) == (1, True)
    host.close()
    fine = run(folder)
    assert (fine.exit_code, "sound, 12 of 12 blocks" in fine.stdout) == (0, True)
    flip(paths["data.kvd"], at + 500)
    bad = run(folder)
    assert bad.exit_code == 1
    assert "damaged, 6 of 12 blocks" in bad.stdout
    assert f"bytes {chains[0][2].hex()}" in bad.stdout
    (told,) = json.loads(run(folder, "--json").stdout)
    assert (told["status"], told["blocks"], len(told["bad"])) == ("damaged", 6, 6)
    assert run(folder, "--repair").exit_code == 0
    assert run(folder).exit_code == 0


def reseal(path: Path, at: int, value: int) -> None:
    """A header that says so, with a checksum that holds: damage makes none, people might."""
    raw = bytearray(path.read_bytes())
    raw[at : at + 8] = value.to_bytes(8, "little")
    raw[4088:4096] = xxh3_64(bytes(raw[:4088])).to_bytes(8, "little")
    path.write_bytes(raw)


def test_a_header_that_lies_about_its_sizes_is_given_no_memory(start: Callable[..., Host]) -> None:
    host, chains, paths = filled(start)
    host.close()
    table = paths["table.kvd"]
    honest = table.read_bytes()
    reseal(table, 24, 2**40)  # unit_bytes
    assert verify(host.disk.folder).status == "unreadable"
    table.write_bytes(honest)
    reseal(table, 40, 2**40)  # share_bytes
    assert verify(host.disk.folder).status == "unreadable"
    table.write_bytes(honest)
    reseal(table, 16, 2**31 - 2)  # n_records: as of a larger budget
    again = start()
    assert [again.get(chain, f"r{i}") for i, chain in enumerate(chains)] == [6, 5, 4]
