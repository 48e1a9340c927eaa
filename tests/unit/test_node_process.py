"""`kvmem node` as its users start and watch it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from kvmem.errors import ConfigError
from kvmem.node import Node, Settings
from kvmem.node.health import Health, answer
from tests import nodes
from tests.blocks import chain
from tests.unit.test_node import store, until


def kvmem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmem.cli", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o700)
    return folder


def test_status_tells_what_is_held_and_a_restart_finds_it_on_the_disk(path: Path) -> None:
    flags = ("--host-gb", "0.05", "--disk-gb", "0.05")
    node = nodes.process(path, *flags)
    one = nodes.client(path, tenant_of=lambda request: b"T")
    assert one.has_disk
    keys = chain("p", 5)
    room = one.reserve("r", 0, keys, range(5))
    link = link_of(one)
    write(link, room, keys)
    assert one.publish(room.slots, room.generations, sums_of(link, room)) == 5
    one.demote(0, keys, range(5))
    until(lambda: one.stats()["disk"]["written"] == 5)
    told = json.loads(kvmem("node", "status", "--path", str(path), "--json").stdout)
    assert (told["pid"], told["cache"]["published"]) == (node.pid, 5)
    assert told["tenants"]["54"]["blocks"] == 5
    assert [(e["attached"], e["workers"], e["requests"]) for e in told["engines"]] == [(True, 1, 1)]
    shown = kvmem("node", "status", "--path", str(path)).stdout
    assert "5 of" in shown
    node.send_signal(signal.SIGTERM)
    assert node.wait(30) == 0
    again = nodes.process(path, *flags)
    until(one.adopt)

    def found() -> int:
        one.settle(0.02)
        return one.acquire("s", [keys], start=0, limit=5).stop

    until(lambda: found() == 5)  # from the disk, checked
    link.close()
    one.close()
    again.terminate()
    assert again.wait(30) == 0
    assert kvmem("node", "status", "--path", str(path)).returncode == 1


def link_of(cache: Any) -> Any:
    import msgspec

    from kvmem.node import Link

    like = msgspec.structs.replace(nodes.hello(), role="worker", token=cache.attachment.token)
    return Link(cache.folder, like, lambda: None)


def write(link: Any, room: Any, keys: list[bytes]) -> None:
    import numpy as np

    from kvmem._core import SlotCopier

    blocks = np.arange(5 * nodes.SLOT_BYTES, dtype=np.uint8).reshape(5, -1)
    copier = SlotCopier(np.frombuffer(link.arena.buffer, np.uint8), 1)
    one = np.array([nodes.SLOT_BYTES], np.uint64)
    copier.register_layers(np.array([blocks.ctypes.data], np.uint64), one, one, 5)
    ids = np.arange(5, dtype=np.int32)
    status, sums = copier.store(ids, room.slots, room.generations, b"".join(keys))
    assert not status.any()
    link.sums = sums


def sums_of(link: Any, room: Any) -> Any:
    assert len(link.sums) == len(room.slots)
    return link.sums


def test_a_second_node_in_the_folder_is_one_line_and_exit_code_2(path: Path) -> None:
    with nodes.serving(path):
        done = kvmem("node", "--path", str(path), "--host-gb", "0.01")
    assert done.returncode == 2
    assert "serves at" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong", [{"host_gb": 0.0}, {"host_gb": float("nan")}, {"tenant_share": 0.0},
              {"eviction": "agents"}, {"disk_gb": -1.0}],
)  # fmt: skip
def test_settings_that_cannot_be_met_are_refused(path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**{"path": path, "host_gb": 1.0, **wrong})
    assert caught.value.setting in wrong


def get(port: int, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as told:
            return told.status, json.load(told)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_health_and_readiness(path: Path) -> None:
    with nodes.serving(path) as node:
        health = Health(node, 0)
        one = nodes.client(path)
        store(one, "r", chain("p", 4))
        assert get(health.port, "/health") == (200, {"ok": True, "engines": 1, "failures": 0})
        assert get(health.port, "/ready")[0] == 200
        assert get(health.port, "/status")[0] == 404
        one.close()
        node.stop()
        assert answer(node, "/ready")[0] == HTTPStatus.SERVICE_UNAVAILABLE  # type: ignore[index]
        health.close()


def test_a_loop_that_stands_still_is_not_healthy(path: Path) -> None:
    node = Node(Settings(path=path, host_gb=0.01))
    node.beat_s -= 3600.0
    assert answer(node, "/health")[0] == HTTPStatus.SERVICE_UNAVAILABLE  # type: ignore[index]
    node.close()


def test_systemd_is_told_when_it_serves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.settimeout(30)
        told.bind(str(path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path / "notify"))
        node = nodes.process(path, "--host-gb", "0.01")
        assert told.recv(100) == b"READY=1"
        os.kill(node.pid, signal.SIGTERM)
        assert told.recv(100) == b"STOPPING=1"
        assert node.wait(30) == 0
