"""vLLM's block keys, bit for bit: what an engine will ask for, known before it is asked.

    hasher = BlockHasher("sha256_cbor", 16)
    keys = hasher.hash_blocks(tokens)

    cursor = TokenCursor(hasher)
    cursor.extend(delta)  # hashes the new blocks only
    tier.match(cursor)

A key is the SHA-256 of (parent's key, token ids of the block, extra keys), serialised by pickle
(`sha256`) or by canonical CBOR (`sha256_cbor`); vLLM's `v1/core/kv_cache_utils.py` and
`utils/hashing.py` are the reference.

pickle writes an object that it meets twice as a reference to the first. So a `sha256` key of a
block with extra keys (LoRA, multimodal items, cache salt, prompt embeddings) depends on which of
their strings are one object, not only on what they say. The engine's tags ("lora", "mm",
"cache_salt", "prompt_embeds") are constants, one object however often they occur, and count as
that here too. All else counts as the objects handed over: with the very tuples of the engine's
`generate_block_hash_extra_keys` the keys are the engine's. Rebuilt elsewhere they are, unless two
strings of one block are equal and are one object on one side only (an adapter named like its path
or like the salt, one image twice in a block): then a key is not found that could have been.
`sha256_cbor` depends on values alone.
"""

from __future__ import annotations

import hashlib
import os
import pickle

from kvmem._core import BlockHasher as _BlockHasher
from kvmem._core import TokenCursor, xxh3_64

__all__ = ["BlockHasher", "TokenCursor", "session_extra_keys", "xxh3_64"]

# vLLM's v1/core/kv_cache_utils.py, DEFAULT_NONE_HASH_SEED.
_DEFAULT_SEED = "vllm-none-hash"


class BlockHasher(_BlockHasher):
    """The keys of a prompt's blocks, equal to the engine's.

    Never changes; may be used from any thread.

    Args:
        algorithm: "sha256" or "sha256_cbor", the engine's `--prefix-caching-hash-algo`.
        block_tokens: tokens in a block, 1 to 4,096: the engine's hash block size.
        seed: what the engine's first parent is made from. None takes what an engine in this
            process's environment would: PYTHONHASHSEED, or else vLLM's fixed default.

    Raises:
        ValueError: unknown algorithm, block_tokens out of range.
    """

    def __init__(self, algorithm: str, block_tokens: int, seed: str | None = None) -> None:
        if seed is None:
            seed = os.environ.get("PYTHONHASHSEED", _DEFAULT_SEED)
        super().__init__(algorithm, block_tokens, _none_hash(algorithm, seed))

    def __repr__(self) -> str:
        return f"<BlockHasher {self.algorithm}: {self.block_tokens} tokens a block>"


def _none_hash(algorithm: str, seed: str) -> bytes:
    """vLLM's NONE_HASH: the digest of the serialised seed."""
    if algorithm == "sha256_cbor":
        return hashlib.sha256(_cbor_text(seed)).digest()
    return hashlib.sha256(pickle.dumps(seed, protocol=5)).digest()


def _cbor_text(text: str) -> bytes:
    """A CBOR text string (RFC 8949, section 3.1, major type 3), in its shortest form."""
    data = text.encode()
    n = len(data)
    if n < 24:
        return bytes([0x60 | n]) + data
    for head, width in ((0x78, 1), (0x79, 2), (0x7A, 4)):
        if n < 1 << 8 * width:
            return bytes([head]) + n.to_bytes(width, "big") + data
    raise ValueError(f"a seed of {n} bytes")


def session_extra_keys(
    *, lora: tuple[str, str] | None = None, cache_salt: str | None = None
) -> dict[str, tuple[tuple[str, ...], ...] | None]:
    """What a text session's cursor needs: `TokenCursor(hasher, **session_extra_keys(...))`.

    Args:
        lora: the adapter's name and path as the engine has them; every block has them.
        cache_salt: the request's salt; the first block has it. An empty one counts as none.
    """
    adapter: tuple[tuple[str, ...], ...] = (("lora", *lora),) if lora else ()
    salted = (*adapter, ("cache_salt", cache_salt)) if cache_salt else adapter
    return {"extra_keys": adapter or None, "first_extra_keys": salted or None}
