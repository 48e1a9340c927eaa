"""kvmem's part of vLLM's own metrics: what the connector counted, in vLLM's log and its /metrics.

The scheduler's half hands vLLM the differences since it was asked last. vLLM carries them to the
process that serves HTTP, which adds them to Prometheus metrics with vLLM's own labels (model_name,
engine). What fails in here costs a figure (I9).

    data = {"counters": [[name, [label, ...], more], ...],
            "gauges":   [[name, [label, ...], now], ...],
            "observed": [[name, value], ...]}
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvmem.telemetry.metrics import METRICS

if TYPE_CHECKING:
    from kvmem.engines.vllm.telemetry import Telemetry

__all__ = ["Deltas", "Jobs", "KvmemPromMetrics", "KvmemStats"]

EVERY_S = 1.0
PREFIX = "kvmem_"

log = logging.getLogger("kvmem")

_Series = tuple[str, tuple[str, ...]]


class KvmemStats(KVConnectorStats):
    """One interval's figures; see the module."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Nothing was counted."""
        self.data = {"counters": [], "gauges": [], "observed": []}

    def aggregate(self, other: KVConnectorStats) -> KvmemStats:
        """Both intervals in one; of a gauge the later value stands."""
        counters: dict[_Series, float] = {}
        gauges: dict[_Series, float] = {}
        for data in (self.data, other.data):
            for name, labels, value in data["counters"]:
                at = (name, tuple(labels))
                counters[at] = counters.get(at, 0.0) + value
            for name, labels, value in data["gauges"]:
                gauges[name, tuple(labels)] = value
        return KvmemStats(
            {
                "counters": [[name, list(at), value] for (name, at), value in counters.items()],
                "gauges": [[name, list(at), value] for (name, at), value in gauges.items()],
                "observed": [*self.data["observed"], *other.data["observed"]],
            }
        )

    def reduce(self) -> dict[str, int | float]:
        """The line that vLLM logs: prompt tokens by where they came from, and what was moved."""
        told: dict[str, int | float] = {}
        for name, labels, value in self.data["counters"]:
            if name == "kvmem_prompt_tokens_total":
                told[f"kvmem tokens {labels[0]}"] = int(value)
            elif name == "kvmem_moved_blocks_total":
                told[f"kvmem blocks {' '.join(labels)}"] = int(value)
            elif name in ("kvmem_failures_total", "kvmem_quarantined_blocks_total"):
                what = name.removeprefix(PREFIX).removesuffix("_total").replace("_", " ")
                told[f"kvmem {what}"] = told.get(f"kvmem {what}", 0) + int(value)
        return told

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class Jobs(Protocol):
    """What is done behind the scheduler, in order."""

    def behind(self, job: Callable[[], None]) -> bool:
        """Has a job done there; False where too much waits."""

    def settle(self) -> None:
        """Does all that waits, in this thread."""


class Deltas:
    """What changed in an engine's figures since they were told last; `ready` is what was made.

    It is made behind the scheduler, once a second while requests run, and handed over by a later
    step. When the last request is over the engine steps once more, to let its workers know: what
    was not made by then is made in that step, since there may be no other for a long time.
    """

    def __init__(self, telemetry: Telemetry, clock: Callable[[], float] = time.monotonic) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._next_s = 0.0
        self._gauges: dict[_Series, float] = {}
        self._lock = threading.Lock()  # held while it is made
        self.ready: deque[KvmemStats] = deque()
        self._asked = False  # and not made yet

    def take(self, jobs: Jobs, *, idle: bool, first: bool) -> KvmemStats | None:
        """The differences; None where it is not time, or there are none.

        Args:
            jobs: what is done behind.
            idle: no request runs.
            first: and this is so since the last step.
        """
        if not idle:
            if self._clock() >= self._next_s and not self._asked:
                self._next_s = self._clock() + EVERY_S
                self._ask(jobs)
        elif first:
            if not self._asked:
                self._ask(jobs)
            return None
        elif self._asked:
            jobs.settle()
        if not self.ready:
            return None
        ready = self.ready.popleft()
        while self.ready:
            ready = ready.aggregate(self.ready.popleft())
        return ready

    def _ask(self, jobs: Jobs) -> None:
        """Before it is asked for: it may be made before the asking is over."""
        self._asked = True
        if not jobs.behind(self._make):
            self._asked = False

    def _make(self) -> None:
        with self._lock:
            self._asked = False
            now = list(self._telemetry.now())  # first: should it fail, no change is lost
            changes = self._telemetry.meter.take_changes()
            counters = [[name, list(at), more] for (name, at), more in changes.counters.items()]
            if changes.lost:
                counters.append(["kvmem_events_dropped_total", ["histogram"], changes.lost])
            gauges = []
            for name, labels, value in now:
                at = (name, labels)
                before = self._gauges.get(at)
                if value == before:
                    continue
                self._gauges[at] = value
                if name.endswith("_total"):
                    counters.append([name, list(labels), value - (before or 0.0)])
                else:
                    gauges.append([name, list(labels), value])
            observed = [list(one) for one in changes.observed]
            made = KvmemStats({"counters": counters, "gauges": gauges, "observed": observed})
            if not made.is_empty():
                self.ready.append(made)


class KvmemPromMetrics(KVConnectorPromMetrics):
    """The catalogue as Prometheus metrics beside vLLM's own, in the process that serves them."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister()  # an engine that this process had before, as vLLM does with its own
        self._made: dict[str, Any] = {}
        for one in METRICS:
            names = [*labelnames, *one.labels]
            if one.kind == "counter":
                made = metric_types[Counter](one.name, one.help, names)
            elif one.kind == "gauge":
                made = metric_types[Gauge](
                    one.name, one.help, names, multiprocess_mode="mostrecent"
                )
            else:
                made = metric_types[Histogram](one.name, one.help, names, buckets=one.buckets)
            self._made[one.name] = made
        self._broken = False

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Takes in what an engine's half told."""
        try:
            self._observe(transfer_stats_data, self.per_engine_labelvalues[engine_idx])
        except Exception:  # I9: vLLM's own output handler calls this
            if not self._broken:
                log.exception("kvmem: its metrics could not be taken in; told once")
            self._broken = True

    def _observe(self, data: dict[str, Any], engine: list[object]) -> None:
        for name, labels, value in data["counters"]:
            self._made[name].labels(*engine, *labels).inc(value)
        for name, labels, value in data["gauges"]:
            self._made[name].labels(*engine, *labels).set(value)
        for name, value in data["observed"]:
            self._made[name].labels(*engine).observe(value)


def _unregister() -> None:
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)
