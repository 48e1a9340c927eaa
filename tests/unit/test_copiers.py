"""Which copier serves which device, and what is said where there is none."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvmem.engines.copiers import DEVICE_FAILED, Regions, copier_for  # noqa: E402
from kvmem.errors import EngineError, UnsupportedEngine  # noqa: E402
from kvmem.store.scratch import Scratch  # noqa: E402

IDS = np.arange(2, dtype=np.int32)
FIRST = np.ones(2, np.uint64)
KEYS = bytes(64)


def regions(memory: np.ndarray) -> Regions:
    its = Regions()
    its.add(memory.ctypes.data, memory.shape[1], memory.shape[1])
    return its


def test_the_cpu_s_copier_moves_a_group_s_blocks() -> None:
    memory = np.random.default_rng(0).integers(0, 256, (4, 4096), np.uint8)
    before = memory.copy()
    scratch = Scratch(4, 4096, 1, bytes(32))
    copier = copier_for(torch.device("cpu"), scratch.buffer, [regions(memory)], 4)
    status, _ = copier.store(IDS, IDS, FIRST, KEYS)
    assert not status.any()
    memory[:] = 0
    assert not copier.load(IDS, IDS, FIRST, KEYS, np.ones(2, np.uint8)).any()
    assert (memory[:2] == before[:2]).all()
    assert not memory[2:].any()


def test_another_device_is_refused_by_name() -> None:
    scratch = Scratch(4, 4096, 1, bytes(32))
    with pytest.raises(UnsupportedEngine, match="KV on meta yet"):
        copier_for(torch.device("meta"), scratch.buffer, [], 4)


def test_a_build_without_cuda_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    scratch = Scratch(4, 4096, 1, bytes(32))
    with pytest.raises(UnsupportedEngine, match="Put nvcc on the PATH and install kvmem"):
        copier_for(torch.device("cuda:0"), scratch.buffer, [], 4)


class _Gpu:
    """Stands for `kvmem._cuda`: notes what it is told and answers as it was asked to."""

    def __init__(self, status: int) -> None:
        self.status, self.calls = status, []
        self.error = "an illegal memory access"

    def GpuCopier(self, arena: Any, device: int, rank: int) -> _Gpu:  # noqa: N802
        self.calls.append(("made", device, rank))
        return self

    def register_layers(self, *arguments: Any) -> None:
        self.calls.append(("layers", *arguments[3:]))

    def store(self, *arguments: Any) -> Any:
        self.calls.append(("store", *arguments[4:]))
        return np.full(2, self.status, np.uint8), np.zeros(2, np.uint64)

    def load(self, *arguments: Any) -> Any:
        self.calls.append(("load", *arguments[5:]))
        return np.full(2, self.status, np.uint8)


def on_gpu(monkeypatch: pytest.MonkeyPatch, status: int) -> tuple[_Gpu, Any]:
    gpu = _Gpu(status)
    real = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda n: gpu if n == "kvmem._cuda" else real(n)
    )
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    memory = np.zeros((4, 4096), np.uint8)
    scratch = Scratch(4, 4096, 4, bytes(32))
    copier = copier_for(
        torch.device("cuda:3"), scratch.buffer, [regions(memory)] * 2, 4, rank=2
    )  # fmt: skip
    return gpu, copier


def test_a_gpu_s_copies_come_after_what_is_on_the_current_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, copier = on_gpu(monkeypatch, 0)
    copier.store(IDS, IDS, FIRST, KEYS, 1)
    copier.load(IDS, IDS, FIRST, KEYS, np.ones(2, np.uint8), 1)
    assert gpu.calls == [
        ("made", 3, 2), ("layers", 4, 0), ("layers", 4, 1), ("store", 1, 77), ("load", 1, 77),
    ]  # fmt: skip


def test_a_failing_gpu_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _, copier = on_gpu(monkeypatch, DEVICE_FAILED)
    with pytest.raises(EngineError, match="an illegal memory access"):
        copier.store(IDS, IDS, FIRST, KEYS)
    with pytest.raises(EngineError, match="cuda:3 failed"):
        copier.load(IDS, IDS, FIRST, KEYS, np.ones(2, np.uint8))
