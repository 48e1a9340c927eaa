"""What the benchmarks compute from what they saw; no clock, no engine, no files.

Tokens are ids; a block is `block_tokens` of them and counts only when whole.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable, Sequence

__all__ = [
    "SeenPrefixes",
    "bandwidth_for_ratio",
    "bootstrap_ci",
    "gap_s",
    "host_bound",
    "ideal_cached_tokens",
    "live_set_blocks",
    "percentile",
    "user_gap_s",
]

_ROOT = 0
# Idle seconds of an agent waiting for a tool: p10, p50, p90, p99 of 25,536 real calls (the trace
# weka_a of kv-cache-tester), with ends put to it so that every quantile is defined.
_TOOL_GAPS = ((0.0, 1.0), (0.1, 4.0), (0.5, 9.0), (0.9, 64.0), (0.99, 980.0), (1.0, 4000.0))
# The same of an agent waiting for a person.
_USER_GAPS = ((0.0, 3.0), (0.1, 19.0), (0.5, 126.0), (0.9, 1114.0), (0.99, 4195.0), (1.0, 17000.0))


class SeenPrefixes:
    """Every block prefix that was ever computed, as a tree: block -> number under its parent."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._children: dict[tuple[int, tuple[int, ...]], int] = {}

    def __len__(self) -> int:
        """Distinct blocks, a block after another prefix being another block."""
        return len(self._children)

    def longest(self, ids: Sequence[int]) -> int:
        """Whole blocks of the longest prefix of `ids` that was added before."""
        node, n = _ROOT, 0
        for block in _blocks(ids, self.block_tokens):
            child = self._children.get((node, block))
            if child is None:
                break
            node, n = child, n + 1
        return n

    def add(self, ids: Sequence[int]) -> int:
        """Remembers every whole block of `ids`; how many of them are new."""
        node, before = _ROOT, len(self._children)
        for block in _blocks(ids, self.block_tokens):
            node = self._children.setdefault((node, block), len(self._children) + 1)
        return len(self._children) - before


def ideal_cached_tokens(seen: SeenPrefixes, prompt: Sequence[int]) -> int:
    """Prompt tokens that an ideal cache supplies: whole blocks seen before, at most
    (n - 1) // block_tokens of them, since the last token is computed for its logits.
    """
    blocks = min(seen.longest(prompt), max(0, len(prompt) - 1) // seen.block_tokens)
    return blocks * seen.block_tokens


def live_set_blocks(prompts: Iterable[Sequence[int]], block_tokens: int) -> int:
    """Device blocks that hold all these prompts at once: shared prefixes once, and one more
    block for each prompt that does not end on a block's border.
    """
    seen, partial = SeenPrefixes(block_tokens), 0
    for prompt in prompts:
        seen.add(prompt)
        partial += len(prompt) % block_tokens != 0
    return len(seen) + partial


def host_bound(
    host_hit_s: float, native_hit_s: float, loaded_bytes: int, gather_bytes_s: float
) -> float:
    """What a host hit takes beyond the engine's own hit, over the time in which one thread
    gathers the same bytes. 1.0 is a copy at full speed with nothing around it.
    """
    return (host_hit_s - native_hit_s) / (loaded_bytes / gather_bytes_s)


def bandwidth_for_ratio(
    kv_bytes_per_token: int, prefill_tokens_s: float, load_over_compute: float
) -> float:
    """Bytes a second at which loading a token's KV takes `load_over_compute` of computing it."""
    return kv_bytes_per_token * prefill_tokens_s / load_over_compute


def bootstrap_ci(
    values: Sequence[float], *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """A percentile-bootstrap interval of the median (Efron, 1979): `level` of the medians of
    `resamples` draws with replacement lie in it.
    """
    draw = random.Random(seed)
    n = len(values)
    medians = sorted(statistics.median(draw.choices(values, k=n)) for _ in range(resamples))
    outside = (1.0 - level) / 2
    return percentile(medians, outside), percentile(medians, 1.0 - outside)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks; `share` in [0, 1]."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def gap_s(uniform: float) -> float:
    """Seconds an agent waits for its tool: the quantile `uniform` of real agents' gaps,
    log-linear between the measured ones.
    """
    return _quantile(_TOOL_GAPS, uniform)


def user_gap_s(uniform: float) -> float:
    """The same of an agent that waits for a person."""
    return _quantile(_USER_GAPS, uniform)


def _quantile(measured: Sequence[tuple[float, float]], uniform: float) -> float:
    for (low, shorter), (high, longer) in itertools.pairwise(measured):
        if uniform <= high:
            return float(shorter * (longer / shorter) ** ((uniform - low) / (high - low)))
    return measured[-1][1]


def _blocks(ids: Sequence[int], size: int) -> Iterable[tuple[int, ...]]:
    return (tuple(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size))
