"""One namespace in a node: its arena, its tiers, its `Cache`, and the engines that use them.

What an engine has here is known by its token: leases by request, and batches, the slots that it
reserved and has not reported. I3 rests on who can write to those slots, which are its workers:

    a worker gets the arena's memory only over a connection of its own that named the token
    its process can write until it said `Bye`, after it had unmapped, or the kernel calls it dead
    by a pidfd, which it does when all its threads have ended and all its descriptors, a GPU's with
    its transfers too, are closed. A connection that merely ended says neither.

So an engine's batches go back when its scheduler's half has hung up and no worker of it can write
any more. From then on the token is unknown: a worker that comes later maps nothing.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvmem import events
from kvmem.cache import Cache
from kvmem.errors import CapacityError
from kvmem.node.flights import Flights
from kvmem.node.members import Batch, Engine, Settings
from kvmem.node.tenants import Tenants
from kvmem.node.wire import (
    Acquire,
    Granted,
    Hello,
    More,
    PackedKeys,
    PartOf,
    Publish,
    Reserve,
    Reserved,
)
from kvmem.store import Arena, Disk, Scrub
from kvmem.store.far import open_far
from kvmem.store.layout import slots_within

__all__ = ["Hall"]

WALK_SLOTS, WALK_S = 1024, 0.05


class Hall:
    """See the module. One thread uses it, the node's; `close` ends the tiers and the memory.

    Raises:
        CapacityError, ConfigError: there is no room for it.
    """

    def __init__(self, settings: Settings, hello: Hello, bus: events.Bus) -> None:
        self.namespace = hello.namespace
        self.hello = hello
        self.bus = bus
        shapes = [group.shape for group in hello.groups]
        host_bytes = int(settings.host_gb * 2**30)
        n_slots = slots_within(host_bytes, hello.slot_bytes, ranks=hello.ranks)
        if n_slots < 1:
            raise CapacityError(
                f"host_gb of {settings.host_gb} holds no block of this engine's "
                f"{hello.slot_bytes * hello.ranks:,} bytes",
                next_step="Raise --host-gb.",
                setting="host_gb",
            )
        self.arena = Arena.create(
            f"node-{os.getpid()}-{secrets.token_hex(4)}",
            n_slots=n_slots,
            slot_bytes=hello.slot_bytes,
            namespace=hello.namespace,
            ranks=hello.ranks,
            label=hello.label,
            linked=False,
        )
        self.disk, self.far = _tiers(settings, self.arena, hello.namespace, bus, os.environ)
        self.cache = Cache(
            n_slots, shapes, eviction=settings.eviction, bus=bus, mover=self.disk, carrier=self.far
        )
        rate = settings.scrub_mb_s * 1e6
        self.scrub = Scrub(self.arena, self.cache.published, rate) if rate else None
        self.flights = Flights()
        block_bytes = hello.slot_bytes * hello.ranks
        self.tenants = Tenants(n_slots, block_bytes, settings.tenant_share)
        self.engines: dict[str, Engine] = {}
        # Of each slot, the batch that has it reserved; 0 for none.
        self._batch_of = np.zeros(n_slots, np.int64)
        self._n_engines = 0
        self._n_batches = 0
        self._walked_s = 0.0
        self.progress = 0  # rises when something may have come that a request waits for

    # -- engines come and go -----------------------------------------------------------------

    def fits(self, hello: Hello) -> bool:
        """Whether an engine's blocks are the ones that are kept here."""
        ours = (self.namespace, self.hello.slot_bytes, self.hello.ranks, self.hello.groups)
        return (hello.namespace, hello.slot_bytes, hello.ranks, hello.groups) == ours

    def attach(self, hello: Hello, pid: int) -> tuple[Engine, bool]:
        """The engine that says hello, and whether it was known: a token that is not gets a new
        one. An engine whose scheduler's half is attached is nobody else's."""
        known = self.engines.get(hello.token)
        if known is not None and not known.attached:
            known.attached, known.pid = True, pid
            return known, True
        self._n_engines += 1
        engine = Engine(self._n_engines, hello.label, pid)
        self.engines[engine.token] = engine
        return engine, False

    def detached(self, engine: Engine) -> None:
        """The scheduler's half has hung up."""
        engine.attached = False
        for request in list(engine.chains):
            self.flights.end(engine.name(request))
        self.reclaim(engine)

    def reclaim(self, engine: Engine) -> None:
        """Takes back all that an engine has, if nothing of it can write any more (I3)."""
        if engine.attached or engine.writers:
            return
        self.engines.pop(engine.token, None)
        for batch in list(engine.batches.values()):
            self._give_back(batch)
        for request in list(engine.chains):
            self.release(engine, request)

    def resume(self, engine: Engine, requests: list[str], last_batch: int) -> None:
        """An engine that was away tells what it still has: all else ends."""
        held = set(requests)
        for request in [one for one in engine.chains if one not in held]:
            self.release(engine, request)
        for number in [one for one in engine.batches if one > last_batch]:
            self._give_back(engine.batches[number])  # nobody was told of these slots

    # -- what an engine asks -----------------------------------------------------------------

    def acquire(self, engine: Engine, ask: Acquire, now: float) -> Granted:
        """`Cache.acquire`, or "not yet" while another engine is computing the rest."""
        self._look_at_scrub()
        if len(ask.chains) != len(self.cache.groups):
            raise ValueError(f"keys of {len(ask.chains)} groups, not {len(self.cache.groups)}")
        chains: list[Any] = [engine.take(ask.request, i, more) for i, more in enumerate(ask.chains)]
        engine.tenant[ask.request] = ask.tenant
        name = engine.name(ask.request)
        grant = self.cache.acquire(name, chains, start=ask.start, limit=ask.limit)
        coming = grant.coming
        if not coming and self._flies(engine, name, chains[0], grant.stop, ask, now):
            coming = True
        return Granted(
            ask.start if coming else grant.start,
            ask.start if coming else grant.stop,
            []
            if coming
            else [
                PartOf(part.group, part.first, part.slots.tobytes(), part.generations.tobytes())
                for part in grant.parts
            ],
            "coming" if coming else grant.missing,
            coming,
            grant.from_disk,
            grant.disk_s,
            grant.from_far,
            grant.far_s,
        )

    def _flies(
        self, engine: Engine, name: str, keys: PackedKeys, stop: int, ask: Acquire, now: float
    ) -> bool:
        """Whether the request is to wait; if not, what it is to compute is a flight of its own."""
        shape = self.cache.groups[0]
        at, until = stop // shape.block_tokens, ask.limit // shape.block_tokens
        until = min(until, len(keys))
        if not shape.closed or at >= until:
            self.flights.end(name)
            return False
        if self.flights.must_wait(name, engine.number, keys[at], now):
            return True
        if ask.stores:
            self.flights.begin(name, engine.number, keys, at, until, now)
        return False

    def reserve(self, engine: Engine, ask: Reserve, now: float) -> Reserved:
        """`Cache.reserve`, within the tenant's share."""
        if ask.group >= len(self.cache.groups):
            raise ValueError(f"there is no group {ask.group}")
        keys = engine.take(ask.request, ask.group, ask.keys)
        engine.tenant[ask.request] = ask.tenant
        blocks = np.frombuffer(ask.blocks, np.int32)
        if not len(blocks) or blocks[0] < 0 or blocks[-1] >= len(keys):
            raise ValueError("blocks beyond the keys")
        if (np.diff(blocks) <= 0).any():
            raise ValueError("blocks rise")
        wanted, over = blocks, 0
        if self.tenants.room(ask.tenant, now) < len(blocks):
            # Of a chain, what is here already needs no room.
            closed = self.cache.groups[ask.group].closed
            here = self.cache.prefix(keys[: int(blocks[-1]) + 1])[0] if closed else 0
            new = int((blocks >= here).sum())
            room = self.tenants.make_room(ask.tenant, new, self.cache.shed, now)
            over = max(0, new - room)
            wanted = blocks[: len(blocks) - over]
            self.tenants.refused(ask.tenant, over, now)
        if not len(wanted):
            return Reserved(b"", b"", b"", over, "quota", 0)
        name = engine.name(ask.request)
        room_for = self.cache.reserve(name, ask.group, keys, wanted.tolist())
        self._n_batches += 1
        batch = Batch(self._n_batches, engine, ask, keys[: int(wanted[-1]) + 1], room_for.index)
        batch.slots, batch.generations = room_for.slots, room_for.generations
        batch.left = len(room_for.slots)
        if batch.left:
            engine.batches[batch.number] = batch
            self._batch_of[batch.slots] = batch.number
            self.tenants.charge(ask.tenant, batch.slots, batch.generations, now)
        return Reserved(
            room_for.index.tobytes(),
            room_for.slots.tobytes(),
            room_for.generations.tobytes(),
            room_for.refused + over,
            "quota" if over else "no_room",
            batch.number if batch.left else 0,
        )

    def publish(self, engine: Engine, ask: Publish, now: float) -> int:
        """`Cache.publish` of slots that this engine has reserved, and of no other's (I4)."""
        slots, generations = _slots(ask.slots), _words(ask.generations)
        checksums = _words(ask.checksums)
        if not len(slots) == len(generations) == len(checksums):
            raise ValueError("arrays of different lengths")
        n = 0
        for batch, at in self._reported(engine, slots, generations):
            mine = (slots[at], generations[at])
            if batch.doomed:
                self.cache.abandon(*mine)
                self.tenants.discharge(mine[0], now)
                continue
            n_of = self.cache.publish(*mine, checksums[at])
            n += n_of
            engine.last = batch if n_of else None
            if self.cache.groups[batch.group].closed and batch.group == 0:
                stop = self.cache.prefix(batch.keys)[0]
                self.flights.moved(engine.name(batch.request), stop, now)
        self.progress += n > 0
        return n

    def abandon(self, engine: Engine, slots: bytes, generations: bytes, now: float) -> int:
        """`Cache.abandon`, likewise."""
        n, all_slots, all_generations = 0, _slots(slots), _words(generations)
        if len(all_slots) != len(all_generations):
            raise ValueError("arrays of different lengths")
        for _, at in self._reported(engine, all_slots, all_generations):
            n += self.cache.abandon(all_slots[at], all_generations[at])
            self.tenants.discharge(all_slots[at], now)
        return n

    def _reported(
        self, engine: Engine, slots: np.ndarray, generations: np.ndarray
    ) -> list[tuple[Batch, np.ndarray]]:
        """The engine's batches among these slots, and where; each slot is reported once."""
        if not len(slots):
            return []
        if slots.min() < 0 or slots.max() >= len(self._batch_of):
            raise ValueError("there is no such slot")
        numbers = self._batch_of[slots]
        whole = engine.batches.get(int(numbers[0]))
        if (
            whole is not None
            and whole.left == len(slots) == len(whole.slots)
            and np.array_equal(whole.slots, slots)
            and np.array_equal(whole.generations, generations)
        ):
            self._batch_of[slots] = 0
            del engine.batches[whole.number]
            whole.left = 0
            return [(whole, np.arange(len(slots)))]
        found = []
        for number in np.unique(numbers).tolist():
            batch = engine.batches.get(number)
            if batch is None:  # not reserved, or another engine's
                continue
            at = np.flatnonzero(numbers == number)
            order = np.argsort(batch.slots)
            where = order[np.searchsorted(batch.slots[order], slots[at])]
            at = at[batch.generations[where] == generations[at]]
            if len(np.unique(slots[at])) != len(at):
                raise ValueError("a slot is reported twice")
            self._batch_of[slots[at]] = 0
            batch.left -= len(at)
            if not batch.left:
                del engine.batches[number]
            found.append((batch, at))
        return found

    def _give_back(self, batch: Batch) -> None:
        mine = self._batch_of[batch.slots] == batch.number
        self._batch_of[batch.slots[mine]] = 0
        batch.engine.batches.pop(batch.number, None)
        self.cache.abandon(batch.slots[mine], batch.generations[mine])
        self.tenants.discharge(batch.slots[mine], time.monotonic())

    def hold(self, engine: Engine, request: str, group: int, more: More, n_blocks: int) -> None:
        """`Cache.hold`."""
        if group >= len(self.cache.groups):
            raise ValueError(f"there is no group {group}")
        keys = engine.take(request, group, more)
        self.cache.hold(engine.name(request), group, keys, min(n_blocks, len(keys)))

    def demote(self, engine: Engine, codec: int) -> None:
        """`Cache.demote` of what the engine published last."""
        batch = engine.last
        if batch is not None:
            self.cache.demote(batch.group, batch.keys, batch.blocks.tolist(), codec=codec)

    def release(self, engine: Engine, request: str) -> None:
        """`Cache.release`."""
        name = engine.name(request)
        self.flights.end(name)
        self.cache.release(name)
        keys = engine.forget(request)
        tenant = engine.tenant.pop(request, b"")
        if keys is not None and self.cache.groups[0].closed:
            self.tenants.over(tenant, keys, time.monotonic())

    def drop(self, engine: Engine, reason: str, *, everything: bool) -> int:
        """What the engine is storing is not published; with `everything` nothing answers."""
        for batch in engine.batches.values():
            batch.doomed = True
        return self.cache.drop(reason) if everything else 0

    def quarantine(
        self, slot: int, generation: int, *, key: bytes, reason: str, distrust: bool
    ) -> int:
        """`Cache.quarantine`, if the slot still holds that block (I5)."""
        if slot >= self.arena.header.n_slots:
            raise ValueError("there is no such slot")
        found = self.cache.published(slot, 1)
        at = found[0].tolist(), found[1].tolist(), bytes(found[2])
        if at != ([slot], [generation], key):
            return 0
        do = self.cache.distrust if distrust else self.cache.quarantine
        return do(slot, generation, key=key, reason=reason)

    # -- in between --------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether moves are under way that somebody may wait for."""
        disk, far = self.cache.below_under_way
        return bool(disk or far)

    def tick(self, now: float) -> None:
        """What is to be done from time to time."""
        waited = self.cache.waits_for_disk
        self.cache.settle()
        self.progress += waited
        self._look_at_scrub()
        if now - self._walked_s > WALK_S:
            self._walked_s = now
            self.tenants.walk(self.cache.published, self._batch_of != 0, WALK_SLOTS, now)

    def _look_at_scrub(self) -> None:
        """Quarantines what the scrub found, before anything more is promised (I5)."""
        if self.scrub is None:
            return
        for slot, generation, key in self.scrub.take():
            self.cache.quarantine(slot, generation, key=key, reason="scrub")

    def told(self, now: float) -> dict[str, Any]:
        """What `kvmem node status` shows."""
        return {
            "namespace": self.namespace.hex(),
            "label": self.hello.label,
            "slots": self.arena.header.n_slots,
            "slot_bytes": self.hello.slot_bytes * self.hello.ranks,
            "cache": self.cache.stats(),
            "flights": {
                "now": len(self.flights),
                "waited": self.flights.waited,
                "given_up": self.flights.given_up,
            },
            "engines": [
                {
                    "number": engine.number,
                    "pid": engine.pid,
                    "label": engine.label,
                    "attached": engine.attached,
                    "workers": len(engine.writers),
                    "requests": len(engine.chains),
                    "reserved": sum(batch.left for batch in engine.batches.values()),
                }
                for engine in self.engines.values()
            ],
            "tenants": self.tenants.told(now),
            "scrub": self.scrub.stats() if self.scrub is not None else None,
        }

    def close(self) -> None:
        """Ends the tiers and lets go of the memory; what is queued for the disk is written."""
        if self.scrub is not None:
            self.scrub.close()
        if self.disk is not None:
            self.disk.close()
        if self.far is not None:
            self.far.close()
        self.arena.close(unlink=True)


def _tiers(
    settings: Settings, arena: Arena, namespace: bytes, bus: events.Bus, env: Mapping[str, str]
) -> tuple[Any, Any]:
    disk = None
    try:
        if settings.disk_gb:
            blocks = settings.path / "blocks"
            disk = Disk(blocks, int(settings.disk_gb * 2**30), arena, namespace, bus)
        far = open_far(settings.far, arena, namespace, bus, env) if settings.far else None
    except BaseException:
        if disk is not None:
            disk.close()
        arena.close(unlink=True)
        raise
    return disk, far


def _slots(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.int32)


def _words(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint64)
