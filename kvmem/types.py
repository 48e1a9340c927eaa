"""Values that cross rooms."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

__all__ = ["INT8_CODECS", "GroupShape", "Namespace", "Sampled", "Scored"]


# The disk's approximate codec for elements of each kind (docs/formats.md, "stored").
INT8_CODECS = {"bfloat16": 8, "float16": 9, "float32": 10}


class GroupShape(msgspec.Struct, frozen=True):
    """How one KV-cache group of a model cuts prompts into blocks, and what of them resuming needs.

    Args:
        block_tokens: tokens of a block.
        reach_tokens: how many tokens before the point where a prompt is resumed the group reads:
            None for full attention (all of them), window - 1 for a sliding window, 1 for a state.
        chunk_tokens: for attention that reads only its own chunk of so many tokens (Llama 4).
    """

    block_tokens: int
    reach_tokens: int | None = None
    chunk_tokens: int | None = None

    @property
    def closed(self) -> bool:
        """Whether a block is of use only with all before it (I2)."""
        return self.reach_tokens is None and self.chunk_tokens is None

    def first_read(self, n_tokens: int) -> int:
        """The first token that is read by a request that resumes after `n_tokens`."""
        if self.chunk_tokens is not None:
            return n_tokens - n_tokens % self.chunk_tokens
        return max(0, n_tokens - self.reach_tokens) if self.reach_tokens is not None else 0

    def first_needed(self, n_tokens: int) -> int:
        """The block of that token; the one after the last where nothing is read."""
        return self.first_read(n_tokens) // self.block_tokens


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """All that makes stored KV valid for an engine; two engines that agree on it share blocks.

    Every field changes `digest`. `weights` is a digest of the *content* of the weight files: a
    model's name says nothing of what is in them. `groups` describe the KV-cache groups: kind,
    block size, bytes, layers.
    """

    weights: str
    model_config: str
    kv_dtype: str
    kv_layout: str
    groups: tuple[str, ...]
    tensor_parallel: int
    pipeline_parallel: int
    hash_algorithm: str
    hash_seed: str
    scheme: int = 2

    @property
    def digest(self) -> bytes:
        """32 bytes of SHA-256 over the fields in their order, msgpack-encoded with names."""
        return hashlib.sha256(b"kvmem.namespace\0" + msgspec.msgpack.encode(self)).digest()


NO_PARENT = bytes(32)  # of a prompt's first block, and of blocks that stand by themselves


class Move(msgspec.Struct, frozen=True):
    """One block's way between a slot of the host arena and a record of the disk.

    `parent`, `depth` (blocks before it) and `codec` (one of `INT8_CODECS`, or 0 for exact) are for
    the way down.
    """

    ticket: int
    group: int
    key: bytes
    slot: int
    slot_generation: int
    record: int
    record_generation: int
    parent: bytes = NO_PARENT
    depth: int = 0
    codec: int = 0


class Moved(msgspec.Struct, frozen=True):
    """What became of a move.

    `checksum` is what the receiving tier publishes the block with. `fault` is empty where all went
    well; "record" where the disk's block is not what it should be, "source" where the host's slot
    was not, "io" where the disk failed, "room" where it had none in one piece, "gone" where a far
    store has it no more.
    """

    ticket: int
    fault: str
    checksum: int = 0
    bytes: int = 0
    queued_s: float = 0.0
    io_s: float = 0.0
    check_s: float = 0.0


class Probed(msgspec.Struct, frozen=True):
    """Which of the blocks that a far store was asked for it has; `version` says of which of its
    states (`Carrier.version`)."""

    ticket: int
    found: tuple[bool, ...]
    version: int


class Quarantine(msgspec.Struct, frozen=True, kw_only=True):
    """A block of the host tier that failed a check.

    `blocks` left matching with it: itself and what hung below it. `at_s` is seconds since the
    epoch. `kept`: its bytes are still in the slot, to be looked at.
    """

    slot: int
    generation: int
    key: str
    reason: str
    blocks: int
    at_s: float
    kept: bool = True


class Recovered(msgspec.Struct, frozen=True):
    """What a store held when it was opened, least recently written first.

    Numpy arrays of n: `records` int32, `generations` and `checksums` uint64; `keys` and `parents`
    uint8 [n * 32].
    """

    records: Any
    generations: Any
    checksums: Any
    keys: Any
    parents: Any


class Scored(msgspec.Struct, frozen=True):
    """What candidate answers are worth behind one prompt.

    `logprobs[i]` is ln P(candidate i | prompt), summed over its tokens, before any temperature.
    `cached_tokens` of the prompt's `prompt_tokens` were not computed for it.
    """

    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    seconds: float


class Sampled(msgspec.Struct, frozen=True):
    """An answer to one prompt, as token ids; the rest as in `Scored`."""

    ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    seconds: float
