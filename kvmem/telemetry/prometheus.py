"""Snapshots as Prometheus reads them: what stands when it asks.

vLLM's own /metrics has the same names, as of the engine's last step; there they are counted by
prometheus-client itself (kvmem/engines/vllm/stats.py). Here a snapshot has counted already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvmem.telemetry.live import Histogram, Snapshot
from kvmem.telemetry.metrics import METRICS

__all__ = ["CONTENT_TYPE", "LABELS", "exposition"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")  # vLLM's own; here an engine is told by its pid


def exposition(snapshots: Sequence[Snapshot]) -> bytes:
    """The snapshots' samples in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshots(snapshots))
    return generate_latest(registry)


class _Snapshots(Collector):
    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        for one in METRICS:
            names = [*LABELS, *one.labels]
            if one.kind == "counter":
                family: Metric = CounterMetricFamily(one.name, one.help, labels=names)
            elif one.kind == "gauge":
                family = GaugeMetricFamily(one.name, one.help, labels=names)
            else:
                family = HistogramMetricFamily(one.name, one.help, labels=names)
            for snapshot in self._snapshots:
                for sample in snapshot.samples:
                    if sample.name != one.name:
                        continue
                    labels = [snapshot.model, str(snapshot.pid), *sample.labels]
                    if not isinstance(sample.value, Histogram):
                        family.add_metric(labels, sample.value)  # type: ignore[attr-defined]
                        continue
                    total, buckets = 0, []
                    for bound, n in zip(
                        (*one.buckets, float("inf")), sample.value.counts, strict=True
                    ):
                        total += n
                        buckets.append(["+Inf" if bound == float("inf") else str(bound), total])
                    family.add_metric(labels, buckets, sample.value.sum)  # type: ignore[attr-defined]
            yield family
