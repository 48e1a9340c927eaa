"""One engine as it stands now: a value that the dashboard, `kvmem top` and Prometheus all read.

An engine makes it when it is asked (`kvmem.engines.vllm.desk`), so that nobody who looks costs
anything while nobody looks. All counts are since the engine's start; a flow is the difference of
two snapshots over the difference of their `at_s`.

It is for whoever runs the engine: sessions stand in it by name, as in `kvmem explain`. It holds no
text of a prompt and no salt (I11).
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvmem.types import Quarantine

__all__ = [
    "Branch",
    "Cause",
    "Histogram",
    "Sample",
    "Session",
    "SessionDetail",
    "Snapshot",
    "Tier",
    "Turn",
]


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """A place for blocks: how full it is, and what went in and out since the start.

    `on` is False while it does not work, or is not proved to. `reserved` blocks are being written,
    `leased` are in use, `under_way` moves are not over. `in_s` and `out_s` are the seconds that the
    copies took. A capacity of 0 is not known in blocks.
    """

    name: str
    on: bool
    blocks: int
    bytes: int
    capacity_bytes: int
    capacity_blocks: int = 0
    leased: int = 0
    reserved: int = 0
    under_way: int = 0
    in_blocks: int = 0
    in_bytes: int = 0
    in_s: float = 0.0
    out_blocks: int = 0
    out_bytes: int = 0
    out_s: float = 0.0
    evicted_blocks: int = 0
    faults: int = 0


class Turn(msgspec.Struct, frozen=True):
    """A request that is over: where its prompt's tokens came from, and its waits in seconds."""

    request_id: str
    session: str
    began_s: float
    ended_s: float
    prompt: int
    device: int
    host: int
    disk: int
    computed: int
    disk_s: float
    load_s: float
    store_s: float
    far: int = 0
    far_s: float = 0.0


class Session(msgspec.Struct):
    """A session by the name that its requests gave; "" sums up those that gave none.

    `missed` are tokens that were computed, by reason; `missed_ms` what that took, about.
    """

    session: str
    requests: int = 0
    prompt: int = 0
    device: int = 0
    host: int = 0
    disk: int = 0
    computed: int = 0
    waited_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    missed_ms: float = 0.0
    missed: dict[str, int] = {}
    far: int = 0


class Branch(msgspec.Struct, frozen=True):
    """One of a session's last prompts with its reply, and the blocks of it that are here now.

    `device`, `host` and `disk` are tokens, as a quote counts them; None where the model has several
    KV-cache groups, or the prompt an adapter.
    """

    request_id: str
    prompt: int
    blocks: int
    device: int | None = None
    host: int | None = None
    disk: int | None = None


class SessionDetail(msgspec.Struct, frozen=True):
    """One session: its sums, its last requests, why they missed (as `kvmem explain` has it), and
    its prompts."""

    arena: str
    session: Session | None
    turns: tuple[Turn, ...] = ()
    explained: tuple[dict[str, Any], ...] = ()
    branches: tuple[Branch, ...] = ()


class Cause(msgspec.Struct, frozen=True, omit_defaults=True):
    """A reason for misses, summed over the requests of the last hour; `fix` is what to do."""

    reason: str
    role: str = ""
    rule: str = ""
    by: str = ""
    tier: str = ""
    requests: int = 0
    tokens: int = 0
    ms: float = 0.0
    fix: str = ""


class Histogram(msgspec.Struct, frozen=True):
    """Observations: how many were at most each bound of the metric, not cumulated, the last beyond
    all; and their sum."""

    counts: tuple[int, ...]
    sum: float


class Sample(msgspec.Struct, frozen=True):
    """One series of a metric of the catalogue: its labels' values in order, and its value."""

    name: str
    labels: tuple[str, ...]
    value: float | Histogram


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. `turns` are the last requests, `sessions` those used last, the latest first,
    `events` the last ones as JSON has them, `n_events` how many there ever were, so that a reader
    knows what it missed. `block_bytes` is a block on the host, of all ranks.
    """

    at_s: float
    model: str
    pid: int
    arena: str
    block_tokens: int
    block_bytes: int
    prefill_s_per_token: float
    tiers: tuple[Tier, ...]
    samples: tuple[Sample, ...]
    running: int = 0
    n_sessions: int = 0
    sessions: tuple[Session, ...] = ()
    turns: tuple[Turn, ...] = ()
    causes: tuple[Cause, ...] = ()
    events: tuple[dict[str, Any], ...] = ()
    n_events: int = 0
    quarantine: tuple[Quarantine, ...] = ()
    off: dict[str, str] = {}
    failures: int = 0
    last_failure: str | None = None

    def tier(self, name: str) -> Tier | None:
        """The tier with this name, where there is one."""
        return next((tier for tier in self.tiers if tier.name == name), None)

    def total(self, name: str, *labels: str) -> float:
        """The sum of a counter's or gauge's series whose first labels are these."""
        n = len(labels)
        return sum(
            one.value
            for one in self.samples
            if one.name == name
            and one.labels[:n] == labels
            and not isinstance(one.value, Histogram)
        )
