"""Engines of a node against a plain set of what was published.

They come, store, ask and go away in the middle of it; what a node holds is what the living hold.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvmem.node import Link, NodeCache
from tests import nodes
from tests.blocks import chain
from tests.unit.test_node import until

PROMPTS = [chain(name, 12) for name in "abc"]
# Two that part from the first in its middle.
PROMPTS += [[*PROMPTS[0][:5], *chain("d", 7)], [*PROMPTS[0][:9], *chain("e", 3)]]
WHICH = st.integers(0, len(PROMPTS) - 1)
ENGINE = st.integers(0, 2)


class NodeMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvmem-machine-"))
        self.stack = ExitStack()
        self.node = self.stack.enter_context(nodes.serving(self.folder, host_gb=0.02))
        self.engines: dict[int, NodeCache] = {}
        self.links: dict[int, Link] = {}
        self.published: set[bytes] = set()
        self.reserved: dict[int, list[tuple[list[bytes], Any]]] = {}
        self.leased: dict[int, set[str]] = {}
        self.number = 0

    def engine(self, at: int) -> NodeCache:
        if at not in self.engines:
            # No flights: who waits for whom is not this machine's question.
            one = self.engines[at] = nodes.client(self.folder, stores=lambda request: False)
            like = msgspec.structs.replace(nodes.hello(), role="worker", token=one.attachment.token)
            self.links[at] = Link(self.folder, like, lambda: None)
            self.reserved[at], self.leased[at] = [], set()
        return self.engines[at]

    def found(self, keys: list[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.published), len(keys))

    @rule(at=ENGINE, which=WHICH, n=st.integers(1, 12))
    def ask(self, at: int, which: int, n: int) -> None:
        keys, one = PROMPTS[which][:n], self.engine(at)
        self.number += 1
        request = f"r{self.number}"
        grant = one.acquire(request, [keys], start=0, limit=n)
        assert grant.stop == self.found(keys)
        assert grant.n_blocks == grant.stop
        self.leased[at].add(request)

    @rule(at=ENGINE, which=WHICH, n=st.integers(1, 12))
    def reserve(self, at: int, which: int, n: int) -> None:
        keys, one = PROMPTS[which][:n], self.engine(at)
        self.number += 1
        room = one.reserve(f"w{self.number}", 0, keys, range(n))
        self.leased[at].add(f"w{self.number}")
        here = self.found(keys)
        index = room.index.tolist()
        pending = {key for rows in self.reserved.values() for k, r in rows for key in k}
        assert set(range(here, n)) - set(index) <= {i for i in range(here, n) if keys[i] in pending}
        if index:
            self.reserved[at].append(([keys[i] for i in index], (room, keys)))

    @precondition(lambda self: any(self.reserved.values()))
    @rule(at=ENGINE, good=st.integers(0, 12))
    def publish(self, at: int, good: int) -> None:
        """Some of a batch is published, the rest given back."""
        if not self.reserved.get(at):
            return
        names, (room, keys) = self.reserved[at].pop(0)
        one = self.engines[at]
        one.abandon(room.slots[good:], room.generations[good:])
        sums = np.ones(len(room.slots[:good]), np.uint64)
        n = one.publish(room.slots[:good], room.generations[:good], sums)
        first = int(room.index[0])
        # What hangs below a block that is not published is not either (I2).
        whole = self.found(keys) >= first
        wanted = min(good, len(names)) if whole else 0
        assert n <= wanted
        there = one.match([keys], 0, len(keys))
        self.published.update(keys[:there])
        assert there >= first + n if n else True

    @rule(at=ENGINE)
    def release(self, at: int) -> None:
        for request in sorted(self.leased.get(at, ())):
            self.engines[at].release(request)
        self.leased[at] = set()

    @precondition(lambda self: self.engines)
    @rule(at=ENGINE)
    def go(self, at: int) -> None:
        """Both halves end, whatever they had."""
        if at in self.engines:
            self.engines.pop(at).close()
            self.links.pop(at).close()
            del self.reserved[at], self.leased[at]

    @invariant()
    def nothing_is_broken(self) -> None:
        for one in self.engines.values():
            assert one.check_integrity() == []
            break

    def teardown(self) -> None:
        try:
            for at in list(self.engines):
                self.go(at)
            hall = self.node.hall
            if hall is not None:
                until(lambda: not hall.engines)
                stats = hall.cache.stats()
                assert (stats["leases"], stats["pending"], stats["orphaned"]) == (0, 0, 0)
                assert stats["published"] == len(self.published)
        finally:
            self.stack.close()
            shutil.rmtree(self.folder)


NodeMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestNodeMachine = NodeMachine.TestCase
