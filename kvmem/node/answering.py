"""What each question to a node does, once its frame is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmem.cache import Cache
from kvmem.node import wire
from kvmem.node.hall import Hall
from kvmem.node.members import Engine

__all__ = ["ANSWERED", "DO", "LOOKS", "look"]

# What anybody may ask who changes nothing.
LOOKS = frozenset((wire.Match, wire.Prefix, wire.Fate, wire.Ask))
ANSWERED = frozenset((wire.Acquire, wire.Reserve, wire.Publish, wire.Quarantine, wire.Drop))
DO: dict[type, Callable[[Hall, Engine, Any, float], Any]] = {
    wire.Acquire: lambda hall, engine, ask, now: hall.acquire(engine, ask, now),
    wire.Reserve: lambda hall, engine, ask, now: hall.reserve(engine, ask, now),
    wire.Publish: lambda hall, engine, ask, now: wire.Told(hall.publish(engine, ask, now)),
    wire.Abandon: lambda hall, engine, ask, now: hall.abandon(
        engine, ask.slots, ask.generations, now),
    wire.Hold: lambda hall, engine, ask, now: hall.hold(
        engine, ask.request, ask.group, ask.keys, ask.n_blocks),
    wire.Demote: lambda hall, engine, ask, now: hall.demote(engine, ask.codec),
    wire.Release: lambda hall, engine, ask, now: hall.release(engine, ask.request),
    wire.Quarantine: lambda hall, engine, ask, now: wire.Told(
        hall.quarantine(ask.slot, ask.generation, key=ask.key, reason=ask.reason,
                        distrust=ask.distrust)),
    wire.Drop: lambda hall, engine, ask, now: wire.Told(
        hall.drop(engine, ask.reason, everything=ask.all)),
    wire.Computes: lambda hall, engine, ask, now: hall.cache.computes(ask.s_per_token),
    wire.Resume: lambda hall, engine, ask, now: hall.resume(
        engine, ask.requests, ask.batch),
}  # fmt: skip


def look(cache: Cache, ask: Any) -> wire.Told | wire.Failed:
    """The answer to one of `LOOKS`."""
    if type(ask) is wire.Match:
        chains: list[Any] = [wire.PackedKeys(one) for one in ask.chains]
        if ask.why:
            return wire.Told(list(cache.look(chains, start=ask.start, limit=ask.limit)))
        return wire.Told(cache.match(chains, ask.start, ask.limit))
    if type(ask) is wire.Prefix:
        return wire.Told(list(cache.prefix(ask.keys)))
    if type(ask) is wire.Fate:
        return wire.Told(cache.fate(ask.group, ask.key))
    if ask.what == "stats":
        return wire.Told(cache.stats())
    if ask.what == "quarantined":
        return wire.Told(cache.quarantined())
    if ask.what == "check":
        return wire.Told(cache.check_integrity())
    return wire.Failed(f"nothing is known of {ask.what!r}")
