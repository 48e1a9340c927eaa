"""What an engine tells of itself while it runs: counted behind the scheduler, told at its desk.

The scheduler's thread emits events and appends them to a queue, no more. They are counted on the
explainer's thread, or by whoever asks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvmem import events
from kvmem.config import Config
from kvmem.engines.vllm.chains import chains_at
from kvmem.engines.vllm.quoting import Quotes
from kvmem.engines.vllm.seen import Seen
from kvmem.store.desk import Desk
from kvmem.telemetry import spans
from kvmem.telemetry.live import Cause, Sample, SessionDetail, Snapshot, Tier
from kvmem.telemetry.logs import EventLog
from kvmem.telemetry.meter import Meter

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvmem.engines.vllm.scheduler import SchedulerHalf
    from kvmem.engines.vllm.stats import Deltas, KvmemStats

__all__ = ["Telemetry", "log_of"]

log = logging.getLogger("kvmem")

MANY = 64  # events that are counted together
LOOKS = 8  # steps between looks at whether it is time


def log_of(config: Config) -> EventLog | None:
    """The log that the setting `event_log` asks for.

    Raises:
        ConfigError: it can't be written.
    """
    return EventLog(Path(config.event_log).expanduser()) if config.event_log is not None else None


class Telemetry:
    """The meter and the desk of a `SchedulerHalf`."""

    def __init__(self, half: SchedulerHalf, vllm_config: VllmConfig, log: EventLog | None) -> None:
        self._half = half
        self._log = log
        self.quotes = Quotes(half, vllm_config)
        self.meter = Meter(half.bus)
        self._desk: Desk | None = None
        self._steps = 0
        self._was_idle = False
        self._ready: Sequence[KvmemStats] = ()  # the differences that were made
        self._deltas: Deltas | None = None

    def open(self) -> None:
        """Begins to answer; an engine whose desk can't be opened runs without it (I9)."""
        if self._log is not None:
            self._log.follow(self._half.bus)
        try:
            from kvmem.engines.vllm.stats import Deltas
        except ImportError as error:  # a vLLM whose connectors have no figures of their own
            log.info("kvmem: vLLM's own metrics will say nothing of kvmem: %s", error)
        else:
            self._deltas = Deltas(self)
            self._ready = self._deltas.ready
        answers = {
            "block": self._block,
            "chains": lambda asked: chains_at(self._half, asked),
            "live": self._live,
            "quote": self.quotes.at_desk,
            "session": self._session,
        }
        try:
            self._desk = Desk(
                self._half.arena.path, answers, lambda error: self._half.failed("desk", error)
            )
        except OSError as error:
            self._half.failed("desk", f"it could not be opened: {error}")

    def answered(self, seen: Seen) -> None:
        """A request is over; it is told before its misses are."""
        ended_s = time.time()
        if not self._half.misses.behind(lambda: self._emit(seen, ended_s)):
            self.meter.dropped += 1

    def _emit(self, seen: Seen, ended_s: float) -> None:
        receipt, request = seen.receipt, seen.request
        one = events.Answered(
            request_id=request.request_id,
            session=getattr(request, "session_id", None) or "",
            prompt=receipt.prompt,
            device=receipt.device,
            host=receipt.host,
            disk=receipt.disk,
            far=receipt.far,
            computed=receipt.computed,
            began_s=seen.began_s,
            ended_s=ended_s,
            disk_s=receipt.disk_ms / 1e3,
            far_s=receipt.far_ms / 1e3,
            load_s=receipt.load_ms / 1e3,
            store_s=receipt.store_ms / 1e3,
        )
        self._half.bus.emit(one)
        headers = getattr(request, "trace_headers", None)
        if headers:
            record = seen.case.record if seen.case is not None else None
            misses = record.told if record is not None else []
            spans.tell(headers, one, misses, model=self._half.page.model)
        if self.meter.waits >= MANY:
            self.meter.drain()

    def stats(self) -> KvmemStats | None:
        """For vLLM's own metrics, asked after each step: most have nothing to tell."""
        if self._half.n_running:
            self._was_idle = False
            self._steps += 1
            if self._steps % LOOKS and not self._ready:
                return None
        if self._deltas is None:
            return None
        idle = not self._half.n_running
        first, self._was_idle = idle and not self._was_idle, idle
        return self._deltas.take(self._half.misses, idle=idle, first=first)

    # -- at the desk, on its thread ----------------------------------------------------------

    def _live(self, asked: dict[str, Any]) -> Snapshot:
        since = asked.get("events_since")
        return self.snapshot(int(asked.get("sessions", 50)), since)

    def _session(self, asked: dict[str, Any]) -> SessionDetail:
        name, misses = str(asked.get("session") or ""), self._half.misses
        session, turns = self.meter.session(name)
        explained = [one.explained for one in misses.explainer.recent.copy()]
        return SessionDetail(
            self._half.arena.path.name,
            session,
            tuple(turns),
            tuple(msgspec.to_builtins(one) for one in explained if one.session == name),
            tuple(self.quotes.branch(past) for past in misses.of_session(name)),
        )

    def _block(self, asked: dict[str, Any]) -> dict[str, str]:
        key, group = asked.get("key"), int(asked.get("group") or 0)
        if not isinstance(key, bytes) or len(key) != 32:
            raise ValueError("a block's key has 32 bytes")
        return {"fate": self._half.cache.fate(group, key)}

    def snapshot(self, sessions: int = 50, events_since: int | None = None) -> Snapshot:
        """How it stands now. Any thread may ask."""
        half, page = self._half, self._half.page
        half.misses.settle()  # what is over is counted
        tiers = self.tiers()
        last, n_sessions = self.meter.sessions(max(0, min(sessions, 10_000)))
        causes = tuple(
            Cause(c.reason, c.role, c.rule, c.by, c.tier, c.requests, c.tokens, c.ms, c.fix)
            for c in half.misses.explainer.sums.top(time.time())
        )
        told = () if events_since is None else tuple(self.meter.events(events_since))
        return Snapshot(
            at_s=time.time(),
            model=page.model,
            pid=os.getpid(),
            arena=half.arena.path.name,
            block_tokens=half.geometry.block_tokens,
            block_bytes=half.arena.slot_bytes * half.ranks,
            prefill_s_per_token=half.misses.explainer.pace.s_per_token,
            tiers=tiers,
            samples=tuple(self.samples(tiers)),
            running=half.n_running,
            n_sessions=n_sessions,
            sessions=tuple(last),
            turns=tuple(self.meter.turns()),
            causes=causes,
            events=told,
            n_events=self.meter.n_events,
            quarantine=tuple(half.cache.quarantined()),
            off=half.off(),
            failures=page.failures,
            last_failure=page.last_failure,
        )

    def samples(self, tiers: tuple[Tier, ...] | None = None) -> list[Sample]:
        """Every series of the catalogue that has a value."""
        return [*self.meter.samples(), *(Sample(*one) for one in self.now(tiers))]

    def tiers(self) -> tuple[Tier, ...]:
        """Host, disk and far store, those that there are; what a far store holds is not known."""
        half, stats = self._half, self._half.cache.stats()
        totals, block_bytes = half.totals, half.arena.slot_bytes * half.ranks
        host = Tier(
            name="host",
            on=not half.proofs.failed,
            blocks=stats["published"],
            bytes=stats["published"] * block_bytes,
            capacity_bytes=stats["n_slots"] * block_bytes,
            capacity_blocks=stats["n_slots"],
            leased=stats["leased"],
            reserved=stats["pending"] + stats["orphaned"],
            under_way=len(half.storing.outstanding),
            in_blocks=totals.blocks_stored,
            in_bytes=totals.bytes_stored,
            in_s=totals.store_s,
            out_blocks=totals.blocks_loaded,
            out_bytes=totals.bytes_loaded,
            out_s=totals.load_s,
            evicted_blocks=stats["evictions"],
            faults=totals.quarantined,
        )
        found = [host]
        for name in ("disk", "far"):
            below = stats.get(name)
            if below is None:
                continue
            found.append(
                Tier(
                    name=name,
                    on=below["on"],
                    blocks=below.get("published", 0),
                    bytes=below.get("used_bytes", 0),
                    capacity_bytes=below.get("disk_bytes", 0),
                    leased=below.get("leased", 0),
                    reserved=below.get("pending", 0),
                    under_way=below["under_way"],
                    in_blocks=below["written"],
                    in_bytes=below["bytes_written"],
                    in_s=below["io_s"],
                    out_blocks=below["read"],
                    out_bytes=below["bytes_read"],
                    out_s=below["io_s"],
                    evicted_blocks=below.get("evictions", 0),
                    faults=below["faults"],
                )
            )
        return tuple(found)

    def now(
        self, tiers: tuple[Tier, ...] | None = None
    ) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """What is not counted from events, each with its labels: gauges, and others' sums."""
        half = self._half
        for tier in tiers or self.tiers():
            at = (tier.name,)
            yield "kvmem_tier_up", at, float(tier.on)
            yield "kvmem_tier_blocks", at, float(tier.blocks)
            yield "kvmem_tier_bytes", at, float(tier.bytes)
            yield "kvmem_tier_capacity_bytes", at, float(tier.capacity_bytes)
            yield "kvmem_leased_blocks", at, float(tier.leased)
            if tier.name == "host":  # what is moved there is counted from its events
                continue
            yield "kvmem_moved_blocks_total", (tier.name, "in"), float(tier.in_blocks)
            yield "kvmem_moved_bytes_total", (tier.name, "in"), float(tier.in_bytes)
            yield "kvmem_moved_blocks_total", (tier.name, "out"), float(tier.out_blocks)
            yield "kvmem_moved_bytes_total", (tier.name, "out"), float(tier.out_bytes)
            yield "kvmem_queue_depth", at, float(tier.under_way)
        yield "kvmem_queue_depth", ("store",), float(len(half.storing.outstanding))
        yield "kvmem_queue_depth", ("explain",), float(half.misses.waiting)
        off = half.off()
        for what in ("loads", "stores"):
            yield "kvmem_off", (what,), float(what in off)
        for status, n in list(half.cache.sessions.counts.items()):
            yield "kvmem_hints_total", (status,), float(n)
        keeping = half.cache.keeping
        if keeping is not None:
            for order in ("agents", "lru"):
                yield "kvmem_policy_leads", (order,), float(keeping.leads == order)
            yield "kvmem_policy_off", (), float(bool(keeping.off))
        yield "kvmem_running_requests", (), float(half.n_running)
        yield "kvmem_sessions", (), float(self.meter.n_sessions)
        yield "kvmem_prefill_seconds_per_token", (), half.misses.explainer.pace.s_per_token
        for reader, dropped in (
            ("meter", self.meter.dropped),
            ("event_log", self._log.dropped if self._log is not None else 0),
        ):
            if dropped:
                yield "kvmem_events_dropped_total", (reader,), float(dropped)

    def close(self) -> None:
        """Ends the desk's thread."""
        if self._desk is not None:
            self._desk.close()
        self.meter.close()
        if self._log is not None:
            self._log.close()
