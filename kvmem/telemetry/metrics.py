"""The catalogue of metrics: what Prometheus gets of kvmem, and no more.

Every name, label and bucket is here; docs/telemetry.md's table is made of it, and the dashboard's
and the alerts' expressions may name nothing else. No label takes a session, a request, a salt or
anything else that clients choose: a label's values are a few words of kvmem's own, and at most
`MOST_SERIES` combinations of a metric are told apart. What is beyond counts as "other".
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["METRICS", "MOST_SERIES", "Metric", "metric"]

MOST_SERIES = 64
OTHER = "other"
# From a copy of a few blocks to a disk that is given up (PATIENCE_S).
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metric(msgspec.Struct, frozen=True):
    """One metric. A counter's exported name ends in `_total`, as here."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: tuple[Metric, ...] = (
    Metric("kvmem_requests_total", "counter", "Requests that are over."),
    Metric("kvmem_prompt_tokens_total", "counter",
           "Prompt tokens by where their KV came from: device, host, disk, far, computed.",
           ("source",)),
    Metric("kvmem_missed_tokens_total", "counter",
           "Prompt tokens that were computed, by the reason first told.", ("reason",)),
    Metric("kvmem_missed_seconds_total", "counter",
           "Estimated seconds of prefill that those tokens took.", ("reason",)),
    Metric("kvmem_renamed_tokens_total", "counter",
           "Missed tokens whose reason was found out later; they stay counted under `was` too.",
           ("was", "reason")),
    Metric("kvmem_moved_blocks_total", "counter",
           "Blocks copied into a tier and out of it.", ("tier", "direction")),
    Metric("kvmem_moved_bytes_total", "counter",
           "Bytes copied into a tier and out of it.", ("tier", "direction")),
    Metric("kvmem_evicted_blocks_total", "counter",
           "Blocks that left a tier to make room: store, promote or demote.", ("tier", "cause")),
    Metric("kvmem_refused_blocks_total", "counter", "Blocks that were not stored.", ("reason",)),
    Metric("kvmem_quarantined_blocks_total", "counter",
           "Blocks taken out by a failed check, with those below them.", ("tier", "reason")),
    Metric("kvmem_cleared_blocks_total", "counter",
           "Blocks taken out by a reset or new weights.", ("reason",)),
    Metric("kvmem_shadowed_blocks_total", "counter",
           "Blocks computed although they were stored: equal, close or bad.", ("outcome",)),
    Metric("kvmem_proofs_total", "counter", "Proofs of a tier: passed or failed.",
           ("tier", "outcome")),
    Metric("kvmem_tier_changes_total", "counter", "Times a tier went off or on again.",
           ("tier", "state")),
    Metric("kvmem_failures_total", "counter",
           "Failures inside kvmem; each cost a recompute at most.", ("where",)),
    Metric("kvmem_events_dropped_total", "counter",
           "Events that a reader was too slow for.", ("reader",)),
    Metric("kvmem_hints_total", "counter", "Actions that hints asked for, by what became of them.",
           ("status",)),
    Metric("kvmem_load_seconds", "histogram",
           "A request's copy from the host to the device.", (), SECONDS),
    Metric("kvmem_store_seconds", "histogram",
           "A step's copy from the device to the host, for one request.", (), SECONDS),
    Metric("kvmem_disk_wait_seconds", "histogram",
           "How long a request waited for blocks from the disk.", (), SECONDS),
    Metric("kvmem_far_wait_seconds", "histogram",
           "How long a request waited for blocks from the far store.", (), SECONDS),
    Metric("kvmem_tier_up", "gauge", "1 while a tier works, 0 while it is off.", ("tier",)),
    Metric("kvmem_tier_blocks", "gauge", "Blocks in a tier that can answer a prompt.", ("tier",)),
    Metric("kvmem_tier_bytes", "gauge", "Bytes that those blocks take.", ("tier",)),
    Metric("kvmem_tier_capacity_bytes", "gauge", "Bytes that a tier may take.", ("tier",)),
    Metric("kvmem_leased_blocks", "gauge", "Blocks of a tier that requests hold.", ("tier",)),
    Metric("kvmem_queue_depth", "gauge",
           "What waits: disk (moves), store (blocks being written), explain (jobs).", ("queue",)),
    Metric("kvmem_running_requests", "gauge", "Requests that are not over."),
    Metric("kvmem_sessions", "gauge", "Sessions that are remembered."),
    Metric("kvmem_off", "gauge", "1 where loads or stores are off for all requests.", ("what",)),
    Metric("kvmem_policy_leads", "gauge",
           "1 for the order that chooses what is evicted now: agents or lru.", ("order",)),
    Metric("kvmem_policy_off", "gauge", "1 once a failure has switched the order agents off."),
    Metric("kvmem_prefill_seconds_per_token", "gauge", "Measured over the last prefill steps."),
)  # fmt: skip

_BY_NAME = {one.name: one for one in METRICS}


def metric(name: str) -> Metric:
    """The metric with this name.

    Raises:
        KeyError: the catalogue has none.
    """
    return _BY_NAME[name]
