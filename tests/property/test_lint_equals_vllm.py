"""Predicted cached tokens against vLLM's own KVCacheManager, which decides them in an engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmem.explain.lint import PrefixCache

pytest.importorskip("vllm", reason="vllm is not installed: `make setup` installs it")

BLOCK = 16
_numbers = itertools.count()
# Few tokens in few runs, so that prompts share beginnings of every length.
runs = st.tuples(st.integers(0, 2), st.integers(1, 40))
prompts = st.lists(runs, min_size=1, max_size=4).map(
    lambda pieces: [token for token, n in pieces for _ in range(n)]
)
replies = st.lists(st.integers(0, 1), min_size=1, max_size=20)


def manager() -> Any:
    """vLLM's, with room for all that a test sends."""
    import torch
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1 import kv_cache_interface as kv
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import init_none_hash

    init_none_hash(get_hash_fn_by_name("sha256_cbor"))
    spec = kv.FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.bfloat16)
    config = kv.KVCacheConfig(
        num_blocks=4_000,
        kv_cache_tensors=[],
        kv_cache_groups=[kv.KVCacheGroupSpec(["layer"], spec)],
    )
    return KVCacheManager(config, 8_192, scheduler_block_size=BLOCK, hash_block_size=BLOCK)


def cached(engine: Any, prompt: list[int], reply: list[int]) -> int:
    """One request from its first step to its end, as the scheduler takes it through."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256_cbor"))
    name = f"request-{next(_numbers)}"
    request = Request(name, prompt, SamplingParams(max_tokens=99), None, block_hasher=hasher)
    blocks, found, *_ = engine.get_computed_blocks(request)
    new = len(prompt) - found
    assert engine.allocate_slots(request, new, found, blocks) is not None
    request.num_computed_tokens = len(prompt)
    for n, token in enumerate(reply, 1):
        request.append_output_token_ids([token])
        if n < len(reply):  # the last one ends the request, and is not computed
            assert engine.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
    engine.free(request)
    return found


@given(st.lists(st.tuples(st.booleans(), prompts, replies), min_size=1, max_size=12))
def test_predicted_tokens_are_vllms(sent: list[tuple[bool, list[int], list[int]]]) -> None:
    engine, cache = manager(), PrefixCache(BLOCK)
    so_far: list[int] = []
    for goes_on, tokens, reply in sent:
        prompt = [*so_far, *tokens] if goes_on else tokens
        assert cache.find(prompt, reply) == cached(engine, prompt, reply)
        so_far = [*prompt, *reply]
