"""How far two blocks are from each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvmem.engines.vllm.shadow import NEAR, distance

pytestmark = pytest.mark.engine
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def raw(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_near_and_other_values_are_far(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    stored = torch.randn(3000, generator=draw).to(dtype)
    steps = torch.randint(-1, 2, (3000,), generator=draw) * torch.finfo(dtype).eps
    rounded = (stored.double() * (1 + steps)).to(dtype)
    limit = NEAR[dtype.itemsize]
    assert distance(raw(stored), raw(stored.clone()), dtype) == 0.0
    assert 0.0 < distance(raw(stored), raw(rounded), dtype) < limit / 2
    others = torch.randn(3000, generator=draw).to(dtype)
    assert distance(raw(stored), raw(others), dtype) > 1.0
    swapped = stored.view(2, -1).flip(0).reshape(-1)
    assert distance(raw(stored), raw(swapped), dtype) > 1.0
    assert distance(raw(stored), raw(torch.zeros_like(stored)), dtype) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_is_infinitely_far(dtype: torch.dtype) -> None:
    stored = torch.randn(100).to(dtype)
    broken = stored.clone()
    broken[7] = float("nan")
    assert distance(raw(stored), raw(broken), dtype) == float("inf")
    assert distance(raw(broken), raw(stored), dtype) == float("inf")
