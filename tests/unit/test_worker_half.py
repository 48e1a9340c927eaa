"""The worker's half: which layouts it moves, and on which cores it runs."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from kvmem.engines.vllm.support import Geometry
from kvmem.engines.vllm.worker import _all_cores, _block_range, _engine_cores
from kvmem.errors import UnsupportedEngine

pytestmark = pytest.mark.engine


def geometry(layer_bytes: int, n_device_blocks: int = 10) -> Geometry:
    return Geometry(
        block_tokens=16,
        block_bytes=layer_bytes,
        n_device_blocks=n_device_blocks,
        layers=("a",),
        layer_bytes=layer_bytes,
    )


def test_a_layer_of_its_own_is_dense_from_block_to_block() -> None:
    tensor = torch.zeros(10, 3, 16, 128, dtype=torch.bfloat16)
    n_bytes = 3 * 16 * 128 * 2
    assert _block_range("a", tensor, geometry(n_bytes)) == (tensor.data_ptr(), n_bytes)


def test_a_layer_inside_a_block_of_all_layers_keeps_its_stride() -> None:
    whole = torch.zeros(10, 30, 3, 16, 128, dtype=torch.bfloat16)
    n_bytes = 3 * 16 * 128 * 2
    address, stride = _block_range("a", whole[:, 7], geometry(n_bytes))
    assert address == whole.data_ptr() + 7 * n_bytes
    assert stride == 30 * n_bytes


def test_permuted_but_dense_blocks_are_moved_whole() -> None:
    tensor = torch.zeros(10, 16, 3, 128, dtype=torch.bfloat16).permute(0, 2, 1, 3)
    n_bytes = 3 * 16 * 128 * 2
    assert _block_range("a", tensor, geometry(n_bytes))[1] == n_bytes


def test_kernel_blocks_smaller_than_the_managers_are_moved_together() -> None:
    tensor = torch.zeros(40, 3, 16, 128, dtype=torch.bfloat16)
    n_bytes = 4 * 3 * 16 * 128 * 2
    assert _block_range("a", tensor, geometry(n_bytes))[1] == n_bytes


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
        _block_range("a", tensor, geometry(3 * 16 * 128 * 4))


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
