"""Every key is the one that vLLM's own functions compute, through a real Request."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmem.hashing import BlockHasher, TokenCursor

pytestmark = pytest.mark.engine

algorithms = st.sampled_from(["sha256", "sha256_cbor"])
seeds = st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
names = st.text(min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def none_hash_as_before() -> Iterator[None]:
    from vllm.v1.core import kv_cache_utils

    kept = {
        name: getattr(kv_cache_utils, name)
        for name in ("NONE_HASH", "_NONE_HASH_SEED")
        if hasattr(kv_cache_utils, name)
    }
    yield
    for name, value in kept.items():
        setattr(kv_cache_utils, name, value)


def start_engine(monkeypatch: pytest.MonkeyPatch, algorithm: str, seed: str | None) -> Callable:
    """vLLM's hash function, its first parent made in an environment with that PYTHONHASHSEED."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import init_none_hash

    if seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    fn = get_hash_fn_by_name(algorithm)
    init_none_hash(fn)
    return fn


def new_request(tokens: list[int], block_hasher: Any, **options: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    return Request(
        request_id="request",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        block_hasher=block_hasher,
        **options,
    )


def prompt(seed: int, n: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(2 ** source.randint(1, 31)) for _ in range(n)]


def extra_keys_of(request: Any, block_tokens: int) -> list[Any]:
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    keys, mm_index = [], 0
    for start in range(0, request.num_tokens - block_tokens + 1, block_tokens):
        extra, mm_index = generate_block_hash_extra_keys(
            request, start, start + block_tokens, mm_index
        )
        keys.append(extra)
    return keys


@given(
    algorithm=algorithms,
    hash_seed=seeds,
    block_tokens=st.integers(1, 300),
    n_blocks=st.integers(0, 8),
    rest=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_keys_without_extras_are_the_engines(
    algorithm: str, hash_seed: str | None, block_tokens: int, n_blocks: int, rest: float, seed: int
) -> None:
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    tokens = prompt(seed, max(1, block_tokens * n_blocks + int(rest * block_tokens)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        fn = start_engine(monkeypatch, algorithm, hash_seed)
        request = new_request(tokens, get_request_block_hasher(block_tokens, fn))
        hasher = BlockHasher(algorithm, block_tokens)
    assert hasher.hash_blocks(tokens) == request.block_hashes
    assert hasher.hash_blocks(np.array(tokens, dtype=np.int32)) == request.block_hashes
    cursor = TokenCursor(hasher)
    cursor.sync(tokens[: len(tokens) // 2])
    cursor.sync(tokens)
    assert cursor.keys() == request.block_hashes


@given(algorithm=algorithms, hash_seed=seeds)
def test_the_first_parent_is_the_engines(algorithm: str, hash_seed: str | None) -> None:
    from vllm.v1.core import kv_cache_utils

    with pytest.MonkeyPatch.context() as monkeypatch:
        start_engine(monkeypatch, algorithm, hash_seed)
        from_environment = BlockHasher(algorithm, 16).none_hash
    assert from_environment == kv_cache_utils.NONE_HASH
    if hash_seed is not None:
        assert BlockHasher(algorithm, 16, hash_seed).none_hash == kv_cache_utils.NONE_HASH


@st.composite
def images(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """(identifier, offset, length) of multimodal items in a prompt, in order, not overlapping."""
    found, at = [], 0
    for _ in range(draw(st.integers(0, 4))):
        offset = at + draw(st.integers(0, 40))
        length = draw(st.integers(1, 60))
        found.append((draw(st.sampled_from(["cat", "dog", "map"])), offset, length))
        at = offset + length
    return found


@given(
    algorithm=algorithms,
    block_tokens=st.integers(1, 40),
    n_tokens=st.integers(1, 300),
    lora=st.none() | st.tuples(names, names),
    salt=st.none() | names,
    items=images(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_keys_with_lora_images_and_salt_are_the_engines(
    algorithm: str,
    block_tokens: int,
    n_tokens: int,
    lora: tuple[str, str] | None,
    salt: str | None,
    items: list[tuple[str, int, int]],
    seed: int,
) -> None:
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    features = [
        MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, length))
        for name, offset, length in items
    ]
    tokens = prompt(seed, n_tokens)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fn = start_engine(monkeypatch, algorithm, None)
        request = new_request(
            tokens,
            get_request_block_hasher(block_tokens, fn),
            lora_request=LoRARequest(lora[0], 1, lora[1]) if lora else None,
            cache_salt=salt,
            mm_features=features,
        )
        hasher = BlockHasher(algorithm, block_tokens)
    extra_keys = extra_keys_of(request, block_tokens)
    assert hasher.hash_blocks(tokens, extra_keys=extra_keys) == request.block_hashes


@given(algorithm=algorithms, block_tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_keys_of_a_request_that_decodes_stay_the_engines(
    algorithm: str, block_tokens: int, seed: int
) -> None:
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    tokens = prompt(seed, 100)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fn = start_engine(monkeypatch, algorithm, None)
        request = new_request(tokens[:60], get_request_block_hasher(block_tokens, fn))
        cursor = TokenCursor(BlockHasher(algorithm, block_tokens))
    cursor.extend(tokens[:60])
    for token in tokens[60:]:
        request.append_output_token_ids(token)
        cursor.extend([token])
    assert cursor.keys() == request.block_hashes
