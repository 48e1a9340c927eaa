"""transformers with kept prefixes: the answers are those without, and blocks were restored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kvmem import events  # noqa: E402
from kvmem.engines.transformers import PrefixStore  # noqa: E402
from kvmem.engines.transformers import store as store_module  # noqa: E402
from kvmem.errors import (  # noqa: E402
    CapacityError,
    ConfigError,
    EngineError,
    UnsupportedEngine,
)
from tests.tiny_models import llama, mistral_with_a_window, plain, prompt  # noqa: E402

GB = 0.02


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def store(model: Any) -> Iterator[PrefixStore]:
    with PrefixStore(model, host_gb=GB, max_tokens=256, lanes=2) as store:
        yield store


def answer(store: PrefixStore, ids: list[int], n_new: int = 8, **kwargs: Any) -> Any:
    out = store.generate(ids, max_new_tokens=n_new, do_sample=False, **kwargs)
    return out, out.tokens[0].tolist()


def test_a_kept_prompt_is_restored_and_answered_the_same(store: PrefixStore, model: Any) -> None:
    ids = prompt(100)
    wanted = plain(model, ids, 8)
    first, tokens = answer(store, ids)
    assert (first.report.restored_tokens, first.report.missing) == (0, "new")
    assert tokens == wanted
    assert first.kept_blocks == (100 + 7) // 16  # the answer's last token was never fed
    second, tokens = answer(store, ids)
    assert second.report.restored_tokens == 96
    assert second.report.missing == "none"
    assert tokens == wanted
    assert second.kept_blocks == 0


def test_a_longer_prompt_uses_the_answer_of_the_last_one(store: PrefixStore, model: Any) -> None:
    _, history = answer(store, prompt(50), 20)
    longer = history + prompt(30, seed=1)
    out, tokens = answer(store, longer)
    assert out.report.restored_tokens == (50 + 19) // 16 * 16
    assert out.report.missing == "new"
    assert tokens == plain(model, longer, 8)


def test_logits_are_bit_equal_to_a_cache_split_at_the_same_place(
    store: PrefixStore, model: Any
) -> None:
    ids = torch.tensor([prompt(120)])
    with torch.inference_mode(), store.open(ids) as own:
        model(input_ids=ids[:, :112], past_key_values=own)
        expected = model(input_ids=ids[:, 112:], past_key_values=own).logits
        own.keep()
    with torch.inference_mode(), store.open(ids) as restored:
        assert restored.get_seq_length() == restored.report.restored_tokens == 112
        logits = model(input_ids=ids[:, 112:], past_key_values=restored).logits
    assert torch.equal(logits, expected)


def test_blocks_come_back_bit_for_bit(store: PrefixStore, model: Any) -> None:
    ids = prompt(97)
    with torch.inference_mode(), store.open(ids) as cache:
        model(input_ids=torch.tensor([ids]), past_key_values=cache)
        assert cache.keep() == 6
        kept = [(k[:, :, :96].clone(), v[:, :, :96].clone()) for k, v in
                (layer.view() for layer in cache.layers)]  # fmt: skip
        with store.open(ids) as other:  # its own lane
            assert other.report.restored_tokens == 96
            for (keys, values), layer in zip(kept, other.layers, strict=True):
                assert torch.equal(layer.view()[0], keys)
                assert torch.equal(layer.view()[1], values)


def test_a_flipped_bit_is_computed_anew_and_quarantined(store: PrefixStore, model: Any) -> None:
    ids = prompt(100)
    answer(store, ids)
    slots, _, keys = store.cache.published(0, store._arena.header.n_slots)
    third = store._keys(ids, None)[2]
    (row,) = [i for i in range(len(slots)) if keys[32 * i : 32 * i + 32].tobytes() == third]
    at = store._arena.data_of(int(slots[row])) + 77
    np.frombuffer(store._arena.buffer, np.uint8)[at] ^= 4
    seen: list[Any] = []
    store.bus.subscribe(seen.append)
    out, tokens = answer(store, ids)
    assert out.report.restored_tokens == 32
    assert out.report.missing == "failed"
    assert tokens == plain(model, ids, 8)
    (told,) = [event for event in seen if isinstance(event, events.Quarantined)]
    assert told.blocks == 4  # and what hung below it
    assert answer(store, ids)[0].report.restored_tokens == 96  # it was kept again


def test_changed_weights_restore_and_keep_nothing() -> None:
    model = llama(seed=3)
    ids = prompt(64)
    with PrefixStore(model, host_gb=GB, max_tokens=128) as store:
        answer(store, ids)
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1.0
        out, tokens = answer(store, ids)
        assert (out.report.restored_tokens, out.report.missing) == (0, "weights")
        assert out.kept_blocks == 0
        assert tokens == plain(model, ids, 8)


def test_a_model_made_in_inference_mode_is_served() -> None:
    with torch.inference_mode():
        model = llama(seed=6)
    ids = prompt(64)
    with PrefixStore(model, host_gb=GB, max_tokens=128) as store:
        answer(store, ids)
        out, tokens = answer(store, ids)
        assert out.report.restored_tokens == 48
        assert tokens == plain(model, ids, 8)
        with torch.inference_mode():
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2, False)
        assert answer(store, ids)[0].report.missing == "weights"


def test_other_weights_and_other_blocks_are_other_namespaces(store: PrefixStore) -> None:
    with PrefixStore(llama(), host_gb=GB, max_tokens=64) as same:
        assert same.namespace == store.namespace
    changed = llama()
    with torch.no_grad():
        changed.model.embed_tokens.weight[5, 5] += 1e-3
    with PrefixStore(changed, host_gb=GB, max_tokens=64) as other:
        assert other.namespace.digest != store.namespace.digest
    with PrefixStore(llama(), host_gb=GB, max_tokens=64, block_tokens=32) as other:
        assert other.namespace.digest != store.namespace.digest
    with PrefixStore(llama(rope_theta=5e4), host_gb=GB, max_tokens=64) as other:
        assert other.namespace.digest != store.namespace.digest


def test_a_salt_sees_only_its_own(store: PrefixStore) -> None:
    ids = prompt(80)
    answer(store, ids, salt="a")
    assert answer(store, ids, salt="b")[0].report.restored_tokens == 0
    assert answer(store, ids)[0].report.restored_tokens == 0
    assert answer(store, ids, salt="a")[0].report.restored_tokens == 64


MASK = torch.ones(1, 64, dtype=torch.long)
MASK[0, :5] = 0


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mask": MASK},
        {"attention_mask": torch.zeros(1, 1, 64, 64)},
        {"position_ids": torch.arange(1, 65)[None]},
        {"token_type_ids": torch.zeros(1, 64)},
    ],
    ids=["padded", "a mask of one's own", "other positions", "something else"],
)
def test_what_more_than_tokens_went_into_is_not_kept(
    store: PrefixStore, model: Any, changes: dict[str, Any]
) -> None:
    ids = torch.tensor([prompt(64)])
    with torch.inference_mode(), store.open(ids) as cache:
        cache.feed({"input_ids": ids, **changes}, ())
        for layer in cache.layers:
            layer.length = 64
        assert cache.keep() == 0
    with torch.inference_mode(), store.open(ids) as cache:
        model(inputs_embeds=model.model.embed_tokens(ids), past_key_values=cache)
        assert cache.get_seq_length() == 64
        assert cache.keep() == 0
    with torch.inference_mode(), store.open(ids) as cache:  # the inner model: nobody told us
        model.model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids, past_key_values=cache)
        assert cache.keep() == 0


def test_autocast_and_dropout_keep_nothing_and_autocast_restores_nothing(
    store: PrefixStore,
) -> None:
    model = store.model
    ids = torch.tensor([prompt(64)])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), store.open(ids) as cache:
        model(input_ids=ids, past_key_values=cache)
        assert cache.keep() == 0
    model.train()
    try:
        with torch.inference_mode(), store.open(ids) as cache:
            model(input_ids=ids, past_key_values=cache)
            assert cache.keep() == 0
    finally:
        model.eval()
    answer(store, ids[0].tolist())
    with torch.autocast("cpu", torch.bfloat16), store.open(ids) as cache:
        assert (cache.report.restored_tokens, cache.report.missing) == (0, "autocast")
    with store.open(ids) as cache:
        assert cache.report.restored_tokens == 48


def test_what_was_cropped_is_kept_under_what_replaced_it(store: PrefixStore, model: Any) -> None:
    first, second = prompt(64), prompt(40, seed=5)
    whole = first[:30] + second
    with torch.inference_mode(), store.open(first) as cache:
        model(input_ids=torch.tensor([first]), past_key_values=cache)
        cache.crop(-34)
        assert cache.get_seq_length() == 30
        model(input_ids=torch.tensor([second]), past_key_values=cache)
        assert cache.kept_tokens == whole
        assert cache.keep() == 70 // 16
    out, tokens = answer(store, whole)
    assert out.report.restored_tokens == 64
    assert tokens == plain(model, whole, 8)


def test_lanes_are_bounded_and_come_back(store: PrefixStore) -> None:
    first, second = store.open(prompt(20)), store.open(prompt(20))
    with pytest.raises(CapacityError, match="All 2 lanes") as raised:
        store.open(prompt(20))
    assert raised.value.setting == "lanes"
    first.close()
    first.close()
    store.open(prompt(20)).close()
    second.close()
    assert store.cache.stats()["leases"] == 0


def test_too_long_a_sequence_and_beams_are_refused(store: PrefixStore) -> None:
    with pytest.raises(CapacityError, match="a larger max_tokens"):
        store.generate(prompt(250), max_new_tokens=20, do_sample=False)
    with pytest.raises(UnsupportedEngine, match="num_beams"):
        store.generate(prompt(20), max_new_tokens=4, num_beams=2, do_sample=False)
    assert store.cache.stats()["leases"] == 0
    answer(store, prompt(20))  # and the lanes are back


def test_a_closed_cache_is_refused(store: PrefixStore, model: Any) -> None:
    ids = torch.tensor([prompt(20)])
    cache = store.open(ids)
    cache.close()
    with pytest.raises(EngineError, match="closed"):
        model(input_ids=ids, past_key_values=cache)
    assert cache.keep() == 0


def test_windows_and_adapters_are_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="full attention only"):
        PrefixStore(mistral_with_a_window(), host_gb=GB)
    model = llama()
    model._hf_peft_config_loaded = True
    with pytest.raises(UnsupportedEngine, match="merge_and_unload"):
        PrefixStore(model, host_gb=GB)


def test_bad_arguments_name_themselves(model: Any) -> None:
    with pytest.raises(CapacityError, match="host_gb") as raised:
        PrefixStore(model, host_gb=1e-5)
    assert raised.value.setting == "host_gb"
    with pytest.raises(ConfigError, match="max_tokens"):
        PrefixStore(model, host_gb=GB, max_tokens=0)


def test_a_store_that_cannot_prove_itself_restores_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "prove", lambda *_: "block 2 came back as another")
    ids = prompt(64)
    with PrefixStore(model, host_gb=GB, max_tokens=128) as store:
        answer(store, ids)
        out, tokens = answer(store, ids)
        assert (out.report.restored_tokens, out.report.missing) == (0, "proof")
        assert tokens == plain(model, ids, 8)


def test_a_failing_copy_costs_a_recompute(
    store: PrefixStore, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(64)
    answer(store, ids)

    def fail(*_: Any) -> Any:
        raise EngineError("the device is gone")

    seen: list[Any] = []
    store.bus.subscribe(seen.append)
    monkeypatch.setattr(store, "_copier", type("Failing", (), {"load": fail, "store": fail})())
    out, tokens = answer(store, ids + [5] * 20)
    assert out.report.restored_tokens == out.kept_blocks == 0
    assert tokens == plain(model, ids + [5] * 20, 8)
    assert [e.where for e in seen if isinstance(e, events.Failure)] == ["load", "store"]
    assert store.cache.check_integrity() == []


def test_a_new_store_starts_warm_from_disk(model: Any, tmp_path: Path) -> None:
    ids = prompt(100)
    for run in range(2):
        with PrefixStore(
            model, host_gb=GB, disk_gb=0.05, disk_path=str(tmp_path), max_tokens=128
        ) as store:
            out, tokens = answer(store, ids)
            assert tokens == plain(model, ids, 8)
            if run == 0:
                for _ in range(200):
                    if store.cache.stats()["disk"]["published"] >= out.kept_blocks:
                        break
                    store.settle(0.05)
    assert out.report.restored_tokens == out.report.from_disk_tokens == 96


def test_the_model_is_as_it_was_after_close() -> None:
    model = llama(seed=9)
    hooks = len(model._forward_pre_hooks)
    PrefixStore(model, host_gb=GB, max_tokens=64).close()
    assert len(model._forward_pre_hooks) == hooks


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_was_asked_before_the_answer_is_transformers_own(data: Any) -> None:
    model = llama(seed=4)
    # Room for about ten blocks: prompts push one another out.
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4
    with PrefixStore(model, host_gb=(10 * (block_bytes + 128) + 2**22) / 2**30,
                     max_tokens=160) as store:  # fmt: skip
        histories = [[]]
        restored = 0
        for _ in range(data.draw(st.integers(2, 8))):
            base = data.draw(st.sampled_from(histories))
            cut = data.draw(st.integers(0, len(base)))
            added = prompt(data.draw(st.integers(1, 40)), data.draw(st.integers(0, 3)))
            ids = (base[:cut] + added)[:120]
            out, tokens = answer(store, ids, data.draw(st.integers(1, 20)))
            assert tokens == plain(model, ids, len(tokens) - len(ids))
            assert store.cache.check_integrity() == []
            restored += out.report.restored_tokens
            histories.append(tokens)
        assert store.cache.stats()["leases"] == 0
        # Asked again, the last prompt is there unless it was evicted.
        again, _ = answer(store, ids, 1)
        assert again.report.restored_tokens == (len(ids) - 1) // 16 * 16 or (
            store.cache.stats()["evictions"] > 0
        )
