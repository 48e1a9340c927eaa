"""What the two halves of the connector say to each other.

Down, every step: `Orders` (the engine's KVConnectorMetadata), to every worker. Up, every step that
did something: `Acks` (its KVConnectorWorkerMetadata), which the engine aggregates over the workers
of a step. vLLM carries both between its own processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvmem.engines.vllm.adapters import Held
from kvmem.engines.vllm.proof import ProofDone
from kvmem.node.attaching import Attachment

__all__ = [
    "MAP_FAILED",
    "Acks",
    "Bad",
    "Compare",
    "Compared",
    "Load",
    "LoadDone",
    "LoadPart",
    "Orders",
    "Store",
    "StoreDone",
]

# Where a failure of the worker's half was, when it is the arena that it can't map.
MAP_FAILED = "worker.map"

Ids = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]
Bad = tuple[int, int, bytes, int]  # slot, generation, key, status of a block that failed to load


@dataclass(slots=True)
class LoadPart:
    """Slots to copy to device blocks of one KV-cache group; all arrays are of one length."""

    group: int
    block_ids: Ids
    slots: Ids
    generations: Words
    keys: bytes
    verify: npt.NDArray[np.uint8]


@dataclass(slots=True)
class Load:
    """All that is to be loaded for a request; `early`: for one that has not come yet, so the engine
    knows of no such request."""

    request_id: str
    parts: list[LoadPart]
    early: bool = False

    @property
    def block_ids(self) -> list[int]:
        """The device blocks of all parts."""
        return [block for part in self.parts for block in part.block_ids.tolist()]


@dataclass(slots=True)
class Store:
    """Copy device blocks of one group to reserved slots, after this step's forward."""

    request_id: str
    group: int
    block_ids: Ids
    slots: Ids
    generations: Words
    keys: bytes


@dataclass(slots=True)
class Compare:
    """Compare device blocks, after this step's forward, with slots that hold the same keys."""

    request_id: str
    group: int
    block_ids: Ids
    slots: Ids
    generations: Words
    keys: bytes


@dataclass(slots=True)
class Compared:
    """What came of it on one rank: `equal` blocks bit for bit, `worst` of the others' distances,
    and those that are too far off (slot, generation, key)."""

    request_id: str
    rank: int
    blocks: int
    equal: int
    worst: float
    bad: list[tuple[int, int, bytes]]


@dataclass(slots=True)
class Orders(KVConnectorMetadata):
    """One step's work for the worker half.

    `sequence` rises by one a step, so that a lost acknowledgement is seen. `finished` requests'
    device blocks are kept by the engine until the worker names them as sent. `broken` are
    requests whose load was promised and cannot be made: (request, device blocks). `confirm` asks
    for an acknowledgement even of a step that stores nothing, `prove` for what the worker's proof
    found. `awaited` are early loads of which no end was heard: a worker tells of those again.
    found. Where the blocks are a node's, `node` is what the worker attaches by, and `arena` empty.
    """

    sequence: int
    arena: str
    scheduled_tokens: int = 0
    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    broken: list[tuple[str, list[int]]] = field(default_factory=list)
    confirm: bool = False
    prove: bool = False
    awaited: list[str] = field(default_factory=list)
    compares: list[Compare] = field(default_factory=list)
    node: Attachment | None = None


@dataclass(slots=True)
class LoadDone:
    """How a load ended on one rank."""

    request_id: str
    rank: int
    blocks: int
    bytes: int
    seconds: float
    bad: list[Bad] = field(default_factory=list)


@dataclass(slots=True)
class StoreDone:
    """The stores of one `Orders`, in its order; blocks with a status other than 0 failed.

    `ranks` workers have said so: a block is whole when all of them have (I4). Their checksums are
    combined by exclusive or.
    """

    sequence: int
    statuses: list[npt.NDArray[np.uint8]]
    checksums: list[Words]
    seconds: float
    ranks: int = 1

    def joined(self, other: StoreDone) -> StoreDone:
        """This step's stores as both tell of them."""
        pairs = zip(self.statuses, other.statuses, strict=True)
        sums = zip(self.checksums, other.checksums, strict=True)
        return StoreDone(
            self.sequence,
            [np.maximum(mine, theirs) for mine, theirs in pairs],
            [mine ^ theirs for mine, theirs in sums],
            max(self.seconds, other.seconds),
            self.ranks + other.ranks,
        )


@dataclass(slots=True)
class Acks(KVConnectorWorkerMetadata):
    """What the worker half did since it last said so, and the adapters it holds if they changed."""

    stores: list[StoreDone] = field(default_factory=list)
    loads: list[LoadDone] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    adapters: list[Held] = field(default_factory=list)
    proofs: list[ProofDone] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """What two workers did, in one."""
        assert isinstance(other, Acks)  # the engine asks workers of one connector
        return Acks(
            _join(self.stores + other.stores),
            self.loads + other.loads,
            self.failures + other.failures,
            self.adapters + other.adapters,
            self.proofs + other.proofs,
            self.compared + other.compared,
        )


def _join(stores: Iterable[StoreDone]) -> list[StoreDone]:
    """One entry a step, in the steps' order."""
    joined: dict[int, StoreDone] = {}
    for done in stores:
        before = joined.get(done.sequence)
        joined[done.sequence] = done if before is None else before.joined(done)
    return [joined[sequence] for sequence in sorted(joined)]
