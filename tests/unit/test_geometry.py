"""The engine's KV-cache groups: what each needs to be resumed, and how many bytes it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvmem.engines.vllm.geometry import geometry_of
from kvmem.errors import UnsupportedEngine

pytestmark = pytest.mark.engine
PAGE = 32 * 3 * 64 * 2 * 2


def attention(kind: str = "FullAttentionSpec", **changes: Any) -> Any:
    import torch
    from vllm.v1 import kv_cache_interface

    shape = {"block_size": 32, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    return getattr(kv_cache_interface, kind)(**{**shape, **changes})


def states(mode: str = "align", **changes: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    shapes = {"shapes": ((3, 8), (4, 4)), "dtypes": (torch.float32, torch.bfloat16)}
    return MambaSpec(**{"block_size": 64, **shapes, "mamba_cache_mode": mode, **changes})


def cache_config(*specs: Any, hash_tokens: int | None = None) -> Any:
    groups = [
        SimpleNamespace(kv_cache_spec=s, layer_names=["a", "b"], is_eagle_group=False)
        for s in specs
    ]
    return SimpleNamespace(kv_cache_groups=groups, hash_block_size=hash_tokens, num_blocks=7)


def geometry(*specs: Any, hash_tokens: int | None = None) -> Any:
    return geometry_of(None, cache_config(*specs, hash_tokens=hash_tokens))  # type: ignore[arg-type]


def test_a_block_is_all_the_layers_of_its_group() -> None:
    found = geometry(attention())
    (group,) = found.groups
    assert (group.layers, group.pages, group.block_bytes) == (("a", "b"), (PAGE, PAGE), 2 * PAGE)
    assert (found.n_device_blocks, found.slot_bytes, found.hash_tokens) == (7, 2 * PAGE, 32)
    assert (group.shape.block_tokens, group.shape.reach_tokens) == (32, None)


def test_every_group_needs_what_its_layers_read() -> None:
    window = attention("SlidingWindowSpec", sliding_window=100)
    found = geometry(attention(), window, states(), hash_tokens=32)
    assert [g.shape.reach_tokens for g in found.groups] == [None, 99, 1]
    assert [g.from_offers for g in found.groups] == [False, False, True]
    assert (found.block_tokens, found.hash_tokens) == (64, 32)
    # after 256 tokens:  all;  tokens [157, 256) of blocks of 32;  the state at 256
    assert [g.shape.first_needed(256) for g in found.groups] == [0, 4, 3]


def test_chunks_are_read_from_their_own_first_token_on() -> None:
    chunks = attention("ChunkedLocalAttentionSpec", attention_chunk_size=80)
    shape = geometry(attention(), chunks, hash_tokens=32).groups[1].shape
    assert not shape.closed
    # the chunks begin at 0, 80, 160, 240, in blocks 0, 2, 5, 7; after 160 nothing is read
    assert [shape.first_needed(32 * n) for n in (1, 2, 3, 5, 6, 8)] == [0, 0, 2, 5, 5, 7]


def test_the_slot_holds_the_largest_groups_block_and_padding_is_not_copied() -> None:
    padded = states(page_size_padded=4096)
    found = geometry(attention(), padded, hash_tokens=32)
    assert [g.block_bytes for g in found.groups] == [2 * PAGE, 2 * (3 * 8 * 4 + 4 * 4 * 2)]
    assert found.slot_bytes == 2 * PAGE


def test_windows_that_the_engine_keeps_in_full_are_full_attention() -> None:
    found = geometry(attention(sliding_window=128))
    assert found.groups[0].shape.reach_tokens is None


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (lambda: [attention("CrossAttentionSpec")], "CrossAttentionSpec"),
        (lambda: [attention(), states("none")], "prefix caching"),
        (lambda: [attention(), states(num_speculative_blocks=2)], "speculative"),
        (lambda: [attention() for _ in range(65)], "65 KV-cache groups"),
    ],
)
def test_kinds_that_nobody_has_tried_are_refused_by_name(specs: Any, words: str) -> None:
    with pytest.raises(UnsupportedEngine, match=words):
        geometry(*specs())


def test_a_draft_models_own_kv_is_refused() -> None:
    config = cache_config(attention())
    config.kv_cache_groups[0].is_eagle_group = True
    with pytest.raises(UnsupportedEngine, match="draft model"):
        geometry_of(None, config)  # type: ignore[arg-type]


@pytest.mark.parametrize(("unit", "told"), [(None, 32), (8, 8)])
def test_where_the_engine_tells_no_hash_size_its_own_rule_does(unit: int | None, told: int) -> None:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=True, prefix_match_unit=unit),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        kv_transfer_config=object(),
    )
    found = geometry_of(config, cache_config(attention(), states()))  # type: ignore[arg-type]
    assert found.hash_tokens == told


@pytest.mark.parametrize("together", [False, True])
def test_mla_is_served_only_where_the_engine_caches_it_itself(together: bool) -> None:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    spec = attention("MLAAttentionSpec", num_kv_heads=1, head_size=576)
    whole = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"a": spec, "b": spec})
    config = cache_config(whole if together else spec)
    caching = SimpleNamespace(enable_prefix_caching=True)
    engine: Any = SimpleNamespace(cache_config=caching)
    assert geometry_of(engine, config).groups[0].shape.reach_tokens is None
    caching.enable_prefix_caching = False
    with pytest.raises(UnsupportedEngine, match="MLA with prefix caching off"):
        geometry_of(engine, config)


def test_hashes_that_do_not_end_with_the_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="hashes over 48 tokens"):
        geometry(attention(), hash_tokens=48)


@pytest.mark.parametrize("missing", ["KVConnectorTransferResults", "boundary_state_offloads"])
def test_an_older_engine_that_cannot_tell_is_refused_for_several_groups(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.sched import output

    if missing == "KVConnectorTransferResults":
        monkeypatch.delattr(base, missing)
    else:
        monkeypatch.delattr(output, "KVConnectorBlockState")
    with pytest.raises(UnsupportedEngine, match="newer vLLM"):
        geometry(attention(), states())
    geometry(attention())
