"""How the engine cuts KV into blocks: its KV-cache groups, and what each needs to be resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from kvmem.engines.vllm.support import refuse
from kvmem.types import INT8_CODECS, GroupShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

__all__ = ["Geometry", "Group", "geometry_of"]

MAX_GROUPS = 64
_MODELS = "Use a model whose layers are full attention, sliding windows, chunks or states."


class Group(msgspec.Struct, frozen=True):
    """One KV-cache group of the engine: `pages[i]` bytes of a block lie in layer `layers[i]`.

    `from_offers`: the engine says itself which block holds which state (its mamba mode "align").
    `int8`: the disk's approximate codec for its elements; 0 where they are none that it is for.
    """

    shape: GroupShape
    layers: tuple[str, ...]
    pages: tuple[int, ...]
    from_offers: bool = False
    int8: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over the group's layers."""
        return sum(self.pages)


class Geometry(msgspec.Struct, frozen=True):
    """The engine's blocks, in groups; one of its hashes is over `hash_tokens` tokens."""

    groups: tuple[Group, ...]
    n_device_blocks: int
    hash_tokens: int

    @property
    def shapes(self) -> tuple[GroupShape, ...]:
        """The groups' shapes."""
        return tuple(group.shape for group in self.groups)

    @property
    def block_tokens(self) -> int:
        """Prompts are resumed at multiples of so many tokens."""
        return math.lcm(*(shape.block_tokens for shape in self.shapes))

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest group's block."""
        return max(group.block_bytes for group in self.groups)


def geometry_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Geometry:
    """The geometry of the engine's blocks.

    Raises:
        UnsupportedEngine: a kind of attention, or a combination, that is not served yet.
    """
    cache_groups = kv_cache_config.kv_cache_groups
    groups = tuple(_group_of(group) for group in cache_groups)
    if len(groups) > MAX_GROUPS:
        refuse(f"a model with {len(groups)} KV-cache groups", "Use another model.")
    if len(groups) > 1:
        _check_several(vllm_config, groups)
    _check_latent(vllm_config, kv_cache_config)
    hash_tokens = _hash_tokens(vllm_config, kv_cache_config, groups)
    for group in groups:
        if group.shape.block_tokens % hash_tokens:
            refuse(
                f"block hashes over {hash_tokens} tokens with blocks of {group.shape.block_tokens}",
                "Leave out --hash-block-size and --prefix-match-unit.",
            )
    return Geometry(
        groups=groups, n_device_blocks=kv_cache_config.num_blocks, hash_tokens=hash_tokens
    )


def _hash_tokens(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, groups: tuple[Group, ...]
) -> int:
    told = getattr(kv_cache_config, "hash_block_size", None)
    if told is not None:
        return int(told)
    if len(groups) == 1:
        return groups[0].shape.block_tokens
    # Before 0.32 the engine's core tells no connector, and --prefix-match-unit has a say in it.
    # A wrong guess would take the key of a shorter prefix for a block's (I1).
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    return int(resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1])


def _group_of(group: KVCacheGroupSpec) -> Group:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    whole = group.kv_cache_spec
    layers = tuple(group.layer_names)
    if isinstance(whole, UniformTypeKVCacheSpecs):
        specs = [whole.kv_cache_specs[name] for name in layers]
    else:
        specs = [whole] * len(layers)
    if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
        refuse("KV that the engine keeps on the host itself", "Leave out --hisparse.")
    if getattr(group, "is_eagle_group", False):
        refuse("a draft model with KV of its own", "Leave out --speculative-config.")
    shapes = {_shape_of(spec, whole.block_size) for spec in specs}
    if len(shapes) > 1:
        refuse("layers of several kinds in one KV-cache group", _MODELS)
    return Group(
        shape=shapes.pop(),
        layers=layers,
        pages=tuple(_real_bytes(spec) for spec in specs),
        from_offers=getattr(specs[0], "mamba_cache_mode", None) == "align",
        int8=_int8_of(specs),
    )


def _int8_of(specs: Sequence[KVCacheSpec]) -> int:
    """Heads' keys and values only: latents and states were not measured."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    kinds = {str(getattr(s, "dtype", "")).removeprefix("torch.") for s in specs}
    if len(kinds) > 1 or any(type(s) not in (FullAttentionSpec, SlidingWindowSpec) for s in specs):
        return 0
    return INT8_CODECS.get(kinds.pop(), 0)


def _shape_of(spec: KVCacheSpec, block_tokens: int) -> GroupShape:
    """What resuming needs of a layer. Kinds that nobody has tried are refused, subclasses too."""
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    # Told that there is no hybrid manager, vLLM keeps windows in full, as full attention.
    if type(spec) in (FullAttentionSpec, MLAAttentionSpec):
        return GroupShape(block_tokens)
    if type(spec) is SlidingWindowSpec:
        more = getattr(spec, "extra_retained_tokens", 0)
        return GroupShape(block_tokens, spec.sliding_window - 1 + more)
    if type(spec) is ChunkedLocalAttentionSpec:
        return GroupShape(block_tokens, chunk_tokens=spec.attention_chunk_size)
    if type(spec) is MambaSpec:
        if spec.mamba_cache_mode == "none":
            refuse(
                "a model with states whose prefix caching is off", "Set --enable-prefix-caching."
            )
        if spec.num_speculative_blocks:
            refuse("speculative decoding with states", "Leave out --speculative-config.")
        return GroupShape(block_tokens, 1)
    return refuse(f"{type(spec).__name__} KV", _MODELS)


def _real_bytes(spec: KVCacheSpec) -> int:
    """Bytes of a layer's block, without what pads it to the other groups' size."""
    return int(getattr(spec, "real_page_size_bytes", spec.page_size_bytes))


def _check_latent(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Without AMX vLLM's CPU kernel computes MLA wrong on top of cached tokens: vLLM turns its own
    prefix cache off because of that, but asks a connector for tokens all the same."""
    from vllm.v1.kv_cache_interface import MLAAttentionSpec, UniformTypeKVCacheSpecs

    for group in kv_cache_config.kv_cache_groups:
        whole = group.kv_cache_spec
        several = isinstance(whole, UniformTypeKVCacheSpecs)
        specs = whole.kv_cache_specs.values() if several else (whole,)
        latent = any(isinstance(spec, MLAAttentionSpec) for spec in specs)
        if latent and not vllm_config.cache_config.enable_prefix_caching:
            refuse("MLA with prefix caching off", "Leave prefix caching on, on a CPU with AMX.")


def _check_several(vllm_config: VllmConfig, groups: tuple[Group, ...]) -> None:
    """What several groups need of the engine, beyond what one does."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.v1.core.sched import output

    if not hasattr(base, "KVConnectorTransferResults"):
        refuse("several KV-cache groups with this vLLM", "Install a newer vLLM.")
    state = getattr(output, "KVConnectorBlockState", None)
    told = "boundary_state_offloads" in getattr(state, "__dataclass_fields__", {})
    if any(group.from_offers for group in groups) and not told:
        refuse("a model with states with this vLLM", "Install a newer vLLM.")
