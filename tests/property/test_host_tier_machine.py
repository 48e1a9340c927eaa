"""The host tier against a plain-dict model that knows what must hold, not what is evicted.

Which block leaves is the order's business; that it was an unleased leaf, that no more left than had
to, and that nobody's slot was given away is checked here after every step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvmem._core import HostTier, eviction_orders
from tests.blocks import chain

N_SLOTS = 9
DEPTH = 6
SHARED = [chain("shared 0", 3), chain("shared 1", 1)]


def _prompt(i: int) -> list[bytes]:
    base = SHARED[i % 2]
    return base + chain(f"prompt {i}", DEPTH - len(base), base[-1])


PROMPTS = [_prompt(i) for i in range(6)]
ALL_KEYS = list(dict.fromkeys(key for prompt in PROMPTS for key in prompt))
PARENT = {key: prompt[i - 1] if i else None for prompt in PROMPTS for i, key in enumerate(prompt)}
prompts = st.sampled_from(PROMPTS)
depths = st.integers(0, DEPTH)


@dataclass
class Batch:
    """Reserved slots whose writer has not reported; keys[j] went to slots[j]."""

    keys: list[bytes]
    slots: np.ndarray
    generations: np.ndarray


@dataclass
class Lease:
    prompt: list[bytes]
    depth: int
    condemned: bool
    path: set[int] = field(default_factory=set)  # the slots of blocks [0, depth)


class HostTierMachine(RuleBasedStateMachine):
    order = ""
    keep = 0
    batches = Bundle("batches")

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(N_SLOTS, self.order, self.keep)
        self.failed: set[tuple[int, int]] = set()  # slot, generation of what was quarantined itself
        self.published: dict[bytes, tuple[int, int]] = {}  # key -> slot, generation
        self.pending: dict[bytes, tuple[int, int]] = {}
        self.writing: dict[int, int] = {}  # slot -> generation: reserved, not reported
        self.leases: dict[int, Lease] = {}
        self.sums: dict[tuple[int, int], int] = {}
        self.fate: dict[bytes, str] = {}
        self.last_generation: dict[int, int] = {}

    # --- the model ---

    def _held(self) -> set[int]:
        return set().union(*(lease.path for lease in self.leases.values()))

    def _kept(self) -> list[int]:
        """Slots of blocks that failed a check, which nobody uses and nobody else has yet."""
        slots, generations = self.tier.kept()
        pairs = list(zip(slots.tolist(), generations.tolist(), strict=True))
        assert set(pairs) <= self.failed
        held = self._held()
        return [slot for slot, _ in pairs if slot not in held]

    def _used(self) -> set[int]:
        published = {slot for slot, _ in self.published.values()}
        return published | self._held() | set(self.writing) | set(self._kept())

    def _here(self, key: bytes | None) -> bool:
        return key is None or key in self.published or key in self.pending

    def _matched(self, prompt: list[bytes]) -> int:
        n = 0
        while n < len(prompt) and prompt[n] in self.published:
            n += 1
        return n

    def _below(self, key: bytes) -> list[bytes]:
        """The key and every cached key below it."""
        found = [key]
        for candidate in ALL_KEYS:  # parents stand before children
            if PARENT[candidate] in found and candidate not in found and self._here(candidate):
                found.append(candidate)
        return found

    def _forget(self, keys: list[bytes], fate: str) -> None:
        for key in keys:
            self.pending.pop(key, None)
            if key in self.published:
                slot, _ = self.published.pop(key)
                for lease in self.leases.values():
                    lease.condemned |= slot in lease.path and lease.prompt[lease.depth - 1] == key
            self.fate[key] = fate

    def _evictable(self, spared: bytes | None) -> list[bytes]:
        parents = {PARENT[key] for key in (*self.published, *self.pending)}
        held = self._held()
        return [
            key
            for key, (slot, _) in self.published.items()
            if key not in parents and slot not in held and key != spared
        ]

    # --- the verbs ---

    def _reserve(self, prompt: list[bytes], start: int, stop: int) -> Batch:
        had_room = N_SLOTS - len(self._used())
        used = self._used()
        leased_before, kept_before = self._held(), set(self._kept())
        missing = [i for i in range(start, stop) if not self._here(prompt[i])]
        index, slots, generations, reason = self.tier.reserve(prompt, start, stop)
        if start > 0 and not self._here(prompt[start - 1]):
            assert (reason, len(index)) == ("no_parent", 0)
            return Batch([], slots, generations)
        assert index.tolist() == missing[: len(index)]
        assert reason == ("" if len(index) == len(missing) else "no_room")
        gone = [key for key in self.published if self.tier.why(key) != "published"]
        given_back = kept_before - set(self._kept())
        # No more than had to leave, and of what is kept only what no other room could be made for.
        assert len(gone) + len(given_back) == max(0, len(index) - had_room)
        for key in gone:
            assert self.published[key][0] not in leased_before  # I3
            assert key not in prompt[:stop]  # its own ancestors
        freed = {self.published[key][0] for key in gone} | given_back
        self._forget(gone, "evicted")
        for i, slot, generation in zip(
            index.tolist(), slots.tolist(), generations.tolist(), strict=True
        ):
            assert slot not in used - freed  # I3: it was nobody's
            assert generation > self.last_generation.get(slot, 0)
            self.last_generation[slot] = generation
            self.pending[prompt[i]] = (slot, generation)
            self.writing[slot] = generation
        assert not given_back or not self._evictable(None)
        if reason == "no_room":
            assert not self._kept()
            first_left = missing[len(index)]
            spared = prompt[first_left - 1] if first_left else None
            assert len(self._used()) == N_SLOTS
            assert not self._evictable(spared)
        return Batch([prompt[i] for i in index.tolist()], slots, generations)

    def _report(self, batch: Batch, picked: list[int], publish: bool) -> None:
        slots, generations = batch.slots[picked], batch.generations[picked]
        sums = generations * np.uint64(1000) + slots.astype(np.uint64)
        n_published = 0
        for j in picked:
            key, slot, generation = batch.keys[j], int(batch.slots[j]), int(batch.generations[j])
            del self.writing[slot]
            if self.pending.get(key) != (slot, generation):
                continue  # an orphan
            if publish and (PARENT[key] is None or PARENT[key] in self.published):
                self.published[key] = self.pending.pop(key)
                self.sums[slot, generation] = generation * 1000 + slot
                self.fate.pop(key, None)
                n_published += 1
            else:
                self._forget(self._below(key), "abandoned")
        if publish:
            assert self.tier.publish(slots, generations, sums) == n_published
        else:
            assert self.tier.abandon(slots, generations) == len(picked)

    @rule(prompt=prompts, stop=depths)
    def put(self, prompt: list[bytes], stop: int) -> None:
        batch = self._reserve(prompt, 0, stop)
        self._report(batch, list(range(len(batch.keys))), publish=True)

    @rule(prompt=prompts, first=depths, more=depths, n=st.integers(0, DEPTH + 1))
    def cut(self, prompt: list[bytes], first: int, more: int, n: int) -> None:
        """Somebody else than the order chooses: only the end of a piece goes, leaf by leaf."""
        piece = prompt[first : first + more]
        wanted = []
        while len(wanted) < n:
            at = len([key for key in piece if key in self.published]) - 1 - len(wanted)
            if at < 0 or piece[at] not in self._evictable_but(wanted):
                break
            wanted.append(piece[at])
        slots_of = [self.published[key][0] for key in wanted]
        here = sum(key in self.published for key in piece)
        present, slots = self.tier.cut(piece, n)
        assert (present, slots.tolist()) == (here, slots_of)
        self._forget(wanted, "evicted")

    def _evictable_but(self, gone: list[bytes]) -> list[bytes]:
        """As if these had left already."""
        parents = {PARENT[key] for key in (*self.published, *self.pending) if key not in gone}
        held = self._held()
        return [
            key
            for key, (slot, _) in self.published.items()
            if key not in gone and key not in parents and slot not in held
        ]

    @rule(target=batches, prompt=prompts, start=depths, more=depths)
    def reserve(self, prompt: list[bytes], start: int, more: int) -> Batch:
        return self._reserve(prompt, start, min(DEPTH, start + more))

    @rule(batch=consumes(batches), publish=st.booleans(), data=st.data())
    def report(self, batch: Batch, publish: bool, data: st.DataObject) -> None:
        everything = list(range(len(batch.keys)))
        shuffled = data.draw(st.one_of(st.just(everything), st.permutations(everything)))
        cut = data.draw(st.integers(0, len(shuffled)))
        self._report(batch, shuffled[:cut], publish)
        self._report(batch, shuffled[cut:], not publish)

    @rule(batch=consumes(batches))
    def report_twice(self, batch: Batch) -> None:
        self._report(batch, list(range(len(batch.keys))), publish=True)
        assert self.tier.publish(batch.slots, batch.generations, batch.generations) == 0
        assert self.tier.abandon(batch.slots, batch.generations) == 0

    @rule(prompt=prompts, start=depths, limit=depths, use=st.booleans())
    def acquire(self, prompt: list[bytes], start: int, limit: int, use: bool) -> None:
        n_expected = min(self._matched(prompt), limit)
        lease, n, slots, generations = self.tier.acquire(prompt, start, limit, use=use)
        assert n == n_expected
        promised = list(zip(slots.tolist(), generations.tolist(), strict=True))
        assert promised == [self.published[key] for key in prompt[start:n]]
        assert (lease != 0) == (n > start)
        if lease:
            path = {self.published[key][0] for key in prompt[:n]}
            self.leases[lease] = Lease(prompt, n, False, path)

    @rule(data=st.data(), n=depths)
    def extend(self, data: st.DataObject, n: int) -> None:
        if not self.leases:
            return
        number = data.draw(st.sampled_from(sorted(self.leases)))
        lease = self.leases[number]
        self.tier.extend(number, lease.prompt, n)
        depth = min(self._matched(lease.prompt), n)
        if not lease.condemned and depth > lease.depth:
            lease.depth = depth
            lease.path = {self.published[key][0] for key in lease.prompt[:depth]}

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if not self.leases:
            return
        number = data.draw(st.sampled_from(sorted(self.leases)))
        self.tier.release(number)
        del self.leases[number]

    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        if not self.published:
            return
        key = data.draw(st.sampled_from(sorted(self.published)))
        slot, generation = self.published[key]
        assert self.tier.quarantine(slot, generation - 1) == 0
        below = self._below(key)
        before = self._kept()
        assert self.tier.quarantine(slot, generation) == len(below)
        self._forget(below, "quarantined")
        self.failed.add((slot, generation))
        if slot not in self._held():  # else when the last lease on it ends
            assert self._kept() == [*before, slot][-self.keep :] if self.keep else not before

    @invariant()
    def few_are_kept_and_nobody_uses_them(self) -> None:
        kept = self._kept()
        assert len(kept) == len(set(kept)) <= self.keep
        assert not set(kept) & set(self.writing)
        assert not set(kept) & {slot for slot, _ in self.published.values()}

    @rule()
    def clear(self) -> None:
        assert self.tier.clear() == len(self.published)
        self._forget([*self.published, *self.pending], "cleared")

    # --- what holds after every step ---

    @invariant()
    def structures_agree(self) -> None:
        assert self.tier.check_integrity() == []

    @invariant()
    def matches_are_the_models(self) -> None:
        for prompt in PROMPTS:
            expected = self._matched(prompt)
            for start in range(DEPTH + 1):
                assert self.tier.match(prompt, start) == expected

    @invariant()
    def fates_are_the_models(self) -> None:
        for key in ALL_KEYS:
            if key in self.published:
                assert self.tier.why(key) == "published"
            elif key in self.pending:
                assert self.tier.why(key) == "pending"
            else:
                assert self.tier.why(key) == self.fate.get(key, "unknown")

    @invariant()
    def counts_are_the_models(self) -> None:
        stats = self.tier.stats()
        assert stats["published"] == len(self.published)
        assert stats["pending"] == len(self.pending)
        assert stats["orphaned"] == len(self.writing) - len(self.pending)
        assert stats["leases"] == len(self.leases)
        assert stats["free"] == N_SLOTS - len(self._used())

    @invariant()
    def prefixes_are_closed(self) -> None:
        for key in self.published:
            assert PARENT[key] is None or PARENT[key] in self.published

    @invariant()
    def checksums_are_those_given(self) -> None:
        for slot, generation in self.published.values():
            assert self.tier.checksum(slot, generation) == self.sums[slot, generation]

    def teardown(self) -> None:
        """With every lease ended and every writer heard, nothing is left in between."""
        for number in self.leases:
            self.tier.release(number)
        self.leases.clear()
        slots = np.array(list(self.writing), np.int32)
        self.tier.abandon(slots, np.array(list(self.writing.values()), np.uint64))
        stats = self.tier.stats()
        assert stats["free"] + stats["published"] + stats["kept"] == N_SLOTS
        assert stats["kept"] == len(self._kept()) <= self.keep
        assert stats["leased"] == stats["condemned"] == stats["orphaned"] == 0
        assert self.tier.check_integrity() == []


for _order, _keep in itertools.product(eviction_orders(), (0, 2)):
    _name = f"HostTier_{_order}_keeps_{_keep}"
    _machine = type(_name, (HostTierMachine,), {"order": _order, "keep": _keep})
    _case = _machine.TestCase
    _case.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
    globals()[f"Test{_name}"] = _case
del _case
