"""What the two halves of the connector say to each other.

Down, every step: `Orders` (the engine's KVConnectorMetadata). Up, every step that did something:
`Acks` (its KVConnectorWorkerMetadata). vLLM carries both between its own processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvmem.engines.vllm.adapters import Held
from kvmem.errors import EngineError

__all__ = ["MAP_FAILED", "Acks", "Load", "LoadDone", "Orders", "Store", "StoreDone"]

# Where a failure of the worker's half was, when it is the arena that it can't map.
MAP_FAILED = "worker.map"

Ids = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]


@dataclass(slots=True)
class Load:
    """Copy slots to device blocks for a request; all arrays are of one length."""

    request_id: str
    block_ids: Ids
    slots: Ids
    generations: Words
    keys: bytes
    verify: npt.NDArray[np.uint8]


@dataclass(slots=True)
class Store:
    """Copy device blocks to reserved slots, after this step's forward."""

    request_id: str
    block_ids: Ids
    slots: Ids
    generations: Words
    keys: bytes


@dataclass(slots=True)
class Orders(KVConnectorMetadata):
    """One step's work for the worker half.

    `sequence` rises by one a step, so that a lost acknowledgement is seen. `finished` requests'
    device blocks are kept by the engine until the worker names them as sent. `broken` are
    requests whose load was promised and cannot be made: (request, device blocks). `confirm` asks
    for an acknowledgement even of a step that stores nothing.
    """

    sequence: int
    arena: str
    scheduled_tokens: int = 0
    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    broken: list[tuple[str, list[int]]] = field(default_factory=list)
    confirm: bool = False


@dataclass(slots=True)
class LoadDone:
    """How a load ended; `bad` lists (slot, generation, key, status) of blocks that failed."""

    request_id: str
    blocks: int
    bytes: int
    seconds: float
    bad: list[tuple[int, int, bytes, int]] = field(default_factory=list)


@dataclass(slots=True)
class StoreDone:
    """The stores of one `Orders`, in its order; blocks with a status other than 0 failed."""

    sequence: int
    statuses: list[npt.NDArray[np.uint8]]
    checksums: list[Words]
    seconds: float


@dataclass(slots=True)
class Acks(KVConnectorWorkerMetadata):
    """What the worker half did since it last said so, and the adapters it holds if they changed."""

    stores: list[StoreDone] = field(default_factory=list)
    loads: list[LoadDone] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    adapters: list[Held] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Never called: more than one worker is refused at start."""
        raise EngineError(
            "kvmem got acknowledgements of two workers, but serves one",
            next_step="Start vLLM with --tensor-parallel-size 1.",
        )
