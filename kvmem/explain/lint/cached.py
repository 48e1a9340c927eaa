"""How many tokens of each prompt an engine would find computed, if it forgot nothing.

    for cached in predict_cached_tokens(prompts, block_tokens=16): ...

This is vLLM's arithmetic (v1/core/kv_cache_manager.py, `get_computed_blocks`): whole blocks only,
and never the prompt's last token, whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

from kvmem.hashing import BlockHasher

__all__ = ["MOST_BLOCKS", "IdCache", "PrefixCache", "predict_cached_tokens"]

MOST_BLOCKS = 1_000_000  # keys remembered: about 130 bytes each


class PrefixCache:
    """Blocks of every prompt seen, by their chained keys; the least lately used leave first.

    Args:
        block_tokens: tokens in a block, 1 to 4,096.
        most_blocks: keys remembered.

    Raises:
        ValueError: block_tokens out of range.
    """

    def __init__(self, block_tokens: int = 16, most_blocks: int = MOST_BLOCKS) -> None:
        self._hasher = BlockHasher("sha256_cbor", block_tokens, "kvmem-lint")
        self._block_tokens = block_tokens
        self._most = most_blocks
        self._known: dict[bytes, None] = {}

    def find(self, prompt: Sequence[int], output: Sequence[int] = (), *, place: str = "") -> int:
        """Tokens of `prompt` found; the prompt and its output are remembered then.

        The last token of an output is sampled and never computed, so it fills no block. `place`:
        the cache that it is sent to, where a log is of several.
        """
        tokens = [*prompt, *output[:-1]]
        n = len(tokens) // self._block_tokens
        extra = [(place,), *[None] * (n - 1)] if place and n else None
        keys = list(self._hasher.hash_blocks(tokens, extra_keys=extra))
        most = max(0, (len(prompt) - 1) // self._block_tokens)
        found = 0
        while found < min(most, len(keys)) and keys[found] in self._known:
            found += 1
        for key in reversed(keys):  # the first block is the newest: leaves leave first
            self._known.pop(key, None)
            self._known[key] = None
        while len(self._known) > self._most:
            del self._known[next(iter(self._known))]
        return found * self._block_tokens


def predict_cached_tokens(
    prompts: Iterable[Sequence[int]], *, block_tokens: int = 16
) -> Iterator[int]:
    """Cached tokens of each prompt, in the order they are sent, each after the one before ended.

    Args:
        prompts: token ids, as the engine gets them.
        block_tokens: the engine's block size.

    Raises:
        ValueError: block_tokens out of range.
    """
    cache = PrefixCache(block_tokens)
    for prompt in prompts:
        yield cache.find(prompt)


class IdCache:
    """The same for prompts that are the ids of chained blocks: an id says all that precedes it."""

    def __init__(self, most_ids: int = 2 * MOST_BLOCKS) -> None:
        self._most = most_ids
        self._n = 0
        self._scopes: dict[Hashable, set[int]] = {}

    def find(
        self, ids: list[int], *, known: int, scope: Hashable, tokens: int | None, per_id: int
    ) -> int:
        """Tokens of a prompt found; it is remembered then.

        Args:
            ids: of its blocks.
            known: of the first ones, which are the front of an earlier prompt of this scope.
            scope: in which ids mean the same.
            tokens: in the prompt, where its last block may be partial.
            per_id: tokens in a block.
        """
        seen = self._scopes.pop(scope, None)
        if seen is None:
            seen, known = set(), 0
        self._scopes[scope] = seen  # the newest
        n = min(known, len(ids))
        while n < len(ids) and ids[n] in seen:
            n += 1
        size = len(seen)
        seen.update(ids[n:])
        self._n += len(seen) - size
        while self._n > self._most and len(self._scopes) > 1:
            self._n -= len(self._scopes.pop(next(iter(self._scopes))))
        if self._n > self._most:
            self._n = 0
            seen.clear()
        total = len(ids) * per_id if tokens is None else tokens
        return min(n, max(0, (total - 1) // per_id)) * per_id
