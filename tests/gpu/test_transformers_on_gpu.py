"""The transformers engine on a GPU: answers are those without kvmem, and blocks were restored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
_cuda: Any = pytest.importorskip("kvmem._cuda")
if _cuda.n_devices() == 0:
    pytest.skip("no GPU on this machine", allow_module_level=True)

from kvmem.engines.transformers import PrefixStore  # noqa: E402
from tests.tiny_models import llama, plain, prompt  # noqa: E402


def answer(store: PrefixStore, ids: list[int], n_new: int = 16) -> tuple[Any, list[int]]:
    out = store.generate(ids, max_new_tokens=n_new, do_sample=False)
    return out, out.tokens[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kept_prompt_is_restored_and_answered_the_same(dtype: Any) -> None:
    model = llama(device="cuda", hidden_size=256, num_hidden_layers=6).to(dtype)
    with PrefixStore(model, host_gb=0.1, max_tokens=512) as store:
        for seed in range(4):
            ids = prompt(300, seed)
            first, tokens = answer(store, ids)
            assert first.report.restored_tokens == 0
            again, repeated = answer(store, ids)
            assert again.report.restored_tokens == 288
            assert repeated == tokens
            if dtype == torch.float32:
                assert tokens == plain(model, ids, 16)


def test_logits_are_bit_equal_to_a_cache_split_at_the_same_place() -> None:
    model = llama(device="cuda", hidden_size=256, num_hidden_layers=6)
    ids = torch.tensor([prompt(200)], device="cuda")
    with PrefixStore(model, host_gb=0.1, max_tokens=256) as store:
        with torch.inference_mode(), store.open(ids) as own:
            model(input_ids=ids[:, :192], past_key_values=own)
            expected = model(input_ids=ids[:, 192:], past_key_values=own).logits
            assert own.keep() == 12
        with torch.inference_mode(), store.open(ids) as restored:
            assert restored.report.restored_tokens == 192
            logits = model(input_ids=ids[:, 192:], past_key_values=restored).logits
        assert torch.equal(logits, expected)


def test_a_flipped_bit_is_computed_anew() -> None:
    model = llama(device="cuda")
    ids = prompt(100)
    with PrefixStore(model, host_gb=0.05, max_tokens=256) as store:
        answer(store, ids)
        slots, _, _ = store.cache.published(0, store._arena.header.n_slots)
        for slot in slots.tolist():
            np.frombuffer(store._arena.buffer, np.uint8)[store._arena.data_of(slot) + 9] ^= 1
        out, tokens = answer(store, ids)
        assert (out.report.restored_tokens, out.report.missing) == (0, "failed")
        assert tokens == plain(model, ids, 16)


def test_a_store_starts_warm_from_disk(tmp_path: Any) -> None:
    model = llama(device="cuda")
    ids = prompt(100)
    for run in range(2):
        with PrefixStore(
            model, host_gb=0.05, disk_gb=0.1, disk_path=str(tmp_path), max_tokens=256
        ) as store:
            out, tokens = answer(store, ids)
            assert tokens == plain(model, ids, 16)
            for _ in range(200 if run == 0 else 0):
                if store.cache.stats()["disk"]["published"] >= out.kept_blocks:
                    break
                store.settle(0.05)
    assert out.report.restored_tokens == out.report.from_disk_tokens == 96
