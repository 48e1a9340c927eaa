"""The worker's half: which layouts it moves, and on which cores it runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvmem.config import Config
from kvmem.engines.copiers import Regions
from kvmem.engines.vllm.geometry import Geometry, Group
from kvmem.engines.vllm.wire import MAP_FAILED, Acks, Load, LoadPart, Orders
from kvmem.engines.vllm.worker import (
    WorkerHalf,
    _all_cores,
    _engine_cores,
    _pieces,
)
from kvmem.errors import UnsupportedEngine
from kvmem.store.arena import Arena
from kvmem.types import GroupShape

pytestmark = pytest.mark.engine
BYTES = 8 << 20


def geometry(n_bytes: int, n_device_blocks: int = 10) -> Geometry:
    group = Group(GroupShape(16), ("a",), (n_bytes,))
    return Geometry((group,), n_device_blocks, hash_tokens=16)


def pieces(tensors: Any, n_bytes: int) -> list[tuple[int, int, int]]:
    return _pieces("a", tensors, n_bytes, n_device_blocks=10)


def test_a_layer_of_several_states_is_moved_state_by_state() -> None:
    page = torch.zeros(10, 4096, dtype=torch.uint8)
    first = page[:, :300].view(10, 3, 100)
    second = page[:, 512:1024]
    assert pieces([first, second], 812) == [
        (page.data_ptr(), 4096, 300),
        (page.data_ptr() + 512, 4096, 512),
    ]


def test_a_layer_of_its_own_is_dense_from_block_to_block() -> None:
    tensor = torch.zeros(10, 3, 16, 128, dtype=torch.bfloat16)
    n_bytes = 3 * 16 * 128 * 2
    assert pieces(tensor, n_bytes) == [(tensor.data_ptr(), n_bytes, n_bytes)]


def test_a_layer_inside_a_block_of_all_layers_keeps_its_stride() -> None:
    whole = torch.zeros(10, 30, 3, 16, 128, dtype=torch.bfloat16)
    n_bytes = 3 * 16 * 128 * 2
    ((address, stride, piece),) = pieces(whole[:, 7], n_bytes)
    assert address == whole.data_ptr() + 7 * n_bytes
    assert (stride, piece) == (30 * n_bytes, n_bytes)


def test_permuted_but_dense_blocks_are_moved_whole() -> None:
    tensor = torch.zeros(10, 16, 3, 128, dtype=torch.bfloat16).permute(0, 2, 1, 3)
    n_bytes = 3 * 16 * 128 * 2
    assert pieces(tensor, n_bytes)[0][1:] == (n_bytes, n_bytes)


def test_kernel_blocks_smaller_than_the_managers_are_moved_together() -> None:
    tensor = torch.zeros(40, 3, 16, 128, dtype=torch.bfloat16)
    n_bytes = 4 * 3 * 16 * 128 * 2
    assert pieces(tensor, n_bytes)[0][1:] == (n_bytes, n_bytes)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(10, 3, 16, 256)[..., ::2],
        torch.zeros(2, 10, 3, 16, 64),
        torch.zeros(9, 3, 16, 128),
        torch.zeros(10, 3, 16, 129),
    ],
    ids=["holes", "K and V apart", "other count", "other size"],
)
def test_a_layout_that_is_no_range_of_memory_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedEngine, match="KV layout of a"):
        pieces(tensor, 3 * 16 * 128 * 4)


def worker_half(**settings: Any) -> WorkerHalf:
    """A worker's half without an engine: two blocks of one layer."""
    half = WorkerHalf.__new__(WorkerHalf)
    half.config = Config(**settings)
    half.geometry = geometry(BYTES, n_device_blocks=2)
    half._arena = half._loader = half._storer = half._link = None
    half._mapped, half._bound = "", {}
    half._asked, half._ask_again = 0, 1
    half._acks = Acks()
    half._closing = threading.Event()
    tensor = torch.zeros(2, BYTES, dtype=torch.uint8)
    half._tensors = [tensor]
    regions = Regions()
    regions.add(tensor.data_ptr(), BYTES, BYTES)
    half._devices, half._on = [regions], tensor.device
    half.rank = 0
    return half


@pytest.fixture
def arena(arena_name: str) -> Iterator[Arena]:
    arena = Arena.create(arena_name, n_slots=2, slot_bytes=BYTES, namespace=b"n" * 32)
    yield arena
    arena.close(unlink=True)


def test_an_arena_that_cannot_be_mapped_is_tried_again_ever_more_rarely(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = worker_half(copy_threads=3)
    tries = 0

    def failing(path: Path) -> Arena:
        nonlocal tries
        tries += 1
        raise OSError(24, "Too many open files")

    real = Arena.open
    monkeypatch.setattr(Arena, "open", failing)
    for _ in range(20):
        assert not half._map(Orders(1, str(arena.path)))
    assert tries == 5  # at 1, 2, 4, 8 and 16
    assert [where for where, _ in half._acks.failures] == [MAP_FAILED] * 5
    monkeypatch.setattr(Arena, "open", real)
    while not half._map(Orders(1, str(arena.path))):
        assert half._asked < 100
    assert half._loader is not None
    assert half._storer is not None
    assert half._loader.threads == half._storer.threads == 3
    half._arena.close(unlink=False)  # type: ignore[union-attr]


def test_the_throttle_makes_a_load_wait_as_long_as_its_bytes_would_take(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = worker_half(throttle_gb_s=0.5)
    assert half._map(Orders(1, str(arena.path)))
    assert half._loader is not None
    assert half._storer is not None
    ids, generations = np.arange(2, dtype=np.int32), np.ones(2, np.uint64)
    status, _ = half._storer.store(ids, ids, generations, bytes(64))
    assert not status.any()
    waited: list[float] = []
    monkeypatch.setattr(half, "_closing", SimpleNamespace(wait=waited.append))
    verify = np.ones(2, np.uint8)
    done = half._load(Load("a", [LoadPart(0, ids, ids, generations, bytes(64), verify)]))
    assert done.bytes == 2 * BYTES
    assert waited[0] == pytest.approx(2 * BYTES / 0.5e9, rel=0.5)
    half._arena.close(unlink=False)  # type: ignore[union-attr]


def test_the_copying_thread_may_use_every_core_of_a_pinned_engine() -> None:
    cores = os.sched_getaffinity(0)
    told: list[set[int]] = []

    def pinned() -> None:
        os.sched_setaffinity(0, {min(cores)})  # as the engine pins its own threads
        with _all_cores():
            told.append(os.sched_getaffinity(0))
        told.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert told == [cores, {min(cores)}]
    assert _engine_cores() == cores
