"""LMCache's L2 adapters as far stores, and kvmem's disk as one of LMCache's; in LMCache's own
environment only (`make test-lmcache`)."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._redis import RedisServer, binary, free_ports
from kvmem import events
from kvmem.errors import ConfigError
from kvmem.store.far import check_url
from tests.unit.test_disk import Host, keys, start

__all__ = ["start"]  # the fixture

if importlib.util.find_spec("lmcache") is None:
    pytest.skip("LMCache is in an environment of its own", allow_module_level=True)
# It takes longer to import than a store is waited for here.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its libraries' own, about their own insides
    importlib.import_module("lmcache.v1.distributed.l2_adapters")
    importlib.import_module("lmcache.v1.memory_management")
pytestmark = pytest.mark.filterwarnings("ignore")
CHAIN = keys(6)


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What an adapter imports takes longer, once, than a store is waited for here."""
    folder = tmp_path_factory.mktemp("first")
    check_url(f'lmcache:{{"type": "fs_native", "base_path": "{folder}"}}', {})().close()


@pytest.fixture(params=["fs_native", "fs", "valkey"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    if request.param != "valkey":
        yield {"type": request.param, "base_path": str(tmp_path / "lmcache")}
        return
    if importlib.util.find_spec("glide_sync") is None:
        pytest.skip("there is no valkey-glide-sync here")
    if binary() is None:
        pytest.skip("there is no redis-server here")
    server = RedisServer(tmp_path, port=free_ports(1)[0])
    yield {"type": "valkey", "startup_nodes": f"127.0.0.1:{server.port}"}
    server.close()


def test_blocks_come_back_equal_and_other_hosts_find_them(
    config: dict[str, Any], start: Callable[..., Host]
) -> None:
    make = check_url(f"lmcache:{json.dumps(config)}", {})
    one = start(far=make)
    assert one.far is not None
    assert one.far.on, one.bus.recent()
    one.put(CHAIN)
    one.forget()
    assert one.get(CHAIN) == 6  # each compared, byte for byte
    other = start(far=make)
    assert other.get(CHAIN) == 6
    assert other.get(keys(3, seed=1)) == 0  # nothing waits for what is not there
    one.cache.drop("test")
    assert one.get(CHAIN) == 0
    assert one.cache.stats()["leases"] == 0


def test_a_damaged_file_is_a_miss(tmp_path: Path, start: Callable[..., Host]) -> None:
    folder = tmp_path / "lmcache"
    host = start(far=check_url(f'lmcache:{{"type": "fs_native", "base_path": "{folder}"}}', {}))
    host.put(CHAIN)
    host.forget()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 8000:
            raw = bytearray(path.read_bytes())
            raw[5000] ^= 1
            path.write_bytes(raw)
    assert host.get(CHAIN) == 0
    assert [e.tier for e in host.bus.recent() if isinstance(e, events.Quarantined)] == ["far"] * 6
    host.put(CHAIN)
    host.forget()
    assert host.get(CHAIN) == 6


@pytest.mark.parametrize(
    "config",
    [{"type": "resp", "host": "127.0.0.1", "port": 1}, {"type": "none"}, {"type": "fs_native"}],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    config: dict[str, Any], start: Callable[..., Host]
) -> None:
    with pytest.raises(ConfigError, match="can't be used"):
        check_url(f"lmcache:{json.dumps(config)}", {})()


def test_lmcaches_own_benchmark_verifies_kvmems_disk(tmp_path: Path) -> None:
    config = {
        "type": "plugin",
        "module_path": "kvmem.engines.lmcache_l2",
        "class_name": "KvmemL2Adapter",
        "adapter_params": {"path": str(tmp_path / "disk"), "disk_gb": 0.25, "object_mb": 0.25},
    }
    lmcache = shutil.which("lmcache", path=str(Path(sys.executable).parent))
    assert lmcache is not None
    done = subprocess.run(
        [lmcache, "bench", "l2", "--no-skip-verify", "--rounds", "2", "--in-flight", "2",
         "--lookup-max-hit-rate", "0.5", "--l2-adapter", json.dumps(config)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Actual hit rate:" in done.stdout


def test_objects_are_there_after_a_restart_and_damage_is_seen(tmp_path: Path) -> None:
    from lmcache.v1.distributed.api import ObjectKey

    from kvmem.engines.lmcache_l2 import KvmemL2Adapter
    from kvmem.store.far.lmcache_store import _object

    params = {"path": str(tmp_path / "disk"), "disk_gb": 0.1, "object_mb": 0.125}
    names = [ObjectKey(chunk_hash=bytes([i]) * 16, model_name="m", kv_rank=0) for i in range(5)]
    draw = np.random.default_rng(3)
    values = [draw.integers(0, 256, 100_000, np.uint8) for _ in names]

    def load(adapter: KvmemL2Adapter) -> list[bool]:
        rooms = [np.zeros(100_000, np.uint8) for _ in names]
        task = adapter.submit_load_task(names, [_object(room) for room in rooms])
        found = until(lambda: adapter.query_load_result(task))
        for i, (room, value) in enumerate(zip(rooms, values, strict=True)):
            assert not found.test(i) or (room == value).all()
        return [bool(found.test(i)) for i in range(len(names))]

    adapter = KvmemL2Adapter(params)
    task = adapter.submit_store_task(names, [_object(value.copy()) for value in values])
    result = until(lambda: adapter.pop_completed_store_tasks().get(task))
    assert (result.is_successful(), result.bytes_transferred()) == (True, 500_000)
    assert load(adapter) == [True] * 5
    adapter.close()
    (data,) = (tmp_path / "disk").rglob("data.kvd")
    raw = bytearray(data.read_bytes())
    at = raw.find(values[2][:64].tobytes())
    assert at > 0
    raw[at + 50_000] ^= 1
    data.write_bytes(raw)
    adapter = KvmemL2Adapter(params)
    assert load(adapter) == [True, True, False, True, True]
    adapter.close()


def until(ask: Callable[[], Any]) -> Any:
    for _ in range(3000):
        found = ask()
        if found is not None:
            return found
        threading.Event().wait(0.01)
    raise AssertionError("no answer")


@pytest.mark.parametrize(
    "params", [{}, {"path": "x", "disk_gb": 1, "object_mb": 0}, {"path": "x", "disk": 1}]
)
def test_parameters_that_mean_nothing_are_refused(params: dict[str, Any]) -> None:
    from kvmem.engines.lmcache_l2 import KvmemL2Adapter

    with pytest.raises(ConfigError):
        KvmemL2Adapter(params)
