"""The disk tier on a real disk: what comes back is what went down, or nothing does."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmem import events
from kvmem._core import SlotCopier, xxh3_64
from kvmem.cache import Cache
from kvmem.errors import CapacityError, ConfigError
from kvmem.store import disk as disk_module
from kvmem.store.arena import Arena, sweep
from kvmem.store.disk import RETRY_S, Disk
from kvmem.store.far import Far, FarStore
from kvmem.types import GroupShape

GROUPS = (GroupShape(16),)
SHARE = 10_000  # bytes of a block, a rank; no multiple of anything
NAMESPACE = hashlib.sha256(b"model").digest()
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


def keys(n: int, seed: int = 0) -> list[bytes]:
    return [hashlib.sha256(repr((seed, i)).encode()).digest() for i in range(n)]


def bytes_of(key: bytes, rank: int = 0) -> np.ndarray[Any, Any]:
    """The block of a key: anybody can make it again."""
    draw = np.random.default_rng(int.from_bytes(key[:8], "little") + rank)
    return draw.integers(0, 256, SHARE, np.uint8)


class Host:
    """An arena, a device of 64 blocks a rank, and a cache over the disk at `root`."""

    def __init__(
        self, name: str, root: Path, *, n_slots: int = 32, ranks: int = 1, disk_bytes: int = MIB,
        faults: str = "", clock: Callable[[], float] | None = None, namespace: bytes = NAMESPACE,
        codec: bool = True, far: Callable[[], FarStore] | None = None,
    ) -> None:  # fmt: skip
        self.arena = Arena.create(
            name, n_slots=n_slots, slot_bytes=SHARE, namespace=namespace, ranks=ranks, label="t"
        )
        self.bus = events.Bus()
        more = {"clock": clock} if clock is not None else {}
        self.disk = Disk(
            root, disk_bytes, self.arena, namespace, self.bus, codec=codec, faults=faults, **more
        )
        self.far = Far(far, self.arena, namespace, self.bus) if far is not None else None
        if self.far is not None and self.far._trial is not None:
            self.far._trial.result(30)
        # One of the two below the host: what the far store does is not hidden by the disk.
        mover = self.disk if far is None else None
        # Nor is a busy machine's time: who waits for a far store waits until it answers.
        told = {"clock": lambda: 0.0} if far is not None else {}
        self.cache = Cache(n_slots, GROUPS, mover=mover, carrier=self.far, bus=self.bus, **told)
        self.devices = [np.zeros((64, SHARE), np.uint8) for _ in range(ranks)]
        self.copiers = []
        for rank, device in enumerate(self.devices):
            copier = SlotCopier(np.frombuffer(self.arena.buffer, np.uint8), 1, rank)
            base = np.array([device.ctypes.data], np.uint64)
            width = np.array([SHARE], np.uint64)
            copier.register_layers(base, width, width, 64)
            self.copiers.append(copier)

    def put(self, chain: list[bytes], *, demote: bool = True) -> None:
        room = self.cache.reserve("w", 0, chain, range(len(chain)))
        chosen = [chain[i] for i in room.index.tolist()]
        ids = np.arange(len(chosen), dtype=np.int32)
        total = np.zeros(len(chosen), np.uint64)
        for rank, (device, copier) in enumerate(zip(self.devices, self.copiers, strict=True)):
            for i, key in enumerate(chosen):
                device[i] = bytes_of(key, rank)
            status, sums = copier.store(ids, room.slots, room.generations, b"".join(chosen))
            assert not status.any()
            total ^= sums
        self.cache.publish(room.slots, room.generations, total)
        if demote:
            self.cache.demote(0, chain, range(len(chain)))

    def settle(self) -> None:
        for _ in range(1000):
            below = self.cache.stats()["disk" if self.far is None else "far"]
            if not below["under_way"]:
                return
            self.cache.settle(0.1)
        raise AssertionError("the tier below does not answer")

    def forget(self) -> None:
        """Other prompts take the host's place; their blocks never reach the disk."""
        self.settle()
        self.cache._tier.clear()

    def get(self, chain: list[bytes], who: str = "r") -> int:
        """Blocks that were answered, each compared with what it must be."""
        grant = self.ask(chain, who)
        n = 0
        for part in grant.parts:
            n = len(part.slots)
            wanted = chain[part.first : part.first + n]
            ids = np.arange(n, dtype=np.int32)
            for rank, (device, copier) in enumerate(zip(self.devices, self.copiers, strict=True)):
                device[:] = 0
                status = copier.load(
                    ids, part.slots, part.generations, b"".join(wanted), np.ones(n, np.uint8)
                )
                assert not status.any()
                for i, key in enumerate(wanted):
                    assert (device[i] == bytes_of(key, rank)).all()
        self.cache.release(who)
        return n

    def ask(self, chain: list[bytes], who: str = "r") -> Any:
        for _ in range(1000):
            grant = self.cache.acquire(who, [chain], start=0, limit=16 * len(chain))
            if not grant.coming:
                return grant
            self.cache.settle(0.1)
        raise AssertionError("the request waits for ever")

    def close(self) -> None:
        if self.far is not None:
            self.far.close()
        self.disk.close()
        self.copiers.clear()
        self.arena.close(unlink=True)


@pytest.fixture
def start(new_arena_name: Callable[[], str], tmp_path: Path) -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def start(root: Path | None = None, **options: Any) -> Host:
        hosts.append(Host(new_arena_name(), root or tmp_path / "disk", **options))
        return hosts[-1]

    yield start
    for host in hosts:
        host.close()


def place(host: Host, key: bytes) -> int:
    """Where the block's slot begins in data.kvd (docs/formats.md)."""
    raw = files(host)["table.kvd"].read_bytes()
    unit_bytes = int.from_bytes(raw[24:32], "little")
    (at,) = [at for at in range(4096, len(raw), 128) if raw[at : at + 32] == key]
    return unit_bytes * int.from_bytes(raw[at + 112 : at + 116], "little")


def tried(host: Host) -> bool:
    """Whether the disk is on, after a trial if it is time for one."""
    if host.disk.on:
        return True
    if host.disk._trial is not None:
        host.disk._trial.result(30)
    return host.disk.on


def files(host: Host) -> dict[str, Path]:
    return {path.name: path for path in host.disk.folder.iterdir()}


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_comes_back_is_what_went_down(start: Callable[..., Host], ranks: int) -> None:
    host, chain = start(ranks=ranks), keys(20)
    host.put(chain)
    host.forget()
    assert host.get(chain) == 20
    assert host.cache.stats()["disk"]["read"] == 20
    assert host.cache.check_integrity() == []


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_restart_begins_warm(start: Callable[..., Host], ranks: int) -> None:
    chain, branch = keys(20), [*keys(7), *keys(5, seed=1)]
    first = start(ranks=ranks)
    first.put(chain)
    first.put(branch)
    first.settle()
    first.close()
    second = start(ranks=ranks)
    assert second.cache.stats()["disk"]["restored"] == 25
    assert second.get(branch) == 12
    assert second.get(chain) == 20
    second.put(keys(9, seed=2))  # and goes on where the first one was
    second.forget()
    assert second.get(keys(9, seed=2)) == 9
    assert second.cache.check_integrity() == []


def test_files_are_private_and_within_the_budget(start: Callable[..., Host]) -> None:
    host = start(disk_bytes=200_000)
    for seed in range(8):
        host.put(keys(4, seed))
        host.settle()
    assert host.cache.stats()["disk"]["evictions"] > 0
    assert set(files(host)) == {"lock", "table.kvd", "data.kvd"}
    for path in files(host).values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(host.disk.folder.stat().st_mode) == 0o700
    assert sum(path.stat().st_size for path in files(host).values()) <= 200_000


def test_what_was_evicted_is_not_there_after_a_restart(start: Callable[..., Host]) -> None:
    first = start(disk_bytes=200_000)
    for seed in range(12):
        first.put(keys(4, seed))
        first.settle()
    moves = first.cache._moves
    assert moves is not None
    there = [moves.disk.match(keys(4, seed)) for seed in range(12)]
    assert 0 in there
    first.close()
    second = start(disk_bytes=200_000)
    assert [second.get(keys(4, seed), f"r{seed}") for seed in range(12)] == there


@pytest.mark.parametrize("where", ["key", "namespace", "generation", "payload", "checksum", "all"])
def test_a_flipped_bit_or_a_zeroed_page_is_found(start: Callable[..., Host], where: str) -> None:
    host, chain = start(), keys(6)
    host.put(chain)
    host.forget()
    slot_bytes = host.disk._store.slot_bytes
    at = place(host, chain[3])
    offset = {"key": 16, "namespace": 48, "generation": 8, "payload": 128 + SHARE // 2,
              "checksum": 120, "all": 0}[where]  # fmt: skip
    with files(host)["data.kvd"].open("r+b") as data:
        data.seek(at + offset)
        old = data.read(1)
        data.seek(at + offset)
        data.write(bytes(slot_bytes) if where == "all" else bytes([old[0] ^ 1]))
    assert host.get(chain) == 3
    (told,) = [e for e in host.bus.recent() if isinstance(e, events.Quarantined)]
    assert (told.tier, told.key, told.blocks) == ("disk", chain[3].hex(), 3)
    assert host.get(chain) == 3  # not asked for again
    host.put(chain)
    host.forget()
    assert host.get(chain) == 6


def test_swapped_slots_are_found(start: Callable[..., Host]) -> None:
    host, chain = start(), keys(4)
    host.put(chain)
    host.forget()
    size = host.disk._store.slot_bytes
    one, other = place(host, chain[0]), place(host, chain[2])
    raw = bytearray(files(host)["data.kvd"].read_bytes())
    raw[one : one + size], raw[other : other + size] = (
        raw[other : other + size], raw[one : one + size]
    )  # fmt: skip
    files(host)["data.kvd"].write_bytes(raw)
    assert host.get(chain) == 0


def test_a_truncated_file_is_a_miss(start: Callable[..., Host]) -> None:
    host, chain = start(), keys(6)
    host.put(chain)
    host.forget()
    cut = place(host, chain[3]) + 100
    whole = [place(host, key) < cut - 100 for key in chain]
    os.truncate(files(host)["data.kvd"], cut)
    assert host.get(chain) == whole.index(False)


def test_bytes_that_were_damaged_in_the_host_do_not_reach_the_disk(
    start: Callable[..., Host],
) -> None:
    host, chain = start(), keys(3)
    host.put(chain, demote=False)
    slot = int(host.ask(chain).parts[0].slots[1])
    host.cache.release("r")
    np.frombuffer(host.arena.buffer, np.uint8)[host.arena.data_of(slot) + 5] ^= 1
    host.cache.demote(0, chain, range(3))
    host.forget()
    assert host.get(chain) == 1
    assert host.cache.stats()["disk"]["faults"] == 1


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_to_the_table_is_ever_served(start: Callable[..., Host], seed: int) -> None:
    draw = np.random.default_rng(seed)
    first = start()
    chains = [keys(5, s) for s in range(4)]
    for chain in chains:
        first.put(chain)
    first.settle()
    table = files(first)["table.kvd"]
    first.close()
    raw = bytearray(table.read_bytes())
    records = 4096 + 128 * np.arange(20)
    match seed % 4:
        case 0:  # bits
            for at in draw.integers(4096, 4096 + 20 * 128, 8):
                raw[at] ^= 1 << int(draw.integers(8))
        case 1:  # records in one another's place
            a, b = draw.choice(records, 2, replace=False)
            raw[a : a + 128], raw[b : b + 128] = raw[b : b + 128], raw[a : a + 128]
        case 2:  # cut off
            del raw[int(draw.integers(4096, len(raw))) :]
        case 3:  # zeros
            at = int(draw.choice(records))
            raw[at : at + 256] = bytes(256)
    table.write_bytes(raw)
    second = start()
    answered = [second.get(chain, f"r{i}") for i, chain in enumerate(chains)]
    assert sum(answered) < 20 or seed % 4 == 2
    assert second.cache.check_integrity() == []


@pytest.mark.parametrize("what", ["magic", "version", "checksum", "short"])
def test_a_table_of_another_kind_begins_anew(start: Callable[..., Host], what: str) -> None:
    first, chain = start(), keys(4)
    first.put(chain)
    first.settle()
    table = files(first)["table.kvd"]
    first.close()
    raw = bytearray(table.read_bytes())
    match what:
        case "magic":
            raw[0] ^= 1
        case "version":
            raw[8] = 9
        case "checksum":
            raw[4095] ^= 1
        case "short":
            del raw[100:]
    table.write_bytes(raw)
    second = start()
    assert second.cache.stats()["disk"]["restored"] == 0
    assert second.get(chain) == 0
    second.put(chain)
    second.forget()
    assert second.get(chain) == 4


def test_another_namespace_sees_nothing(start: Callable[..., Host]) -> None:
    first, chain = start(), keys(4)
    first.put(chain)
    first.settle()
    first.close()
    second = start(namespace=bytes(32))
    assert second.get(chain) == 0


def test_two_engines_side_by_side_have_a_store_each(start: Callable[..., Host]) -> None:
    first, second = start(), start()
    assert first.disk.folder != second.disk.folder
    first.put(keys(4))
    first.forget()
    second.put(keys(4))
    second.forget()
    assert (first.get(keys(4)), second.get(keys(4))) == (4, 4)


def test_a_folder_that_was_taken_between_two_steps_is_not_waited_for(
    start: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines that start at the same moment see the same free folder."""
    first = start()
    real, asked = disk_module.claim, []

    def claim(root: Path, namespace: bytes) -> Path:
        asked.append(root)
        return first.disk.folder if len(asked) == 1 else real(root, namespace)

    monkeypatch.setattr(disk_module, "claim", claim)
    second = start()
    assert len(asked) == 2
    assert second.disk.folder != first.disk.folder


def test_a_folder_that_was_removed_between_two_steps_is_made_again(
    start: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = disk_module.claim, []

    def claim(root: Path, namespace: bytes) -> Path:
        folder = real(root, namespace)
        asked.append(folder)
        if len(asked) == 1:
            shutil.rmtree(folder)
        return folder

    monkeypatch.setattr(disk_module, "claim", claim)
    host = start()
    assert len(asked) == 2
    host.put(keys(3))
    host.forget()
    assert host.get(keys(3)) == 3


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("call", ["write", "allocate"])
def test_a_full_disk_is_told_once_and_costs_nothing(start: Callable[..., Host], call: str) -> None:
    clock = Clock()
    host = start(faults=f"fail:{call}:{errno.ENOSPC}:1" if call == "allocate" else
                 f"fail:write:{errno.ENOSPC}:10", clock=clock)  # fmt: skip
    for seed in range(4):
        host.put(keys(5, seed))
        host.settle()
    assert not host.disk.on
    (off,) = [e for e in host.bus.recent() if isinstance(e, events.TierOff)]
    assert (off.tier, off.error) == ("disk", "No space left on device")
    assert host.get(keys(5)) == 5  # the host goes on
    stats = host.cache.stats()
    assert (stats["leases"], stats["disk"]["pending"], stats["disk"]["under_way"]) == (0, 0, 0)
    clock.now = RETRY_S + 1
    assert tried(host)  # a small file can be written
    assert [type(e) for e in host.bus.recent()].count(events.TierOn) == 1


def test_a_disk_that_cannot_be_read_is_a_miss_until_it_can(start: Callable[..., Host]) -> None:
    clock = Clock()
    host, chain = start(faults=f"fail:read:{errno.EIO}:10", clock=clock), keys(3)
    host.put(chain)
    host.forget()
    assert host.get(chain) == 3
    for _ in range(12):
        host.cache._tier.clear()
        host.get(chain)
    assert not host.disk.on
    assert host.get(chain) == 0
    assert host.cache.check_integrity() == []


def test_a_folder_that_vanished_turns_the_disk_off_until_it_is_back(
    start: Callable[..., Host],
) -> None:
    clock = Clock()
    host = start(clock=clock)
    host.disk._failed("Input/output error")
    moved = host.disk.folder.with_name("gone")
    host.disk.folder.rename(moved)
    clock.now = RETRY_S + 1
    assert not tried(host)
    moved.rename(host.disk.folder)
    assert not tried(host)  # not yet
    clock.now += 2 * RETRY_S + 1
    assert tried(host)


def test_a_disk_that_hangs_holds_nobody_up(
    start: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, hangs = Clock(), threading.Event()
    host = start(clock=clock)
    host.disk._failed("Input/output error")
    monkeypatch.setattr(host.disk, "_works", lambda: hangs.wait(60))
    clock.now = RETRY_S + 1
    assert [host.disk.on for _ in range(3)] == [False] * 3
    host.put(keys(4))
    assert host.get(keys(4)) == 4
    hangs.set()
    assert tried(host)


def test_a_budget_without_room_for_a_block_is_refused(start: Callable[..., Host]) -> None:
    with pytest.raises(CapacityError, match=r"disk_gb.*Raise disk_gb"):
        start(disk_bytes=10_000)


def test_a_path_that_is_a_file_is_refused(start: Callable[..., Host], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="disk_path"):
        start(tmp_path / "file")


def test_a_store_that_is_a_link_is_refused(start: Callable[..., Host], tmp_path: Path) -> None:
    host = start()
    folder = host.disk.folder
    host.close()
    (tmp_path / "else").write_bytes(b"mine")
    (folder / "data.kvd").unlink(missing_ok=True)
    (folder / "data.kvd").symlink_to(tmp_path / "else")
    with pytest.raises(ConfigError, match="disk_path"):
        start()
    assert (tmp_path / "else").read_bytes() == b"mine"


WRITER = """
import sys
from pathlib import Path
from tests.unit.test_disk import Host, keys
host = Host(sys.argv[1], Path(sys.argv[2]), faults=sys.argv[3], disk_bytes=400_000)
print("open", flush=True)
for seed in range(1000):
    host.put(keys(4, seed))
    host.settle()
"""
POINTS = ["before_tombstone", "after_tombstone", "after_data", "after_record"]


@pytest.mark.parametrize("n", [1, 2, 9, 47])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_store_opens_with_whole_blocks(
    start: Callable[..., Host], new_arena_name: Callable[[], str], tmp_path: Path,
    point: str, n: int,
) -> None:  # fmt: skip
    root = tmp_path / "disk"
    command = [sys.executable, "-c", WRITER, new_arena_name(), str(root), f"kill:{point}:{n}"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    sweep()  # what the killed one left in /dev/shm
    host = start(disk_bytes=400_000)
    answered = [host.get(keys(4, seed), f"r{seed}") for seed in range(16)]
    # Of n moves at most the last few were under way, four to a prompt.
    written = n - (point != "after_record")
    assert sum(answered) >= min(written, 27) - 4
    assert host.cache.check_integrity() == []


def test_a_torn_write_is_found(start: Callable[..., Host]) -> None:
    host, chain = start(faults="tear:4096:3"), keys(4)
    host.put(chain)
    host.forget()
    assert host.get(chain) < 4
    assert host.cache.stats()["disk"]["faults"] == 1


def test_checksums_are_xxh3(start: Callable[..., Host]) -> None:
    """docs/formats.md: other programs can check a store."""
    host, chain = start(), keys(2)
    host.put(chain)
    host.settle()
    raw = files(host)["table.kvd"].read_bytes()
    assert int.from_bytes(raw[4088:4096], "little") == xxh3_64(raw[:4088])
    for number in range(2):
        record = raw[4096 + 128 * number :][:128]
        assert int.from_bytes(record[120:], "little") == xxh3_64(record[:120]) ^ number
        assert record[:32] == chain[number]
        assert record[32:64] == (chain[number - 1] if number else bytes(32))


def test_nothing_of_a_store_that_is_gone_is_needed(start: Callable[..., Host]) -> None:
    host = start()
    folder = host.disk.folder
    host.close()
    shutil.rmtree(folder)
    assert start().get(keys(2)) == 0


def numbers_of(key: bytes, rank: int = 0) -> np.ndarray[Any, Any]:
    """As bytes_of, but of bf16 numbers around one, as keys and values are."""
    draw = np.random.default_rng(int.from_bytes(key[:8], "little") + rank)
    high = draw.standard_normal(SHARE // 2, np.float32).view(np.uint32) >> 16
    return high.astype(np.uint16).view(np.uint8)


@pytest.mark.parametrize("ranks", [1, 3])
def test_blocks_that_can_be_are_stored_shorter_and_come_back_exact(
    start: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "bytes_of", numbers_of)
    first, chains = start(ranks=ranks), [keys(20, seed) for seed in range(3)]
    first.put(chains[0])
    first.forget()
    if not first.disk._store.codec:
        pytest.skip("this machine has no libzstd.so.1")
    assert first.disk.used_bytes < 0.9 * 20 * first.disk._store.slot_bytes
    assert first.get(chains[0]) == 20
    first.put(chains[1])
    first.settle()
    first.close()
    second = start(ranks=ranks, codec=False)  # reads them, and stores as they are
    assert second.get(chains[1]) == 20
    used = second.disk.used_bytes
    second.put(chains[2])
    second.forget()
    assert second.get(chains[2], "other") == 20
    if second.cache.stats()["disk"]["evictions"] == 0:
        assert second.disk.used_bytes - used == 20 * second.disk._store.slot_bytes
    assert second.cache.check_integrity() == []


def test_a_long_prompt_goes_down_and_comes_up_whole(start: Callable[..., Host]) -> None:
    """Of as many blocks as are never queued at once: what the bound refused would be a hole, and
    all that hangs below it would be gone."""
    host = start(n_slots=1300, disk_bytes=24 * MIB)
    chain = keys(600, 5)
    for first in range(0, 600, 60):  # a device of 64 blocks
        host.put(chain[: first + 60], demote=False)
    host.cache.demote(0, chain, range(600))
    assert host.cache.stats()["disk"]["refused"] <= 600 - 325  # of so many slots a quarter waits
    host.settle()
    host.cache.demote(0, chain, range(600))
    host.forget()
    assert host.cache.stats()["disk"]["written"] == 600
    grant = host.ask(chain)
    assert (grant.stop, grant.from_disk) == (600 * 16, 600 * 16)
    assert host.cache.check_integrity() == []


def test_a_store_of_another_budget_goes_on(start: Callable[..., Host]) -> None:
    first = start(disk_bytes=400_000)
    for seed in range(5):
        first.put(keys(4, seed))
        first.settle()
    first.close()
    larger = start(disk_bytes=800_000)
    assert [larger.get(keys(4, seed), f"r{seed}") for seed in range(5)] == [4] * 5
    larger.close()
    smaller = start(disk_bytes=150_000)
    answered = [smaller.get(keys(4, seed), f"r{seed}") for seed in range(5)]
    assert 0 < sum(answered) < 20
    assert sum(path.stat().st_size for path in files(smaller).values()) <= 150_000


def test_a_full_store_makes_room_and_keeps_what_new_blocks_hang_below(
    start: Callable[..., Host],
) -> None:
    host = start(disk_bytes=200_000)  # fifteen blocks
    chain = keys(12)
    for n in (3, 6, 9, 12):
        host.put(chain[:n])
        host.settle()
        host.put(keys(3, seed=n))
        host.settle()
    host.forget()
    assert host.get(chain) == 12
    assert host.cache.stats()["disk"]["evictions"] > 0
    assert host.cache.check_integrity() == []
