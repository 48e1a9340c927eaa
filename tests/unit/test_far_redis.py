"""The far tier on real Redis servers: single, cluster, full, killed, stopped, strange."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks import _far_faults
from benchmarks._redis import RedisServer, binary, cluster
from kvmem import events
from kvmem.store.far import FarStore, check_url
from kvmem.store.far import tier as tier_module
from kvmem.store.far.redis_store import CHUNK_BYTES, RedisStore
from kvmem.types import Move
from tests.unit.test_disk import Host, keys, start
from tests.unit.test_far import CHAIN, far_of, forget_answers, name, put, told, trial

__all__ = ["start"]  # the fixture

if binary() is None:
    if os.environ.get("KVMEM_REQUIRE_REDIS") == "1":
        raise RuntimeError("KVMEM_REQUIRE_REDIS is set and there is no redis-server")
    pytest.skip("there is no redis-server here (Debian: redis-server)", allow_module_level=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    one = RedisServer(tmp_path_factory.mktemp("redis"))
    yield one
    one.close()


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    with contextlib.closing(shared.client()) as client:
        client.flushall()
    return shared


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """A server of this test's own, to be ill-treated."""
    servers: list[RedisServer] = []

    def make(*options: str) -> RedisServer:
        folder = tmp_path / f"server{len(servers)}"
        folder.mkdir()
        servers.append(RedisServer(folder, *options))
        return servers[-1]

    yield make
    for one in servers:
        one.close()


def client(url: str, **environment: str) -> Callable[[], FarStore]:
    return check_url(url, environment)


def blocks(n: int, size: int = 1000) -> list[np.ndarray]:
    draw = np.random.default_rng(5)
    return [draw.integers(0, 256, size, np.uint8) for _ in range(n)]


def fetch(store: FarStore, names: list[bytes], room_bytes: int) -> list[bytes | None]:
    rooms = [np.zeros(room_bytes, np.uint8) for _ in names]
    sizes = store.get(names, rooms)
    return [
        None if size < 0 else room[:size].tobytes() for size, room in zip(sizes, rooms, strict=True)
    ]


def round_trip(store: FarStore, n: int = 40, size: int = 1000) -> None:
    names = [b"t:%d" % i for i in range(n)]
    values = blocks(n, size)
    assert store.exists(names) == [False] * n
    parts = [[b"head", value[:7], value[7:]] for value in values]
    assert store.put(names, parts) == [True] * n
    assert store.exists([*names, b"none"]) == [*[True] * n, False]
    found = fetch(store, [*names, b"none"], size + 4)
    assert found == [*[b"head" + value.tobytes() for value in values], None]
    store.drop(names[:1])
    assert store.exists(names[:2]) == [False, True]
    first = store.mark(b"m", b"1234", replace=False)
    assert first == store.mark(b"m", b"5678", replace=False) == b"1234"
    assert store.mark(b"m", b"5678", replace=True) == b"5678"
    store.close()


def test_values_come_back_from_one_server(server: RedisServer) -> None:
    round_trip(client(server.url)())


def test_values_come_back_from_a_cluster(tmp_path: Path, start: Callable[..., Host]) -> None:
    with cluster(tmp_path) as nodes:
        store = client(nodes[0].url.replace("redis://", "redis+cluster://"))
        round_trip(store())
        host = start(far=store)
        put(host)
        assert host.get(CHAIN) == 6
        held = []
        for node in nodes:
            with contextlib.closing(node.client()) as own_client:
                held.append(int(own_client.dbsize()))
        assert min(held) > 0  # they share the load
        nodes[1].kill()
        forget_answers(host)
        host.cache._tier.clear()
        assert host.get(CHAIN) < 6
        assert len(told(host, events.TierOff)) == 1


@pytest.mark.parametrize("size", [1, CHUNK_BYTES // 3, 2 * CHUNK_BYTES])
def test_values_of_any_size_come_back(server: RedisServer, size: int) -> None:
    store = client(server.url)()
    names, values = [b"a", b"b", b"c", b"d", b"e"], blocks(5, size)
    assert store.put(names, [[value] for value in values]) == [True] * 5
    assert fetch(store, names, size) == [value.tobytes() for value in values]
    store.close()


def test_a_huge_value_fills_its_room_and_no_more(server: RedisServer) -> None:
    with contextlib.closing(server.client()) as other:
        other.set("big", bytes(50 << 20))
        other.set("next", b"next")
    store = client(server.url)()
    rooms = [np.ones(1000, np.uint8), np.ones(1000, np.uint8)]
    sizes = store.get([b"big", b"next"], rooms)
    assert sizes == [1001, 4]  # the server sends no more than that
    assert rooms[1][:4].tobytes() == b"next"
    store.close()


def test_a_broken_connection_is_made_anew(server: RedisServer) -> None:
    store = client(server.url)()
    assert store.exists([b"a"]) == [False]
    with contextlib.closing(server.client()) as other:
        other.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(OSError, match=r"closed|reset|pipe"):
        store.exists([b"a"])
    assert store.exists([b"a"]) == [False]
    store.close()


def test_a_value_of_another_type_is_a_miss(server: RedisServer, start: Callable[..., Host]) -> None:
    host = start(far=client(server.url))
    put(host)
    with contextlib.closing(server.client()) as other:
        other.delete(name(host, CHAIN[2]))
        other.lpush(name(host, CHAIN[2]), "x")
    assert host.get(CHAIN) == 2  # it was known to be there
    assert len(told(host, events.Quarantined)) == 1
    forget_answers(host)
    assert host.get(CHAIN) == 2
    assert far_of(host).on
    put(host)
    assert host.get(CHAIN) == 6


def test_values_stay_as_long_as_ttl_s_says(server: RedisServer, start: Callable[..., Host]) -> None:
    host = start(far=client(f"{server.url}?ttl_s=1000"))
    put(host)
    with contextlib.closing(server.client()) as other:
        key = name(host, CHAIN[0])
        assert 990 <= int(other.ttl(key)) <= 1000
        other.expire(key, 5)
        forget_answers(host)
        assert host.get(CHAIN) == 6  # found again, it stays on
        assert int(other.ttl(key)) > 900
        other.expire(key, 0)
    host.cache._tier.clear()
    forget_answers(host)
    assert host.get(CHAIN) == 0


def test_a_server_without_room_refuses_and_is_read_on(
    own: Callable[..., RedisServer], start: Callable[..., Host]
) -> None:
    server = own("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    host = start(far=client(server.url))
    put(host)
    with contextlib.closing(server.client()) as other:
        for i in range(400):
            with contextlib.suppress(Exception):  # until it is full
                other.set(f"fill{i}", bytes(10_000))
    put(host, keys(20, seed=1))
    assert host.cache.stats()["far"]["refused"] >= 10
    assert far_of(host).on
    assert host.get(CHAIN) == 6


def test_a_server_that_evicts_leaves_prefixes_or_nothing(
    own: Callable[..., RedisServer], start: Callable[..., Host]
) -> None:
    server = own("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru")
    host = start(far=client(server.url))
    for seed in range(30):
        put(host, keys(12, seed))
    forget_answers(host)
    got = []
    for seed in range(30):
        got.append(host.get(keys(12, seed)))
        host.cache._tier.clear()
    assert 0 < sum(got) < 30 * 12  # each compared with what it must be
    assert host.cache.check_integrity() == []


def test_a_password_opens_it_and_a_wrong_one_costs_hits_only(
    own: Callable[..., RedisServer], start: Callable[..., Host]
) -> None:
    server = own("--requirepass", "secret")
    right = start(far=client(server.url, KVMEM_FAR_PASSWORD="secret"))
    put(right)
    assert right.get(CHAIN) == 6
    wrong = start(far=client(server.url, KVMEM_FAR_PASSWORD="guess"))
    named = server.url.replace("://", "://default:guess@")
    assert fetch(client(named, KVMEM_FAR_PASSWORD="secret")(), [b"none"], 8) == [None]
    assert wrong.get(CHAIN) == 0
    (off,) = told(wrong, events.TierOff)
    assert "guess" not in off.error


def test_tls_is_spoken_and_checked(
    tmp_path: Path, own: Callable[..., RedisServer], start: Callable[..., Host]
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    from benchmarks._redis import free_ports

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    (port,) = free_ports(1)
    own(
        "--tls-port", str(port), "--tls-cert-file", str(cert), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(cert), "--tls-auth-clients", "no",
    )  # fmt: skip
    host = start(far=client(f"rediss://localhost:{port}?ssl_ca_certs={cert}"))
    put(host)
    assert host.get(CHAIN) == 6
    stranger = start(far=client(f"rediss://localhost:{port}"))  # nobody vouches for the server
    assert not far_of(stranger).on
    assert stranger.get(CHAIN) == 0


def test_a_killed_server_costs_hits_and_comes_back_empty(
    own: Callable[..., RedisServer], start: Callable[..., Host]
) -> None:
    server = own()
    host = start(far=client(server.url))
    put(host)
    server.kill()
    assert host.get(CHAIN) == 0
    assert len(told(host, events.TierOff)) == 1
    put(host, keys(3, seed=1))
    server.start()
    far_of(host)._retry_at_s = 0.0
    assert trial(far_of(host))
    assert host.get(CHAIN) == 0  # it has no file
    put(host)
    assert host.get(CHAIN) == 6
    assert host.cache.check_integrity() == []
    assert host.cache.stats()["leases"] == 0


def test_however_often_it_failed_a_server_is_found_again(
    own: Callable[..., RedisServer],
) -> None:
    server = own()
    store = RedisStore(server.url)
    server.kill()
    for _ in range(150):  # redis-py makes a hundred connections a pool, those that failed too
        with pytest.raises(OSError, match="No such file"):
            store.exists([b"x"])
    server.start()
    assert store.exists([b"x"]) == [False]
    store.close()


def test_a_server_that_hangs_is_off_within_its_time(
    own: Callable[..., RedisServer], start: Callable[..., Host]
) -> None:
    server = own()
    host = start(far=lambda: RedisStore(server.url, timeout_s=0.2))
    put(host)
    server.signal(signal.SIGSTOP)
    try:
        assert host.get(CHAIN) == 0
        host.put(keys(6, seed=1))
        host.settle()
        assert len(told(host, events.TierOff)) == 1
    finally:
        server.signal(signal.SIGCONT)
    far_of(host)._retry_at_s = 0.0
    assert trial(far_of(host))
    host.cache._tier.clear()
    assert host.get(CHAIN) == 6


def test_a_server_that_is_read_only_is_off_and_says_why(
    own: Callable[..., RedisServer], start: Callable[..., Host]
) -> None:
    server = own("--replicaof", "127.0.0.1 1")
    host = start(far=client(server.url))
    assert not far_of(host).on
    assert "read only" in told(host, events.TierOff)[0].error


def test_the_faults_benchmark_finds_nothing_wrong_and_would_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "right").mkdir()
    found = _far_faults.run(tmp_path / "right", rounds=1)
    assert (found.wrong, found.failures, found.leaked) == (0, 0, 0)
    assert found.answered > 0
    assert found.seen > 0
    real = tier_module.read_head

    def trusting(value: np.ndarray, move: Move, **asked: Any) -> Any:  # whosever block it is
        text = value.tobytes()
        if len(text) < 128:
            return "short"
        return real(value, msgspec.structs.replace(move, key=text[48:80], parent=text[80:112]),
                    **asked)  # fmt: skip

    monkeypatch.setattr(tier_module, "read_head", trusting)
    (tmp_path / "wrong").mkdir()
    assert _far_faults.run(tmp_path / "wrong", rounds=2).wrong > 0
