"""What every tier keeps: one suite, over the host's and the disk's blocks alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmem import events
from tests.unit.test_disk import Host, files, keys, place, start

__all__ = ["start"]  # the fixture
MIB = 1 << 20


class Tier:
    """A cache in which only one tier has what was put."""

    def __init__(self, name: str, host: Host) -> None:
        self.name = name
        self.host = host

    def put(self, chain: list[bytes]) -> None:
        self.host.put(chain, demote=self.name == "disk")
        if self.name == "disk":
            self.host.forget()

    def index(self) -> Any:
        cache = self.host.cache
        return cache._tier if self.name == "host" else cache._moves.disk  # type: ignore[union-attr]

    def damage(self, key: bytes, chain: list[bytes]) -> None:
        """A bit of the block, wherever it lies."""
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


@pytest.fixture(params=["host", "disk"])
def tier(request: pytest.FixtureRequest, start: Callable[..., Host]) -> Callable[..., Tier]:
    def make(**options: Any) -> Tier:
        return Tier(request.param, start(**options))

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
    before = one.index().stats()["published"]
    one.put(branch)
    assert one.index().stats()["published"] - before == 4
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
    assert [(e.tier, e.key, e.blocks) for e in told] == [(one.name, chain[at].hex(), 8 - at)]
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
