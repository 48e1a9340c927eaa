"""The order "agents" over real tiers: the policy names whose ends go, the index lets them go.

    a prompt is looked up ──▶ used: the tree of prompts, the policy's rooms, the duel with LRU
    room is needed        ──▶ make_room: the ends of the branches worth least are cut (I2, I3)

The tier is the truth. A `LiveRoom` is the policy's table of it, by runs of blocks, and is put right
where the two are found to differ: blocks that were leased, never stored, quarantined, or evicted by
LRU. Whatever is not cut here the tier's own order, LRU, evicts when it must: so does it all while
LRU leads the duel, and for good once anything in here has failed, which costs one event (I9).

Thread safety: one thread, the one of the `Cache`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from kvmem import events
from kvmem._core import HostTier
from kvmem.policy import Agents, Room, Tree
from kvmem.policy.agents import SPARE

__all__ = ["Keeping", "LiveRoom", "Ref"]

log = logging.getLogger("kvmem")

T = TypeVar("T")

# A branch, and how often its number was given up before: those of forgotten ones are used again.
Ref = tuple[int, int]
KEY_BYTES = 32
# The tree remembers so many blocks for each slot: the room, LRU's, and what was evicted.
TREE_SLOTS = 6
MOST_SPARE = 4096  # blocks
PUT_RIGHT = 2  # leaves that are looked at for each prompt while LRU leads
TOUCHED = 4  # blocks that are retained, for each that needs room
STRANGERS = 16  # blocks of no known prompt may have such a share of the slots


class LiveRoom(Room):
    """What a tier has of the tree's runs, as far as is known; a cut is one of the tier itself."""

    def __init__(self, tree: Tree, tier: HostTier, capacity: int) -> None:
        super().__init__(tree, capacity)
        self._tree, self._tier = tree, tier
        self.wanted = 0  # slots that are to become free
        self.gone: list[int] = []  # those that did
        self.n_cut = 0
        self.spared: Counter[int] = Counter()  # runs of requests under way

    def excess(self, to: int) -> int:
        """Slots that are still wanted."""
        return self.wanted - len(self.gone)

    def cut(self, run: int, n: int) -> int | None:
        """As in a `Room`; a block that is leased, or has others below it, stays."""
        if run in self.spared:
            return None  # its blocks are leased, or not stored yet
        present, slots = self._tier.cut(self._view(run), n)
        self.gone += slots.tolist()
        self.n_cut += len(slots)
        return self._known(run, present - len(slots))

    def refresh(self, run: int) -> int:
        """How much of a leaf is there. REQUIRES: nothing is known to be below it."""
        if self.here[run] and run not in self.spared:
            present, _ = self._tier.cut(self._view(run), 0)
            self._known(run, present)
        return self.here[run]

    def _view(self, run: int) -> Any:
        return np.frombuffer(self._tree.keys(run), np.uint8)

    def _known(self, run: int, n: int) -> int | None:
        n = min(n, self.forest.sizes[run])
        if n > self.here[run]:
            self.used += n - self.here[run]
            self.here[run] = n
        return super().cut(run, self.here[run] - n) if n < self.here[run] else None


class _Tier:
    """Plain LRU, as the tier does it by itself."""

    def used(self, path: Sequence[int], now_s: float) -> None:
        """The tier was told by `acquire`."""

    def make_room(self) -> None:
        """The tier makes it when it must."""

    def split(self, upper: int) -> None:
        """The tier knows blocks, not runs."""


class Keeping:
    """See the module.

    Args:
        tier: the host's index, whose order is LRU.
        n_slots: its slots.
        bus: where it is told that the policy is off.
        clock: seconds.
        block_tokens: of a block.
    """

    def __init__(
        self,
        tier: HostTier,
        n_slots: int,
        bus: events.Bus,
        clock: Callable[[], float],
        *,
        block_tokens: int = 1,
    ) -> None:
        self._tier, self._bus, self.clock = tier, bus, clock
        self.off = ""  # why
        self.n_slots, self.block_tokens = n_slots, block_tokens
        self._tree = Tree(TREE_SLOTS * n_slots, self._needed)
        self.room = LiveRoom(self._tree, tier, n_slots)
        # Worths are asked for so many blocks at once.
        self._spare = max(n_slots // SPARE, min(n_slots // 128, MOST_SPARE))
        self.agents = Agents(self.room, lambda room: _Tier(), spare=self._spare)
        self._tree.watch(self.agents)
        self._rooms = [self.room]
        self._requests: dict[str, tuple[Ref, int]] = {}  # and at which run they end
        self._given_up: dict[int, int] = {}  # by branch
        self.agents.keeper.on_forget = self._forgotten
        self.n_untracked = 0
        self._unsure: list[int] = []  # leaves that LRU may have taken

    def add_disk(self, tier: HostTier, n_records: int) -> None:
        """The tier below, whose ends are cut likewise."""
        disk = LiveRoom(self._tree, tier, n_records)
        self._rooms.append(disk)
        self.agents.also.append(disk)

    # -- what happens ------------------------------------------------------------------------

    def used(self, request_id: str, keys: Sequence[Any], agent: str | None = None) -> Ref | None:
        """A prompt was looked up, and all of it will be here; its branch, None where it is not
        known. Asked again for a request, it is one use."""
        if request_id in self._requests:
            return self._requests[request_id][0]
        return self._safely(lambda: self._used(request_id, keys, agent), None)

    def _used(self, request_id: str, keys: Sequence[Any], agent: str | None) -> Ref | None:
        hits = self._tier.match(keys) if keys else 0  # type: ignore[arg-type]
        path = self._tree.path(keys)
        if path is None:
            self.n_untracked += bool(keys)
            return None
        now_s = self.clock()
        self.room.fill(path, now_s)
        branch = self.agents.used(path, hits, now_s, agent)
        if self.agents.duel.second:
            self._put_right_some()  # LRU evicts meanwhile
        ref = self.ref(branch)
        self._requests[request_id] = (ref, path[-1])
        for room in self._rooms:
            room.spared[path[-1]] += 1
        return ref

    def replied(self, request_id: str, keys: Sequence[Any]) -> None:
        """The request's reply is part of what its branch has here."""
        self._safely(lambda: self._replied(request_id, keys), None)

    def _replied(self, request_id: str, keys: Sequence[Any]) -> None:
        ref, _ = self._requests.get(request_id, (None, 0))
        if ref is None or not self.is_known(ref):
            return
        path = self._tree.path(keys)
        if path is not None:
            self.agents.extended(ref[0], path, self.clock())

    def over(self, request_id: str) -> None:
        """The request holds nothing any more."""
        _, run = self._requests.pop(request_id, (None, -1))
        for room in self._rooms if run >= 0 else ():
            room.spared[run] -= 1
            if not room.spared[run]:
                del room.spared[run]

    def make_room(self, keys: Sequence[Any], start: int, n: int) -> None:
        """Before `n` slots are reserved for blocks of `keys` from `start` on."""
        if self.off or n <= self._tier.free():
            return
        if self.agents.keeper.n_retained:
            self._safely(lambda: self._keep_young(TOUCHED * n), None)
        if not self.agents.duel.second:
            self._safely(lambda: self._make_room(keys, start, n), None)

    def _keep_young(self, n: int) -> None:
        """LRU, which may lead or come to lead, finds what is retained among its newest: some `n`
        blocks of it, a branch after the other, so that all have had their turn before LRU comes to
        the first one again (they are half of the slots at most)."""
        keeper, now_s = self.agents.keeper, self.clock()
        for _ in range(keeper.n_retained):
            branch = keeper.next_retained(now_s)
            if branch is None or n <= 0:
                return
            keys = self._packed(self.ref(branch))
            n -= len(keys) // KEY_BYTES
            lease, *_ = self._tier.acquire(keys, 0, len(keys) // KEY_BYTES)
            if lease:
                self._tier.release(lease)

    def _make_room(self, keys: Sequence[Any], start: int, n: int) -> None:
        # I3: what they are about to hang below does not go meanwhile.
        above, *_ = (
            self._tier.acquire(keys, start - 1, start, use=False)  # type: ignore[arg-type]
            if start
            else (0,)
        )
        try:
            wanted = n - self._tier.free() + self._spare
            strangers = int(self._tier.stats()["published"]) - self.room.used
            if strangers > self.n_slots // STRANGERS:
                wanted -= len(self._tier.evict(min(wanted, strangers)))
            self._trim(self.room, wanted)
        finally:
            if above:
                self._tier.release(above)

    def choose_on_disk(self, n: int) -> list[int]:
        """Cuts up to n blocks of the disk's tier; whose records they were."""
        return [] if self._plain else self._safely(lambda: self._trim(self._rooms[1], n), [])

    def _trim(self, room: LiveRoom, wanted: int) -> list[int]:
        room.wanted, room.gone = wanted, []
        if wanted > 0:
            self.agents.trim(room, self.clock(), 0)
        return room.gone

    def dropped(self) -> None:
        """Nothing is here any more: what is known of it is put right bit by bit."""
        self._safely(self._put_right, None)

    # -- branches ----------------------------------------------------------------------------

    def ref(self, branch: int) -> Ref:
        """The branch, for later."""
        return branch, self._given_up.get(branch, 0)

    def is_known(self, ref: Ref) -> bool:
        """Whether it is still the same branch."""
        return not self.off and self._given_up.get(ref[0], 0) == ref[1]

    def expect(self, ref: Ref) -> None:
        """All of the branch is on its way to the host."""
        self.room.fill(self._path(ref), self.clock())

    def _path(self, ref: Ref) -> list[int]:
        path, run = [], self.agents.keeper.run_of(ref[0]) if self.is_known(ref) else -1
        while run >= 0:
            path.append(run)
            run = self._tree.parents[run]
        return path[::-1]

    def n_blocks(self, ref: Ref) -> int:
        """Blocks of a branch, from the root on; 0 where it is no more."""
        return sum(self._tree.sizes[run] for run in self._path(ref))

    def waits(self, ref: Ref, kind: str) -> None:
        """What the branch waits for, as an orchestrator says."""
        if self.is_known(ref):
            self.agents.waits(ref[0], kind, self.clock())

    def retain(self, ref: Ref, for_s: float, weight: float) -> None:
        """The branch is to outlast those that nobody asked for; the heavier ones longest."""
        if self.is_known(ref):
            self.agents.keeper.retain(ref[0], self.clock() + for_s, weight)

    def let_go(self, ref: Ref) -> None:
        """It is worth what its returns say again."""
        if self.is_known(ref):
            self.agents.keeper.let_go(ref[0])

    def chain(self, ref: Ref) -> list[bytes]:
        """The keys of all blocks of a branch, from the root on."""
        whole = self._packed(ref)
        return [whole[i : i + KEY_BYTES] for i in range(0, len(whole), KEY_BYTES)]

    def _packed(self, ref: Ref) -> bytes:
        return b"".join(bytes(self._tree.keys(run)) for run in self._path(ref))

    def n_own(self, ref: Ref) -> int:
        """How many blocks at the branch's end are part of no other one."""
        own, path = 0, self._path(ref)
        for below, run in enumerate(reversed(path)):
            shared = below and self.agents.keeper.ends_at(run)
            if shared or self._tree.n_children(run) > min(below, 1):
                break
            own += self._tree.sizes[run]
        return own

    def cut_branch(self, ref: Ref) -> int:
        """Cuts what is the branch's alone from the host; how many blocks went."""
        room, run = self.room, self.agents.keeper.run_of(ref[0])
        room.wanted, room.gone = self.n_slots, []
        while run in room.leaves:
            above = room.cut(run, self._tree.sizes[run])
            if above is None or self.agents.keeper.ends_at(above):
                break
            run = above
        return len(room.gone)

    # -- the whole ---------------------------------------------------------------------------

    @property
    def leads(self) -> str:
        """Who decides now: "agents" or "lru"."""
        return "lru" if self._plain else "agents"

    @property
    def _plain(self) -> bool:
        return bool(self.off) or self.agents.duel.second

    def stats(self) -> dict[str, Any]:
        """Who leads, how often that changed, blocks cut, what is known."""
        return {
            "leads": self.leads,
            "off": self.off,
            "switches": self.agents.duel.switches,
            "cut": self.room.n_cut,
            "branches": self.agents.keeper.n_branches,
            "runs": self._tree.n_runs,
            "tree_blocks": self._tree.n_blocks,
            "untracked": self.n_untracked,
        }

    def switch_off(self, why: str) -> None:
        """From now on it is LRU, and nothing is kept in here."""
        if not self.off:
            self.off = why or "?"
            log.warning("kvmem: the order agents is off, blocks leave by LRU: %s", why)
            self._bus.emit(events.PolicyOff(error=why))

    # -- inside ------------------------------------------------------------------------------

    def _safely(self, do: Callable[[], T], otherwise: T) -> T:
        if self.off:
            return otherwise
        try:
            return do()
        except Exception as error:  # I9: advice only: the tier evicts by LRU without it
            log.exception("kvmem: the policy failed")
            self.switch_off(f"{type(error).__name__}: {error}")
            return otherwise

    def _forgotten(self, branch: int) -> None:
        self._given_up[branch] = self._given_up.get(branch, 0) + 1

    def _needed(self, run: int) -> int:
        for room in self._rooms:
            room.refresh(run)
        return max(room.here[run] for room in self.agents.rooms)

    def _put_right_some(self) -> None:
        """A few leaves a prompt: all of them at once would hold the engine up."""
        if not self._unsure:
            self._unsure = list(self.room.leaves)
        for run in self._unsure[-PUT_RIGHT:]:
            if run in self.room.leaves and not self.room.refresh(run):
                above = self._tree.parents[run]
                if above in self.room.leaves:
                    self.room.refresh(above)
        del self._unsure[-PUT_RIGHT:]

    def _put_right(self) -> None:
        for room in self._rooms:
            leaves = list(room.leaves)
            while leaves:
                run = leaves.pop()
                if not room.refresh(run):
                    above = self._tree.parents[run]
                    if above in room.leaves:
                        leaves.append(above)
