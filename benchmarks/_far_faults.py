"""What a far store can do wrong, done to a real server while hosts use it: nothing of it may be
answered with other bytes, and nothing may raise."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import redis

from benchmarks._faults import Host
from benchmarks._redis import RedisServer
from kvmem import events
from kvmem.store.far.redis_store import RedisStore

__all__ = ["Found", "run"]

N_CHAINS = 24
TIMEOUT_S = 0.2
MAXMEMORY = "3mb"


class Found:
    """What was seen: `wrong` blocks, `failures` of ours, blocks that were `answered`, faults that
    were `seen` (a tier that went off, a block that was quarantined)."""

    def __init__(self) -> None:
        self.wrong = self.failures = self.answered = self.seen = self.leaked = 0
        self.done: dict[str, int] = {}


def run(folder: Path, rounds: int, seed: int = 1) -> Found:
    """Every fault in each round, in an order of its own, to two hosts on one server."""
    found, draw = Found(), random.Random(seed)
    server = RedisServer(folder, "--maxmemory", MAXMEMORY, "--maxmemory-policy", "noeviction")
    hosts = [_host(folder, server) for _ in range(2)]
    try:
        for _ in range(rounds):
            for name in draw.sample(sorted(FAULTS), len(FAULTS)):
                with contextlib.ExitStack() as after:
                    after.enter_context(FAULTS[name](server, draw))
                    _use(hosts, draw, found)
                _back(hosts)
                _use(hosts, draw, found)
                found.done[name] = found.done.get(name, 0) + 1
        for host in hosts:
            host.settle()
            stats = host.cache.stats()
            found.leaked += stats["leases"] + stats["pending"] + len(host.cache.check_integrity())
            for event in host.bus.recent():
                found.failures += isinstance(event, events.Failure)
                found.seen += isinstance(event, events.Quarantined | events.TierOff)
    finally:
        for host in hosts:
            host.close()
        server.close()
    return found


def _host(folder: Path, server: RedisServer) -> Host:
    host = Host(folder, far=lambda: RedisStore(server.url, timeout_s=TIMEOUT_S))
    _back([host])
    return host


def _use(hosts: list[Host], draw: random.Random, found: Found) -> None:
    """Each stores some prompts and asks for some, its own and the other's."""
    for host in hosts:
        try:
            for _ in range(3):
                host.put(draw.randrange(N_CHAINS))
            host.forget_host()
            for _ in range(4):
                answered, wrong = host.get(draw.randrange(N_CHAINS))
                found.answered += answered
                found.wrong += wrong
                host.forget_host()
        except Exception as error:  # noqa: BLE001 whatever it is, an engine would have met it
            print(f"  failed: {error!r}")
            found.failures += 1


def _back(hosts: list[Host]) -> None:
    """The store is tried again now, and what is remembered of it looked up again."""
    for host in hosts:
        assert host.far is not None
        host.far._retry_at_s = 0.0
        if not host.far.on and host.far._trial is not None:
            host.far._trial.result(30)
        host.far._full_until_s = 0.0
        host.cache._far._known.clear()  # type: ignore[union-attr]


# -- the faults: each until its end ---------------------------------------------------------------


@contextlib.contextmanager
def _killed(server: RedisServer, draw: random.Random) -> Iterator[None]:
    server.kill()
    yield
    server.start()


@contextlib.contextmanager
def _restarted(server: RedisServer, draw: random.Random) -> Iterator[None]:
    server.kill()
    server.start()
    yield


@contextlib.contextmanager
def _hung(server: RedisServer, draw: random.Random) -> Iterator[None]:
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


@contextlib.contextmanager
def _slow(server: RedisServer, draw: random.Random) -> Iterator[None]:
    """Each answer takes most of its time, or a little more than all of it."""
    with _client(server) as client:
        client.execute_command("CLIENT", "PAUSE", int(1e3 * TIMEOUT_S * draw.uniform(0.5, 1.5)))
    yield


@contextlib.contextmanager
def _full(server: RedisServer, draw: random.Random) -> Iterator[None]:
    with _client(server) as client:
        with contextlib.suppress(redis.ResponseError):
            for i in range(1000):
                client.set(f"fill{i}", bytes(50_000))
        yield
        for key in client.scan_iter("fill*"):
            client.delete(key)


@contextlib.contextmanager
def _garbage(server: RedisServer, draw: random.Random) -> Iterator[None]:
    """Noise, cut, longer, of another type, one bit."""
    with _client(server) as client:
        for name in _blocks(client):
            value = client.get(name)
            kind = draw.randrange(8)
            if value is None or kind > 4:
                continue
            with contextlib.suppress(redis.ResponseError):  # it may be full
                if kind == 0:
                    client.set(name, draw.randbytes(len(value)))
                elif kind == 1:
                    client.set(name, value[: draw.randrange(len(value))])
                elif kind == 2:
                    client.set(name, value + b"x")
                elif kind == 3:
                    client.delete(name)
                    client.sadd(name, b"x")
                else:
                    at = draw.randrange(len(value))
                    client.set(name, value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :])
    yield


@contextlib.contextmanager
def _others(server: RedisServer, draw: random.Random) -> Iterator[None]:
    """Each name has another prompt's whole block, as if tenants' bytes had changed places."""
    with _client(server) as client:
        names = [name for name in _blocks(client) if client.type(name) == b"string"]
        values = [client.get(name) for name in names]
        draw.shuffle(values)
        with contextlib.suppress(redis.ResponseError):
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    client.set(name, value)
    yield


@contextlib.contextmanager
def _emptied(server: RedisServer, draw: random.Random) -> Iterator[None]:
    with _client(server) as client:
        client.flushall()
    yield


@contextlib.contextmanager
def _client(server: RedisServer) -> Iterator[redis.Redis]:
    with contextlib.closing(server.client()) as client:
        yield client


def _blocks(client: redis.Redis) -> list[bytes]:
    return [name for name in client.scan_iter("kvmem:*") if not name.endswith(b":mark")]


FAULTS: dict[
    str, Callable[[RedisServer, random.Random], contextlib.AbstractContextManager[None]]
] = {
    "killed": _killed,
    "restarted": _restarted,
    "hung": _hung,
    "slow": _slow,
    "full": _full,
    "garbage": _garbage,
    "others": _others,
    "emptied": _emptied,
}
