"""Values that cross rooms."""

from __future__ import annotations

import hashlib

import msgspec

__all__ = ["Namespace"]


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """All that makes stored KV valid for an engine; two engines that agree on it share blocks.

    Every field changes `digest`. `weights` is a digest of the *content* of the weight files: a
    model's name says nothing of what is in them.
    """

    weights: str
    model_config: str
    kv_dtype: str
    kv_layout: str
    block_tokens: int
    block_bytes: int
    n_layers: int
    tensor_parallel: int
    pipeline_parallel: int
    hash_algorithm: str
    hash_seed: str
    scheme: int = 1

    @property
    def digest(self) -> bytes:
        """32 bytes of SHA-256 over the fields in their order, msgpack-encoded with names."""
        return hashlib.sha256(b"kvmem.namespace\0" + msgspec.msgpack.encode(self)).digest()
