"""The two tiers over a real disk, against plain sets that know which blocks must, may and must not
be there: stored, asked for, leased, reset, closed, killed, opened again with more or less room."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.test_disk import Host, bytes_of, keys

CHAINS, LENGTH = 6, 5
BLOCKS = 16  # tokens of one
N_SLOTS = 14
SMALL, LARGE = 200_000, 800_000  # bytes of disk: fifteen blocks, or all that there are
names = itertools.count()


class Disk(RuleBasedStateMachine):
    """One engine's life after another, over one path."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvmem-machine-"))
        self.generation = 0
        self.put_since_reset: dict[int, int] = dict.fromkeys(range(CHAINS), 0)
        self.leased: dict[str, tuple[int, Any]] = {}
        self.host: Host

    @property
    def root(self) -> Path:
        return self.folder / str(self.generation)

    def open(self, disk_bytes: int) -> None:
        name = f"machine-{os.getpid()}-{next(names)}"
        self.host = Host(name, self.root, n_slots=N_SLOTS, disk_bytes=disk_bytes)
        self.budget = disk_bytes

    @initialize(disk_bytes=st.sampled_from([SMALL, LARGE]))
    def begin(self, disk_bytes: int) -> None:
        self.open(disk_bytes)

    def on_disk(self) -> dict[int, int]:
        moves = self.host.cache._moves
        assert moves is not None
        return {chain: moves.disk.match(keys(LENGTH, chain)) for chain in range(CHAINS)}

    # -- what an engine does -----------------------------------------------------------------

    @rule(chain=st.integers(0, CHAINS - 1), n=st.integers(1, LENGTH), settle=st.booleans())
    def put(self, chain: int, n: int, settle: bool) -> None:
        self.host.put(keys(LENGTH, chain)[:n])
        self.put_since_reset[chain] = max(self.put_since_reset[chain], n)
        if settle:
            self.host.settle()

    @rule(chain=st.integers(0, CHAINS - 1))
    def get(self, chain: int) -> None:
        """Every block that is answered is the right one; `get` compares the bytes."""
        assert self.host.get(keys(LENGTH, chain), "g") <= self.put_since_reset[chain]

    @rule(chain=st.integers(0, CHAINS - 1))
    def lease(self, chain: int) -> None:
        who = f"l{chain}"
        if who not in self.leased:
            self.leased[who] = (chain, self.host.ask(keys(LENGTH, chain), who))

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """What was leased is still what it was, whatever happened meanwhile (I3)."""
        who = data.draw(st.sampled_from(sorted(self.leased)))
        chain, grant = self.leased.pop(who)
        buffer = np.frombuffer(self.host.arena.buffer, np.uint8)
        for part in grant.parts:
            for i, slot in enumerate(part.slots.tolist()):
                key = keys(LENGTH, chain)[part.first + i]
                at = self.host.arena.data_of(slot)
                wanted = bytes_of(key)
                assert (buffer[at : at + len(wanted)] == wanted).all()
        del buffer
        self.host.cache.release(who)

    @rule()
    def forget_host(self) -> None:
        self.host.forget()

    @rule()
    def reset(self) -> None:
        self.host.cache.drop("test")
        self.put_since_reset = dict.fromkeys(range(CHAINS), 0)

    # -- how it ends -------------------------------------------------------------------------

    def end(self) -> None:
        self.leased.clear()
        self.host.close()

    def reopened(self, before: dict[int, int], disk_bytes: int) -> None:
        smaller = disk_bytes < self.budget
        self.open(disk_bytes)
        for chain, n in self.on_disk().items():
            assert n <= self.put_since_reset[chain]  # must not
            assert n >= before[chain] or smaller  # must

    @rule(disk_bytes=st.sampled_from([SMALL, LARGE]))
    def close_and_open(self, disk_bytes: int) -> None:
        self.host.settle()
        before = self.on_disk()
        self.end()
        self.reopened(before, disk_bytes)

    @rule(disk_bytes=st.sampled_from([SMALL, LARGE]))
    def kill_and_open(self, disk_bytes: int) -> None:
        """The files as they are, with writes under way."""
        self.host.cache.settle()
        before = self.on_disk()
        old = self.root
        self.generation += 1
        shutil.copytree(old, self.root)
        self.end()
        shutil.rmtree(old)
        self.reopened(before, disk_bytes)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "host"):
            assert self.host.cache.check_integrity() == []
            used = sum(f.stat().st_size for f in self.host.disk.folder.iterdir() if f.is_file())
            assert used <= self.budget  # I7

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.end()
        shutil.rmtree(self.folder)


TestDisk = Disk.TestCase
TestDisk.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
