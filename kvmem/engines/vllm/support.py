"""What this version serves; everything else is refused at start, with the flag to change.

What it needs of vLLM itself is another question, with another answer: `interface`.
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import TYPE_CHECKING

import msgspec

from kvmem.engines.vllm import interface
from kvmem.errors import UnsupportedEngine

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["Geometry", "check_engine", "check_flags", "geometry_of"]


class Geometry(msgspec.Struct, frozen=True):
    """The engine's blocks: `block_tokens` tokens and `block_bytes` bytes over all layers."""

    block_tokens: int
    block_bytes: int
    n_device_blocks: int
    layers: tuple[str, ...]
    layer_bytes: int


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuses what this version does not serve yet.

    Raises:
        UnsupportedEngine: naming the flag and what to do.
    """
    from vllm.platforms import current_platform

    interface.check()  # the connector may have been named by its own module, past `entry`
    transfer = vllm_config.kv_transfer_config
    if not current_platform.is_cpu():
        _refuse(f"device {current_platform.device_type!r}", "Use vLLM's CPU build.")
    if transfer is not None and transfer.kv_role != "kv_both":
        _refuse(f"kv_role {transfer.kv_role!r}", 'Set "kv_role": "kv_both".')
    if transfer is not None and re.search(r"_dp[0-9]+$", str(transfer.engine_id)):
        # vLLM tells each engine of several that it is alone, and marks its id.
        _refuse("--data-parallel-size above 1", "Set --data-parallel-size 1.")
    _check_features(
        vllm_config.parallel_config,
        lora=vllm_config.lora_config is not None,
        speculative=vllm_config.speculative_config is not None,
        hash_algorithm=vllm_config.cache_config.prefix_caching_hash_algo,
    )


def check_flags(arguments: Namespace) -> None:
    """Refuses the flags that `check_engine` would, before vLLM judges what they come to.

    Raises:
        UnsupportedEngine: naming the flag and what to do.
    """
    _check_features(
        arguments,
        lora=bool(arguments.enable_lora),
        speculative=arguments.speculative_config is not None,
        hash_algorithm=arguments.prefix_caching_hash_algo,
    )


def _check_features(
    parallel: object, *, lora: bool, speculative: bool, hash_algorithm: str
) -> None:
    for name, flag in (
        ("tensor_parallel_size", "--tensor-parallel-size"),
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
        ("data_parallel_size", "--data-parallel-size"),
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        size = getattr(parallel, name, 1)
        if size != 1:
            _refuse(f"{flag} {size}", f"Set {flag} 1.")
    if lora:
        _refuse("LoRA adapters", "Leave out --enable-lora.")
    if speculative:
        _refuse("speculative decoding", "Leave out --speculative-config.")
    if hash_algorithm not in ("sha256", "sha256_cbor"):
        _refuse(
            f"--prefix-caching-hash-algo {hash_algorithm} (its collisions can be made on purpose)",
            "Set --prefix-caching-hash-algo sha256.",
        )


def geometry_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Geometry:
    """The block geometry, if the engine keeps its KV in one full-attention group.

    Raises:
        UnsupportedEngine: several groups, or a kind of attention that is not served yet.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(g.kv_cache_spec).__name__ for g in groups)
        _refuse(f"a model with {len(groups)} KV-cache groups ({kinds})", _SUPPORTED_MODELS)
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec:
        _refuse(f"{type(spec).__name__} KV", _SUPPORTED_MODELS)
    assert isinstance(spec, FullAttentionSpec)
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        # Told that there is no hybrid manager, vLLM keeps such layers in full, one group for all.
        _refuse("a model with sliding-window or chunked attention", _SUPPORTED_MODELS)
    hash_tokens = getattr(kv_cache_config, "hash_block_size", None) or spec.block_size
    if hash_tokens != spec.block_size:
        _refuse(
            f"block hashes over {hash_tokens} tokens with blocks of {spec.block_size}",
            "Leave out --hash-block-size.",
        )
    layers = tuple(groups[0].layer_names)
    return Geometry(
        block_tokens=spec.block_size,
        block_bytes=spec.page_size_bytes * len(layers),
        n_device_blocks=kv_cache_config.num_blocks,
        layers=layers,
        layer_bytes=spec.page_size_bytes,
    )


_SUPPORTED_MODELS = "Use a model whose layers are all full attention."


def _refuse(what: str, next_step: str) -> None:
    raise UnsupportedEngine(
        f"kvmem's vLLM connector does not serve {what} yet",
        next_step=f"{next_step} Or start vLLM without kvmem.".lstrip(),
        feature=what,
    )
