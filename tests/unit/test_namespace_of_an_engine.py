"""What an engine's namespace is made of: its weights' content and its settings, not its model's
name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kvmem.config import Config
from kvmem.engines.vllm.geometry import geometry_of
from kvmem.engines.vllm.namespace import namespace_of

pytestmark = pytest.mark.engine


def digest(model: Path | str, **options: Any) -> bytes:
    """The digest of an engine started with these options."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    config = EngineArgs(model=str(model), **{"block_size": 32, **options}).create_engine_config()
    spec = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    kv = KVCacheConfig(
        num_blocks=10, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["a"], spec)]
    )
    return namespace_of(Config(), config, kv, geometry_of(config, kv)).digest


@pytest.fixture(scope="module")
def base(smollm2: str) -> bytes:
    return digest(smollm2)


@pytest.fixture
def copied(smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model in another folder, with a cache of digests of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(smollm2, tmp_path / "another-name"))


def test_the_same_content_under_another_name_is_the_same_namespace(
    base: bytes, copied: Path
) -> None:
    assert digest(copied) == base


def test_one_other_bit_in_the_weights_is_another_namespace(base: bytes, copied: Path) -> None:
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert digest(copied) != base


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"prefix_caching_hash_algo": "sha256_cbor"},
        {"hf_overrides": {"rope_theta": 12345.0}},
        {"kv_cache_dtype": "fp8"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_another_setting_that_changes_kv_is_another_namespace(
    base: bytes, smollm2: str, options: dict[str, Any]
) -> None:
    assert digest(smollm2, **options) != base


def test_another_hash_seed_is_another_namespace(
    base: bytes, smollm2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert digest(smollm2) != base


def test_a_settings_digest_takes_the_files_place(smollm2: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from kvmem.engines.vllm.namespace import _weights

    config = EngineArgs(model=smollm2, block_size=32).create_engine_config()
    assert _weights(Config(weights_digest="a" * 64), config) == "a" * 64
    assert _weights(Config(), config) != "a" * 64
