"""What lies where: read from beside a running host and its disk, and right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvmem.cli import app
from kvmem.errors import ConfigError
from kvmem.store import survey
from tests.unit.test_disk import SHARE, Host, files, keys, start

__all__ = ["start"]  # the fixture


@pytest.fixture
def host(start: Callable[..., Host]) -> Host:
    host = start()
    for chain in ([*keys(6)], [*keys(3), *keys(2, seed=1)]):
        host.put(chain)
        host.settle()
    return host


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "300"})


def mine(host: Host) -> survey.ArenaSurvey:
    (found,) = [one for one in survey.arenas() if one.arena == host.arena.path.name]
    return found


def test_a_running_hosts_blocks_are_counted(host: Host) -> None:
    told = mine(host)
    assert (told.slots, told.blocks, told.writing) == (32, 8, 0)
    assert told.groups == {0: 8}
    assert told.namespace == host.arena.header.namespace.hex()


def test_a_store_tells_of_its_blocks_while_it_is_open_and_after(host: Host) -> None:
    root = host.disk.folder.parent
    for in_use in (True, False):
        (told,) = survey.stores(root)
        assert (told.blocks, told.in_use, told.error) == (8, in_use, "")
        assert told.deepest == 6
        assert told.groups == {0: 8}
        assert 8 * SHARE <= told.bytes <= told.capacity_bytes
        assert survey.stores(host.disk.folder) == [told]
        if in_use:
            host.close()


def test_a_block_is_found_wherever_it_lies(host: Host) -> None:
    key = keys(6)[4]
    root = host.disk.folder.parent
    for digits in (key.hex(), key.hex()[:9], key.hex()[:8].upper()):
        on_host, on_disk = survey.places(digits, root)
        assert (on_host.tier, on_host.where) == ("host", host.arena.path.name)
        assert (on_disk.tier, on_disk.where) == ("disk", str(host.disk.folder))
        assert on_host.key == on_disk.key == key.hex()
        assert (on_disk.depth, on_disk.parent) == (4, keys(6)[3].hex())
        assert on_host.bytes == SHARE
    host.cache._tier.quarantine(on_host.number, on_host.generation)
    assert survey.places(keys(1, seed=9)[0].hex(), root) == []


@pytest.mark.parametrize("digits", ["", "abc", "xyzw", "0" * 65, "../etc"])
def test_what_is_no_key_is_refused(digits: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block's key"):
        survey.places(digits, tmp_path)


def test_a_record_that_is_damaged_is_no_place(host: Host) -> None:
    key, table = keys(6)[4], files(host)["table.kvd"]
    raw = bytearray(table.read_bytes())
    at = next(at for at in range(4096, len(raw), 128) if raw[at : at + 32] == key)
    raw[at + 100] ^= 1
    table.write_bytes(raw)
    assert [one.tier for one in survey.places(key.hex(), table.parent.parent)] == ["host"]


@pytest.mark.parametrize(
    ("at", "told"), [(0, "no table"), (8, "version"), (70, "header is damaged")]
)
def test_a_store_that_cant_be_read_says_why(host: Host, at: int, told: str) -> None:
    table = files(host)["table.kvd"]
    raw = bytearray(table.read_bytes())
    raw[at] ^= 1
    table.write_bytes(raw)
    (one,) = survey.stores(table.parent.parent)
    assert told in one.error
    assert told in run("store", str(table.parent.parent)).stdout


def test_the_commands_say_the_same(host: Host) -> None:
    root, key = str(host.disk.folder.parent), keys(6)[4].hex()
    (store,) = json.loads(run("store", root, "--json").stdout)
    assert store["blocks"] == 8
    assert "open now" in run("store", root).stdout
    name = host.arena.header.namespace.hex()
    (one,) = json.loads(run("namespace", name[:12], "--disk-path", root, "--json").stdout)
    assert [engine["blocks"] for engine in one["engines"]] == [8]
    assert [store["blocks"] for store in one["stores"]] == [8]
    assert name in run("namespace", name[:12], "--disk-path", root).stdout
    told = json.loads(run("block", key, "--disk-path", root, "--json").stdout)
    assert [row["place"]["tier"] for row in told] == ["host", "disk"]
    assert key[:16] in run("block", key, "--disk-path", root).stdout


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for arguments in (
        ["store", str(tmp_path / "none")],
        ["namespace", "ab" * 32, "--disk-path", str(tmp_path)],
        ["block", "ab" * 32, "--disk-path", str(tmp_path)],
    ):
        ran = run(*arguments)
        assert ran.exit_code == 1
        assert ran.stderr.startswith("kvmem: ")
