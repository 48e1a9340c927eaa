"""One cache: the verbs that join the index, the store and the policy.

    acquire   how much of a prompt is here, held so that it stays
    reserve   room for blocks that are about to be computed
    publish   what was written and acknowledged becomes visible (I4)
    release   a request is over
    demote    what was published is copied to the disk and to a far store, where there are such
    drop      everything leaves matching

A `Cache` serves one namespace. A prompt comes as one list of keys for each KV-cache group of the
model. Full-attention groups are chains, each block below its parent (I2); the blocks of windows
and states are each by themselves, and a prompt can be resumed only where all that its groups read
there is here. What only the disk or a far store has is promised to nobody: `acquire` begins to
bring it up and answers "not yet" until the host has it, checked. A `Cache` never touches KV bytes:
it hands out slots, and who copies reads each slot's identity back (I1). Calls come from one thread,
the engine's scheduler; `stats()` may be called from any.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from kvmem import events
from kvmem._core import HostTier
from kvmem.cache.far import Carrier, FarMoves
from kvmem.cache.keeping import Keeping
from kvmem.cache.moves import PATIENCE_S, Mover, Moves, Promotion
from kvmem.cache.sessions import Sessions
from kvmem.types import GroupShape, Quarantine

__all__ = ["Cache", "Grant", "Part", "Reservation"]

Slots = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]
# Of 32 bytes each. The engine's own list is handed on as it is, and no list[BlockHash] is a
# list[bytes] to a type checker.
Keys = list[Any]
# Blocks that failed a check and are told of; of as many the bytes are kept, where that is no more
# than a sixteenth of the slots.
N_QUARANTINED = 16


class Part(msgspec.Struct, frozen=True):
    """One group's blocks of a grant: block `first + i` of the prompt lies in `slots[i]`."""

    group: int
    first: int
    slots: Slots
    generations: Words


class Grant(msgspec.Struct, frozen=True):
    """What `acquire` answers: the prompt can be resumed after `stop` tokens, of which the caller
    has `start`.

    `parts` are what is to be loaded for that, none where `stop == start`; they stay valid until
    the request's `release`. `missing` says why the prompt can't be resumed further on ("none"
    where there is nothing further).

    `coming`: more of it is on its way up from the disk or a far store; ask again. `from_disk` are
    tokens that came up for this request, in `disk_s` seconds; `from_far` and `far_s` are a far
    store's. `epoch` is `Cache.epoch` as it was.
    """

    start: int
    stop: int
    parts: tuple[Part, ...]
    missing: str
    coming: bool = False
    from_disk: int = 0
    disk_s: float = 0.0
    from_far: int = 0
    far_s: float = 0.0
    epoch: int = 0

    @property
    def n_blocks(self) -> int:
        """Blocks of all groups together."""
        return sum(len(part.slots) for part in self.parts)


class Below(Protocol):
    """What tiers below the host have, as far as the host's own blocks and theirs go together."""

    def match(self, keys: Keys, start: int) -> int:
        """Blocks of the longest prefix."""

    def has(self, key: bytes) -> bool:
        """Whether there is a block that stands by itself."""


class Reservation(msgspec.Struct, frozen=True):
    """What `reserve` answers: `slots[i]` is for block `index[i]` of the prompt.

    Blocks that are here already are left out. `refused` blocks found no room. `epoch` is
    `Cache.epoch` as it was.
    """

    index: Slots
    slots: Slots
    generations: Words
    refused: int
    epoch: int = 0


class _Held:
    """The leases of one request: one a chain, by group, and one for each block by itself.

    `used`: some of its prompt was here.
    """

    __slots__ = ("chains", "single", "used")

    def __init__(self) -> None:
        self.chains: dict[int, int] = {}
        self.single: list[int] = []
        self.used = False


class Cache:
    """The host tier of one namespace behind kvmem's verbs.

    Args:
        n_slots: blocks the host tier holds (I7).
        groups: the model's KV-cache groups, in the engine's order.
        eviction: "s3fifo", "lru" or "agents".
        bus: where events go.
        mover: the disk below, if there is one.
        carrier: the far store, if there is one.
        clock: seconds, for how long a request waits for them.
    """

    def __init__(
        self,
        n_slots: int,
        groups: Sequence[GroupShape],
        *,
        eviction: str = "s3fifo",
        bus: events.Bus | None = None,
        mover: Mover | None = None,
        carrier: Carrier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bus = bus if bus is not None else events.Bus()
        self.groups = tuple(groups)
        # Slots, generations and leases mean something within one epoch: a cache of this process's
        # own has one, a node's client a new one with each node.
        self.epoch = 0
        # Prompts are resumed between blocks of every group.
        self.align_tokens = math.lcm(*(shape.block_tokens for shape in self.groups))
        order = "lru" if eviction == "agents" else eviction
        self._tier = HostTier(n_slots, order, keep=min(N_QUARANTINED, n_slots // 16))
        self._quarantined: deque[Quarantine] = deque(maxlen=N_QUARANTINED)
        # Told of the keys of blocks that were evicted, 32 bytes each: from which tier, for whom.
        self.on_evicted: Callable[[bytes, str, str], None] | None = None
        # Requests that have used what is here, or stored it.
        self._held: dict[str, _Held] = {}
        self._evictions_told = 0
        self._clock = clock
        self._moves: Moves | None = None
        if mover is not None:
            self._moves = Moves(
                self._tier, mover, self.groups, self.bus, order=order, on_evicted=self._evicted
            )
        self._far: FarMoves | None = None
        if carrier is not None:
            self._far = FarMoves(self._tier, carrier, self.groups, self.bus, clock)
        # The order "agents", where that is asked for.
        self.keeping = self._keeping_of(n_slots) if eviction == "agents" else None
        self.sessions = Sessions(
            self.keeping, self._tier, self._moves, self.bus, self._clock, eviction
        )
        # Requests that wait for the disk.
        self._promotions: dict[str, Promotion] = {}

    def _keeping_of(self, n_slots: int) -> Keeping:
        keeping = Keeping(
            self._tier, n_slots, self.bus, self._clock, block_tokens=self.groups[0].block_tokens
        )
        if len(self.groups) > 1 or not self.groups[0].closed:
            keeping.switch_off("the model's KV is not one chain of blocks")
        elif self._moves is not None:
            keeping.add_disk(self._moves.disk, self._moves.n_records)
            self._moves.choose = keeping.choose_on_disk
            self._moves.make_room = keeping.make_room
        return keeping

    # -- reading -----------------------------------------------------------------------------

    def acquire(self, request_id: str, chains: Sequence[Keys], *, start: int, limit: int) -> Grant:
        """What is needed to resume the prompt as far on as can be, leased until `release`.

        Idempotent for a request: asked again, it answers for the state of now, holds the leases
        of one answer and counts as one use of the prefix. What is granted was found again after
        it was held, so it is here (I3).

        Args:
            request_id: who holds the leases.
            chains: the prompt's block keys of each group, 32 bytes each.
            start: tokens the caller has already, whole blocks.
            limit: tokens the caller can use at most.
        """
        limit = max(start, limit - limit % self.align_tokens)
        coming = self._bring_up(request_id, chains, start, limit)
        if coming is not None:
            return coming
        far = self._far
        if far is not None and far.coming(request_id, chains, start, limit, self.match):
            return Grant(start, start, (), "coming", coming=True)
        promotion = self._promotions.get(request_id)
        grant = self._grant(request_id, chains, start, limit)
        near = grant.stop
        if far is not None:
            from_far, far_s, reach = far.told(request_id, start, grant.stop)
            near = grant.stop if reach is None else min(grant.stop, reach)
            grant = msgspec.structs.replace(grant, from_far=from_far, far_s=far_s)
        if promotion is None or self._moves is None:
            return grant
        if promotion.took_s is None:
            promotion.took_s = self._clock() - promotion.begun_s
            self._moves.give_up(promotion)  # its leases held what came up until now
        from_disk = max(0, near - max(start, promotion.host_stop))
        return msgspec.structs.replace(grant, from_disk=from_disk, disk_s=promotion.took_s)

    def _bring_up(
        self, request_id: str, chains: Sequence[Keys], start: int, limit: int
    ) -> Grant | None:
        """The answer "not yet" while more of the prompt is on its way up from the disk."""
        if self._moves is None:
            return None
        self._moves.poll()
        promotion = self._promotions.get(request_id)
        if promotion is None:
            host_stop = self.match(chains, start, limit)
            stop = self.match(chains, start, limit, self._moves)
            if stop <= host_stop:
                return None
            promotion = Promotion(self._clock(), host_stop)
            for group, (shape, keys) in enumerate(zip(self.groups, chains, strict=True)):
                first = max(start // shape.block_tokens, shape.first_needed(stop))
                self._moves.promote(promotion, group, keys, first, stop // shape.block_tokens)
            self._promotions[request_id] = promotion
        # Once only: where the host has no room for all of it, it would be asked for for ever.
        late = self._clock() - promotion.begun_s > PATIENCE_S
        if promotion.took_s is not None or late or not promotion.reads:
            return None
        return Grant(start, start, (), "coming", coming=True)

    def _grant(self, request_id: str, chains: Sequence[Keys], start: int, limit: int) -> Grant:
        held = self._held.get(request_id)
        stop = self.match(chains, start, limit)
        fresh = _Held()
        try:
            parts = self._lease(fresh, chains, start, stop, use=held is None)
            missing = "none" if stop >= limit else self._why_not(chains, stop)
        except BaseException:
            self._let_go(fresh)
            raise
        if parts is None:
            self._let_go(fresh)
            stop, parts, missing, fresh = start, (), "evicted", _Held()
        if held is not None:
            self._let_go(held)
        if fresh.used or held is not None:
            self._held[request_id] = fresh
        return Grant(start, stop, parts, missing)

    def match(
        self, chains: Sequence[Keys], start: int, limit: int, below: Below | None = None
    ) -> int:
        """The last point up to `limit` after which every group has all it reads; else `start`.

        In the host, and with `below` on the disk too. No use of what is there, and no promise
        beyond the call: `acquire` is both.
        """
        stop = limit
        for shape, keys in zip(self.groups, chains, strict=True):
            if shape.closed:
                known = min(start // shape.block_tokens, len(keys))
                n_blocks = self._tier.match(keys, known)
                if below is not None:
                    n_blocks = max(n_blocks, below.match(keys, known))
                stop = min(stop, n_blocks * shape.block_tokens)
        singles = [(s, k) for s, k in zip(self.groups, chains, strict=True) if not s.closed]
        while True:
            stop -= stop % self.align_tokens
            if stop <= start:
                return start
            before = stop
            for shape, keys in singles:
                stop = self._single_resume_point(shape, keys, start, stop, below)
            if stop == before:
                return stop

    def look(self, chains: Sequence[Keys], *, start: int, limit: int) -> tuple[int, int, str]:
        """What `acquire` would find, without asking for it: how far the host alone answers, how far
        host and disk do, and why no further. Nothing is used, held or read. Any thread may look.
        """
        limit = max(start, limit - limit % self.align_tokens)
        host = self.match(chains, start, limit)
        stop = max(host, self.match(chains, start, limit, self._moves))
        return host, stop, "none" if stop >= limit else self._why_not(chains, stop)

    def prefix(self, packed: bytes) -> tuple[int, int]:
        """How many of a chain's blocks, its keys one behind the other, are on the host, and how
        many on the disk, from its first on. Nothing is used, held or read. Any thread may look.

        REQUIRES: one group, closed.
        """
        below = self._moves.match(packed, 0) if self._moves is not None else 0
        return self._tier.match(packed), below

    def _single_resume_point(
        self, shape: GroupShape, keys: Keys, start: int, stop: int, below: Below | None
    ) -> int:
        low, end = start // shape.block_tokens, stop // shape.block_tokens
        while end > low:
            first = max(low, shape.first_needed(end * shape.block_tokens))
            # [first, end)  must be here; a gap is in the reach of every point down to itself
            blocks = range(end - 1, first - 1, -1)
            gap = next((i for i in blocks if not self._has(keys[i], below)), None)
            if gap is None:
                return end * shape.block_tokens
            end = gap
        return start

    def _has(self, key: bytes, below: Below | None) -> bool:
        return self._tier.match([key]) == 1 or (below is not None and below.has(key))

    def _lease(
        self, held: _Held, chains: Sequence[Keys], start: int, stop: int, *, use: bool
    ) -> tuple[Part, ...] | None:
        """Leases what resuming after `stop` needs beyond `start`; None if some of it is gone."""
        parts = []
        for group, (shape, keys) in enumerate(zip(self.groups, chains, strict=True)):
            low, end = start // shape.block_tokens, stop // shape.block_tokens
            if shape.closed:
                part = self._lease_chain(held, group, keys, low, end, use=use)
            else:
                first = shape.first_needed(stop)
                if stop == start:
                    self._use(keys[first:end], use=use)
                    continue
                part = self._lease_singles(held, group, keys, max(low, first), end, use=use)
            if part is None:
                return None
            if len(part.slots):
                parts.append(part)
        return tuple(parts)

    def _lease_chain(
        self, held: _Held, group: int, keys: Keys, low: int, end: int, *, use: bool
    ) -> Part | None:
        lease, n, slots, generations = self._tier.acquire(keys, low, end, use=use)
        held.used = held.used or n > 0
        if lease:
            held.chains[group] = lease
        return None if n < end and end > low else Part(group, low, slots, generations)

    def _lease_singles(
        self, held: _Held, group: int, keys: Keys, first: int, end: int, *, use: bool
    ) -> Part | None:
        slots, generations = np.empty(end - first, np.int32), np.empty(end - first, np.uint64)
        for i in range(end - first):
            lease, n, slot, generation = self._tier.acquire([keys[first + i]], 0, 1, use=use)
            if n == 0:
                return None
            held.used = True
            held.single.append(lease)
            slots[i], generations[i] = slot[0], generation[0]
        return Part(group, first, slots, generations)

    def _use(self, keys: Keys, *, use: bool) -> None:
        """The caller has these blocks: that is a use of ours, if they are here."""
        for key in keys if use else ():
            lease, *_ = self._tier.acquire([key], 0, 1)
            if lease:
                self._tier.release(lease)

    def _why_not(self, chains: Sequence[Keys], stop: int) -> str:
        """Why the prompt is not resumed beyond `stop`: what the chains say comes first."""
        pairs = zip(self.groups, chains, strict=True)
        for shape, keys in sorted(pairs, key=lambda pair: not pair[0].closed):
            reason = self._tier.why(keys[stop // shape.block_tokens])
            if reason != "published":
                known = reason != "unknown"
                return reason if known else ("new" if shape.closed else "no_boundary")
        return "no_boundary"

    def fate(self, group: int, key: bytes) -> str:
        """What became of a block: "unknown", "published", "pending", "evicted", "quarantined",
        "cleared", "abandoned"; "demoted": the disk has it, "tier_off": a disk that is off."""
        host = self._tier.why(key)
        if self._moves is None or host == "published":
            return host
        return self._moves.fate(key, host)

    def hold(self, request_id: str, group: int, keys: Keys, n_blocks: int) -> None:
        """Extends the request's lease to the deepest published block of `keys[:n_blocks]`.

        No use of them: what a request stores is used when another one asks for it. Blocks by
        themselves are not held: nothing that this request will store hangs below them.
        """
        if not self.groups[group].closed:
            return
        held = self._held.get(request_id)
        lease = held.chains.get(group, 0) if held is not None else 0
        if lease:
            self._tier.extend(lease, keys, n_blocks)
        else:
            lease, *_ = self._tier.acquire(keys, 0, n_blocks, use=False)
            if lease:
                self._held.setdefault(request_id, _Held()).chains[group] = lease

    def lease_chain(self, keys: Keys, first: int, stop: int) -> tuple[int, Slots, Words]:
        """Blocks [first, stop) of a chain, or as many of them as are here, held for no request: a
        lease for `release_chain` and where they lie; 0 and nothing where there are none.

        No use of them. REQUIRES: one group, closed.
        """
        stop = min(stop, self._tier.match(keys))
        if stop > first:
            lease, n, slots, generations = self._tier.acquire(keys, first, stop, use=False)
            if n >= stop:
                return lease, slots, generations
            if lease:
                self._tier.release(lease)
        return 0, np.empty(0, np.int32), np.empty(0, np.uint64)

    def release_chain(self, lease: int) -> None:
        """Ends a lease of `lease_chain`."""
        self._tier.release(lease)

    # -- writing -----------------------------------------------------------------------------

    def reserve(
        self, request_id: str, group: int, keys: Keys, blocks: Sequence[int]
    ) -> Reservation:
        """Room for those of a group's blocks that are not here, invisible until `publish`.

        Args:
            request_id: for the event, when there is no room.
            group: which group's.
            keys: the prompt's keys in that group.
            blocks: which blocks, rising; of a full-attention group, all up to the last of them.
        """
        if self.groups[group].closed:
            stop = blocks[-1] + 1
            start = self._tier.match(keys[:stop])
            if self.keeping is not None:
                self.keeping.make_room(keys, start, stop - start)
            index, slots, generations, reason = self._tier.reserve(keys, start, stop)
            reached = int(index[-1]) + 1 if len(index) else start
            refused = stop - reached if reason else 0
        else:
            index, slots, generations, refused = self._reserve_singles(keys, blocks)
            reason = "no_room"
        try:
            if refused:
                self.bus.emit(events.Refused(request_id=request_id, blocks=refused, reason=reason))
            self._tell_evictions(request_id)
            return Reservation(index, slots, generations, refused)
        except BaseException:
            self._tier.abandon(slots, generations)
            raise

    def _reserve_singles(
        self, keys: Keys, blocks: Sequence[int]
    ) -> tuple[Slots, Slots, Words, int]:
        got: list[tuple[int, int, int]] = []
        refused = 0
        for i in blocks:
            index, slots, generations, reason = self._tier.reserve([keys[i]], 0, 1)
            refused += bool(reason)
            if len(index):
                got.append((i, int(slots[0]), int(generations[0])))
        return (
            np.array([i for i, _, _ in got], np.int32),
            np.array([slot for _, slot, _ in got], np.int32),
            np.array([generation for _, _, generation in got], np.uint64),
            refused,
        )

    def publish(self, slots: Slots, generations: Words, checksums: Words) -> int:
        """Makes acknowledged blocks visible, parents first; the answer is how many (I4)."""
        return self._tier.publish(slots, generations, checksums)

    def demote(self, group: int, keys: Keys, blocks: Sequence[int], *, codec: int = 0) -> None:
        """Begins to copy published blocks to the disk and the far store; nothing where there are
        none.

        `codec`: one of `kvmem.types.INT8_CODECS` where these keys may answer approximately (I10);
        such go to no far store.
        """
        if self._moves is not None:
            self._moves.demote(group, keys, blocks, codec)
        if self._far is not None and not codec:
            self._far.demote(group, keys, blocks)

    def abandon(self, slots: Slots, generations: Words) -> int:
        """Gives reserved slots back unwritten, with what was reserved on top of them."""
        return self._tier.abandon(slots, generations)

    def shed(self, keys: Keys | bytes, n: int) -> Slots:
        """Evicts up to n of a prompt's blocks from the host, from its end, leased ones not; whose
        slots they were."""
        slots = self._tier.cut(keys, n)[1]
        self._tell_evictions("")
        return slots

    def published(self, first: int, n: int) -> tuple[Slots, Words, Any]:
        """Blocks in the host's slots [first, first + n) now: slots, generations, keys [n * 32].

        Any thread may ask; they may move on at any time.
        """
        return self._tier.published(first, n)

    def quarantine(self, slot: int, generation: int, *, key: bytes, reason: str) -> int:
        """Takes a block that failed a check, and all its descendants, out of matching (I5).

        Its own bytes stay in the slot to be looked at, as long as there is room (I7).
        """
        blocks = self._tier.quarantine(slot, generation)
        if blocks:  # else somebody was quicker, and told of it
            self._quarantined.append(
                Quarantine(
                    slot=slot,
                    generation=generation,
                    key=key.hex(),
                    reason=reason,
                    blocks=blocks,
                    at_s=time.time(),
                )
            )
        self.bus.emit(events.Quarantined(key=key.hex(), blocks=blocks, reason=reason))
        return blocks

    def distrust(self, slot: int, generation: int, *, key: bytes, reason: str) -> int:
        """As `quarantine`, of a block that was stored wrong: its checksum holds, so the disk would
        bring it back. Blocks that stand by themselves do not say what they were computed from:
        where a model has such, everything goes."""
        blocks = self.quarantine(slot, generation, key=key, reason=reason)
        if not all(shape.closed for shape in self.groups):
            return blocks + self.drop(reason)
        if self._far is not None:
            self._far.forget()  # what hangs below a block there nobody can tell
        if self._moves is not None:
            below = self._moves.distrust(key)
            if below:
                self.bus.emit(
                    events.Quarantined(key=key.hex(), blocks=below, reason=reason, tier="disk")
                )
        return blocks

    def quarantined(self) -> list[Quarantine]:
        """The last blocks that failed a check, oldest first, and whose bytes are still there."""
        if not self._quarantined:
            return []
        slots, generations = self._tier.kept()
        there = set(zip(slots.tolist(), generations.tolist(), strict=True))
        return [
            msgspec.structs.replace(one, kept=(one.slot, one.generation) in there)
            for one in list(self._quarantined)
        ]

    # -- ending ------------------------------------------------------------------------------

    def release(self, request_id: str) -> None:
        """Ends the request's leases; a request without any is fine."""
        promotion = self._promotions.pop(request_id, None)
        if promotion is not None and self._moves is not None:
            self._moves.give_up(promotion)
        if self._far is not None:
            self._far.release(request_id)
        held = self._held.pop(request_id, None)
        if held is not None:
            self._let_go(held)
        if self.keeping is not None:
            self.keeping.over(request_id)

    def _let_go(self, held: _Held) -> None:
        for lease in (*held.chains.values(), *held.single):
            self._tier.release(lease)

    def drop(self, reason: str) -> int:
        """Nothing that was published or reserved so far answers any more; leases live on."""
        blocks = self._tier.clear()
        if self._moves is not None:
            self._moves.drop()
        if self._far is not None:
            self._far.forget()
        if self.keeping is not None:
            self.keeping.dropped()
            self.sessions.dropped()
        self.bus.emit(events.Cleared(blocks=blocks, reason=reason))
        return blocks

    # -- the tiers below ---------------------------------------------------------------------

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk or a far store below, working or not."""
        return self._moves is not None or self._far is not None

    @property
    def waits_for_disk(self) -> bool:
        """Whether a request does, for the disk or the far store."""
        far = self._far is not None and self._far.waits
        return far or any(promotion.reads for promotion in self._promotions.values())

    @property
    def below_under_way(self) -> tuple[int, int]:
        """Moves to or from the disk and the far store that are not over."""
        disk = self._moves.n_under_way if self._moves is not None else 0
        return disk, self._far.n_under_way if self._far is not None else 0

    def computes(self, s_per_token: float) -> None:
        """Tells how long the engine takes to compute a token, 0 where that is not known: a far
        store is waited for only where it is quicker."""
        if self._far is not None:
            self._far.s_per_token = s_per_token

    def settle(self, seconds: float = 0.0) -> None:
        """Takes in moves between the tiers that are over; waits so long at most for those that
        requests wait for."""
        self.sessions.expire()
        if self._far is not None:
            if seconds and (self._far.waits or (self._moves is None and self._far.n_under_way)):
                self._far.wait(seconds)
                seconds = 0.0
            self._far.poll()
        if self._moves is not None:
            if seconds:
                self._moves.wait(seconds)
            self._moves.poll()

    # -- the whole ---------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counts of slots, blocks, leases and evictions; under "disk" and "far" those of the tiers
        below."""
        more: dict[str, Any] = {"disk": self._moves.stats()} if self._moves is not None else {}
        if self._far is not None:
            more["far"] = self._far.stats()
        if self.keeping is not None:
            more["policy"] = {**self.keeping.stats(), **self.sessions.stats()}
        return {**self._tier.stats(), **more}

    def check_integrity(self) -> list[str]:
        """What is broken of I2, I3, I7 and the counts; empty when all holds."""
        below = self._moves.disk.check_integrity() if self._moves is not None else []
        return [*self._tier.check_integrity(), *(f"disk: {line}" for line in below)]

    def _tell_evictions(self, request_id: str) -> None:
        evictions = int(self._tier.stats()["evictions"])
        if evictions > self._evictions_told:
            n = evictions - self._evictions_told
            self.bus.emit(events.Evicted(blocks=n, request_id=request_id))
            self._evictions_told = evictions
            self._evicted(self._tier.take_evicted(), "host", request_id)

    def _evicted(self, keys: bytes, tier: str, request_id: str) -> None:
        if self.on_evicted is not None:
            self.on_evicted(keys, tier, request_id)
