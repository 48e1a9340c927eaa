"""The proof at start: an honest copier passes, and each way to be wrong is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvmem import events
from kvmem._core import SlotCopier
from kvmem.engines.proving import N_SLOTS, prove
from kvmem.engines.vllm.proof import PATIENCE_S, ProofDone, Proofs
from kvmem.store.disk_proof import prove as prove_disk
from kvmem.store.scratch import Scratch

pytestmark = pytest.mark.engine
N_BLOCKS = 8
PIECE = 2 * 3 * 16 * 8 * 2  # K and V, heads, tokens, dim, bfloat16
LAYERS = 3


def tensors() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 256, (N_BLOCKS, PIECE), dtype=torch.uint8, generator=draw)
        .view(torch.bfloat16)
        .view(N_BLOCKS, 2, 3, 16, 8)
        for _ in range(LAYERS)
    ]


def copier_over(
    layers: list[torch.Tensor], scratch: Scratch, *, shift: int = 0, order: Any = None
) -> SlotCopier:
    copier = SlotCopier(scratch.buffer, 1, 0)
    bases = [layer.data_ptr() + shift for layer in layers]
    bases = [bases[i] for i in order] if order else bases
    size = np.full(len(layers), PIECE, np.uint64)
    copier.register_layers(np.array(bases, np.uint64), size, size, N_BLOCKS - bool(shift))
    return copier


def scratch() -> Scratch:
    return Scratch(N_SLOTS, LAYERS * PIECE, 1, bytes(32))


def test_an_honest_copier_passes_and_leaves_everything_as_it_was() -> None:
    layers, own = tensors(), scratch()
    before = [layer.clone() for layer in layers]
    assert prove([layers], N_BLOCKS, copier_over(layers, own)) == ""
    for layer, was in zip(layers, before, strict=True):
        assert torch.equal(layer.view(torch.int16), was.view(torch.int16))
    assert own.share(0, 0).any()  # it did move them


class Wrong:
    """A copier that does something else than it says at its loads or its stores."""

    def __init__(self, real: SlotCopier, **does: Callable[..., Any]) -> None:
        self.real, self.does = real, does

    def store(self, *args: Any) -> Any:
        return self.does.get("store", self.real.store)(*args)

    def load(self, *args: Any) -> Any:
        return self.does.get("load", self.real.load)(*args)


def swapped_halves(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    """Keys come back where values were: bytes and checksums are right, the layout is not."""

    def load(ids: Any, *rest: Any) -> Any:
        status = real.load(ids, *rest)
        for layer in layers:
            rows = layer[ids.tolist()]
            layer[ids.tolist()] = rows.flip(1)
        return status

    return Wrong(real, load=load)


def neighbour(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    def load(ids: Any, *rest: Any) -> Any:
        return real.load(ids + 1, *rest)

    return Wrong(real, load=load)


def also_beside(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    """The right blocks, and a byte of another one."""

    def load(ids: Any, *rest: Any) -> Any:
        status = real.load(ids, *rest)
        layers[1].view(torch.uint8)[2 * N_SLOTS + 1].view(-1)[0] ^= 1
        return status

    return Wrong(real, load=load)


def nothing(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    return Wrong(real, load=lambda ids, *rest: np.zeros(len(ids), np.uint8))


def one_layer_late(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    def load(ids: Any, *rest: Any) -> Any:
        status = real.load(ids, *rest)
        rows = [layer[ids.tolist()] for layer in layers]
        for i, layer in enumerate(layers):
            layer[ids.tolist()] = rows[i - 1]
        return status

    return Wrong(real, load=load)


def a_bit(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    def load(ids: Any, *rest: Any) -> Any:
        status = real.load(ids, *rest)
        layers[-1].view(torch.uint8)[int(ids[-1])].view(-1)[-1] ^= 128
        return status

    return Wrong(real, load=load)


def in_one_another_s_place(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    def load(ids: Any, *rest: Any) -> Any:
        return real.load(np.ascontiguousarray(ids[::-1]), *rest)

    return Wrong(real, load=load)


def a_wrong_store(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    def store(ids: Any, *rest: Any) -> Any:
        return real.store(ids + 1, *rest)

    return Wrong(real, store=store)


def a_refused_store(layers: list[torch.Tensor], real: SlotCopier) -> Wrong:
    return Wrong(
        real, store=lambda ids, *rest: (np.full(len(ids), 4, np.uint8), np.zeros(len(ids)))
    )


@pytest.mark.parametrize(
    "wrong",
    [swapped_halves, neighbour, also_beside, nothing, one_layer_late, a_bit,
     in_one_another_s_place, a_wrong_store, a_refused_store],
)  # fmt: skip
def test_a_copier_that_does_something_else_is_seen(
    wrong: Callable[[list[torch.Tensor], SlotCopier], Any],
) -> None:
    layers = tensors()
    before = [layer.clone() for layer in layers]
    error = prove([layers], N_BLOCKS, wrong(layers, copier_over(layers, scratch())))
    assert error.startswith("KV-cache group 0: ")
    for layer, was in zip(layers, before, strict=True):  # what it tried on is put back
        kept = [*range(1, 2 * N_SLOTS + 2), 0]
        assert torch.equal(layer[kept].view(torch.int16), was[kept].view(torch.int16))


def test_a_wrong_address_is_seen() -> None:
    layers = tensors()
    assert prove([layers], N_BLOCKS, copier_over(layers, scratch(), shift=16)) != ""


def test_too_few_blocks_prove_nothing() -> None:
    layers = [layer[:3] for layer in tensors()]
    assert "too few" in prove([layers], 3, copier_over(layers, scratch()))


# -- the scheduler's half ------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_all_ranks_must_have_said_so() -> None:
    bus = events.Bus()
    proofs = Proofs(2, bus, Clock())
    assert proofs.told([ProofDone(1, "")]) is None
    assert (proofs.wanted, proofs.failed) == (True, False)
    assert proofs.told([ProofDone(1, ""), ProofDone(0, "")]) is None
    assert (proofs.wanted, proofs.failed) == (False, False)
    assert [e.error for e in bus.recent() if isinstance(e, events.Proof)] == [""]


def test_one_that_failed_is_enough_and_is_told_once() -> None:
    bus = events.Bus()
    proofs = Proofs(2, bus, Clock())
    assert proofs.told([ProofDone(1, "block 4 came back as another")]) is not None
    assert proofs.told([ProofDone(0, ""), ProofDone(1, "again")]) is None
    assert (proofs.wanted, proofs.failed) == (False, True)
    assert len([e for e in bus.recent() if isinstance(e, events.Proof)]) == 1


def test_a_prompt_waits_for_them_for_a_while() -> None:
    clock = Clock()
    proofs = Proofs(1, events.Bus(), clock)
    clock.now = 100.0
    assert not proofs.failed  # nobody waits yet
    proofs.wait()
    clock.now += PATIENCE_S - 1
    proofs.wait()
    assert not proofs.failed
    clock.now += 2
    assert proofs.failed
    assert proofs.told([ProofDone(0, "")]) is None
    assert not proofs.failed  # late, but there


# -- the disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("codec", [False, True])
def test_a_disk_that_gives_back_what_it_got_passes(tmp_path: Any, ranks: int, codec: bool) -> None:
    like = Scratch(1, 10_000, ranks, bytes(range(32))).header
    assert prove_disk(tmp_path, like, codec=codec) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "faults", ["flip:5000:1", "flip:700:2", "tear:4096:2", "fail:write:28:1", "fail:read:5:1",
               "fail:write:5:4"],
)  # fmt: skip
def test_a_disk_that_does_not_is_seen(tmp_path: Any, faults: str) -> None:
    like = Scratch(1, 10_000, 1, bytes(range(32))).header
    assert prove_disk(tmp_path, like, codec=True, faults=faults) != ""
    assert list(tmp_path.iterdir()) == []
