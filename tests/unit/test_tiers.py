"""What every tier keeps: one suite, over the host's, the disk's and the far stores' blocks alike.

A far store has no index of its own and no eviction that kvmem decides on; the rest is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._redis import RedisServer, binary
from kvmem import events
from kvmem.store.far import FarStore, check_url
from kvmem.store.far.value import name_of
from tests.far_stores import MemoryStore
from tests.unit.test_disk import SHARE, Host, files, keys, place, start

__all__ = ["start"]  # the fixture
MIB = 1 << 20


class Tier:
    """A cache in which only one tier has what was put."""

    def __init__(self, name: str, host: Host, store: FarStore | None = None) -> None:
        self.name = name
        self.host = host
        self.store = store

    def put(self, chain: list[bytes]) -> None:
        self.host.put(chain, demote=self.name != "host")
        if self.name != "host":
            self.host.forget()

    def index(self) -> Any:
        cache = self.host.cache
        return cache._tier if self.name == "host" else cache._moves.disk  # type: ignore[union-attr]

    def n_stored(self) -> int:
        """Blocks that it has."""
        if self.store is not None:
            return int(self.host.cache.stats()["far"]["written"])
        return int(self.index().stats()["published"])

    def damage(self, key: bytes, chain: list[bytes]) -> None:
        """A bit of the block, wherever it lies."""
        if self.store is not None:
            name = self.name_of(key)
            room = np.empty(10 * SHARE, np.uint8)
            (size,) = self.store.get([name], [room])
            room[999] ^= 4
            assert self.store.put([name], [[room[:size]]]) == [True]
            return
        if self.name == "disk":
            path = files(self.host)["data.kvd"]
            raw = bytearray(path.read_bytes())
            raw[place(self.host, key) + 128 + 999] ^= 4
            path.write_bytes(raw)
            return
        grant = self.host.ask(chain, "d")
        slot = int(grant.parts[0].slots[chain.index(key)])
        self.host.cache.release("d")
        data = np.frombuffer(self.host.arena.buffer, np.uint8)
        data[self.host.arena.data_of(slot) + 999] ^= 4

    def name_of(self, key: bytes) -> bytes:
        """Of a far block."""
        far = self.host.far
        assert far is not None
        return name_of(far._namespace, far._mark, 0, key)

    def get(self, chain: list[bytes]) -> int:
        """Blocks answered, each compared; a block that the copier refuses is quarantined, as the
        engine's worker has it done."""
        host = self.host
        while True:
            grant = host.ask(chain, "g")
            n = 0
            for part in grant.parts:
                n = len(part.slots)
                status = host.copiers[0].load(
                    np.arange(n, dtype=np.int32), part.slots, part.generations,
                    b"".join(chain[:n]), np.ones(n, np.uint8),
                )  # fmt: skip
                bad = np.flatnonzero(status)
                if len(bad):
                    at = int(bad[0])
                    host.cache.release("g")
                    host.cache.quarantine(
                        int(part.slots[at]), int(part.generations[at]), key=chain[at],
                        reason="checksum",
                    )  # fmt: skip
                    break
            else:
                host.cache.release("g")
                return host.get(chain, "h") if n else 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if binary() is None:
        pytest.skip("there is no redis-server here (Debian: redis-server)")
    one = RedisServer(tmp_path_factory.mktemp("redis"))
    yield one
    one.close()


@pytest.fixture(params=["host", "disk", "far", "redis"])
def tier(request: pytest.FixtureRequest, start: Callable[..., Host]) -> Callable[..., Tier]:
    def make(**options: Any) -> Tier:
        if request.param in ("host", "disk"):
            return Tier(request.param, start(**options))
        store: FarStore = MemoryStore()
        if request.param == "redis":
            server = request.getfixturevalue("server")
            with contextlib.closing(server.client()) as client:
                client.flushall()
            store = check_url(server.url, {})()
        return Tier("far", start(far=lambda: store, **options), store)

    return make


def test_what_comes_back_is_what_was_put(tier: Callable[..., Tier]) -> None:
    one = tier()
    one.put(keys(20))
    assert one.get(keys(20)) == 20
    assert one.host.cache.check_integrity() == []


def test_a_prefix_is_shared_and_a_branch_is_not(tier: Callable[..., Tier]) -> None:
    one, trunk = tier(), keys(10)
    branch = [*trunk[:6], *keys(4, seed=1)]
    one.put(trunk)
    assert one.get(branch) == 6
    before = one.n_stored()
    one.put(branch)
    assert one.n_stored() - before == 4
    assert (one.get(branch), one.get(trunk)) == (10, 10)


def test_a_key_alone_is_nothing_without_its_parents(tier: Callable[..., Tier]) -> None:
    one, chain = tier(), keys(8)
    one.put(chain)
    assert one.get(chain[3:]) == 0


@pytest.mark.parametrize("at", [0, 4, 7])
def test_a_damaged_block_is_a_miss_with_all_below_it(tier: Callable[..., Tier], at: int) -> None:
    one, chain = tier(), keys(8)
    one.put(chain)
    one.damage(chain[at], chain)
    assert one.get(chain) == at
    told = [e for e in one.host.bus.recent() if isinstance(e, events.Quarantined)]
    # Nobody can tell what a far store has below it.
    blocks = 8 - at if one.store is None else 1
    assert [(e.tier, e.key, e.blocks) for e in told] == [(one.name, chain[at].hex(), blocks)]
    one.put(chain)  # stored anew it answers
    assert one.get(chain) == 8
    assert one.host.cache.check_integrity() == []


def test_a_reset_leaves_nothing(tier: Callable[..., Tier]) -> None:
    one = tier()
    one.put(keys(8))
    one.host.cache.drop("test")
    assert one.get(keys(8)) == 0
    one.put(keys(8))
    assert one.get(keys(8)) == 8


# A far store's own rules say what leaves it.
@pytest.mark.parametrize("tier", ["host", "disk"], indirect=True)
def test_a_full_tier_lets_go_of_leaves_and_stays_within_its_budget(
    tier: Callable[..., Tier],
) -> None:
    one = tier(n_slots=12, disk_bytes=200_000)  # fifteen blocks on the disk
    for seed in range(12):
        one.put(keys(5, seed))
    index = one.index()
    assert index.stats()["evictions"] > 0
    assert index.stats()["published"] <= (12 if one.name == "host" else 15)
    for seed in range(12):
        n = one.get(keys(5, seed))  # a prefix, whatever went
        assert 0 <= n <= 5
    assert one.host.cache.check_integrity() == []
    on_disk = sum(f.stat().st_size for f in Path(one.host.disk.folder).iterdir() if f.is_file())
    assert on_disk <= 200_000


def test_what_a_request_holds_is_not_let_go_of(tier: Callable[..., Tier]) -> None:
    one, held = tier(n_slots=12, disk_bytes=200_000), keys(5)
    one.put(held)
    grant = one.host.ask(held, "holds")
    assert grant.stop == 16 * 5
    for seed in range(1, 12):
        one.host.put(keys(5, seed))
        one.host.settle()
    assert one.host.get(held, "again") == 5
    one.host.cache.release("holds")
    assert one.host.cache.stats()["leases"] == 0
