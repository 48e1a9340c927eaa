"""From a lookup to reasons: a prompt's tokens that were not found, in runs of one reason each.

[0, stop)        found
[stop, known)    somebody computed these blocks: the tiers say what became of each
[known, shared)  the earlier prompt computed them: other weights, or they were not kept
[shared, old)    the earlier prompt had others here: what changed
[old, reach)     nobody had these before
[reach, n)       less than a block, or the last token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from kvmem._core import pack_tokens
from kvmem.explain.misses.gone import Departure, Gone
from kvmem.explain.misses.past import Past, Prompt, first_difference

__all__ = ["Fates", "Known", "Lookup", "Run", "known_of", "runs_of"]

UNKNOWN = "unknown"
OF_FATE = {
    "abandoned": "tier_error",
    "cleared": "cleared",
    "demoted": "demoted_too_slow",
    "evicted": "evicted",
    "pending": "pending",
    "published": "no_boundary",
    "quarantined": "quarantined",
    "tier_off": "tier_error",
}


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens [first, first + tokens) of a prompt were computed, and why.

    Args:
        reason: one of `kvmem.explain.misses.reasons`.
        first: the first token.
        tokens: how many.
        ms: that took about so many milliseconds.
        token: the first that differs from the earlier prompt's.
        message: which message it is in, from 0; None for the head, or where that is not known.
        role: whose message, or "system", "tools", "head".
        rule: what the linter calls the change.
        epoch: the ledger's, where it says that it rewrote its history.
        by: who had loads or stores off.
        tier: from where blocks left, or which failed.
        policy: the order that chose them.
        at_s: when, in seconds since 1970.
        for_request: for whom room was made; nobody is told of another salt's requests (I11).
    """

    reason: str
    first: int
    tokens: int
    ms: float = 0.0
    token: int | None = None
    message: int | None = None
    role: str = ""
    rule: str = ""
    epoch: int | None = None
    by: str = ""
    tier: str = ""
    policy: str = ""
    at_s: float = 0.0
    for_request: str = ""


class Fates(Protocol):
    """Who knows what became of a block."""

    def fate(self, group: int, key: bytes) -> str:
        """ "unknown", or a key of `OF_FATE`."""


class Lookup(msgspec.Struct, frozen=True):
    """What was found of a prompt.

    Args:
        start: tokens that the engine had.
        stop: tokens that were found in all.
        reach: tokens that could have been.
        blocked: the reason why what is here up to `here` was not used, if it was not.
        by: who was against it.
        here: see `blocked`.
        no_boundary: more is here, but no state or window to resume from.
    """

    start: int
    stop: int
    reach: int
    blocked: str = ""
    by: str = ""
    here: int = 0
    no_boundary: bool = False


class Known(msgspec.Struct, frozen=True, gc=False):
    """Missing blocks up to block `stop` that the tiers remember, and what became of them."""

    reason: str
    stop: int
    tier: str = ""
    departure: Departure | None = None


class _Found:
    """Runs in the making; `at` is the token that the next one begins with."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.runs: list[Run] = []

    def add(self, reason: str, stop: int, **more: object) -> None:
        if stop > self.at:
            run = Run(reason, self.at, stop - self.at, **more)  # type: ignore[arg-type]
            self.runs.append(run)
            self.at = stop


def known_of(
    keys: Sequence[bytes], first: int, last: int, fates: Fates, gone: Gone, *, no_boundary: bool
) -> list[Known]:
    """What the tiers remember of blocks [first, last): below one that was never here nothing was.

    This is asked when a request is looked up: a moment later it stores what is missing itself.

    Args:
        keys: under which kvmem has the prompt's blocks.
        first: the first block that was not found.
        last: the one after the last that could have been.
        fates: of blocks.
        gone: what is remembered of those that left.
        no_boundary: more is here, but no state or window to resume from.
    """
    known: list[Known] = []
    at, last = first, min(last, len(keys))

    def fate_of(block: int) -> str:
        fate = fates.fate(0, keys[block])
        if fate == UNKNOWN and gone.find(keys[block]) is not None:
            return "evicted"  # so long ago that the tier has forgotten it
        return fate

    while at < last:
        fate = fate_of(at)
        if fate == UNKNOWN:
            if no_boundary and not known:
                known.append(Known("no_boundary", at + 1))
                at += 1
                continue
            break
        stop = _same_until(fate_of, at, last, fate)
        tier = "disk" if fate in ("demoted", "tier_off") else ""
        departure = gone.find(keys[at]) if fate == "evicted" else None
        known.append(Known(OF_FATE.get(fate, "tier_error"), stop, tier, departure))
        at = stop
    return known


def runs_of(
    prompt: Prompt,
    lookup: Lookup,
    known: Sequence[Known],
    past: Past | None,
    shared: int,
    *,
    block_tokens: int,
    other_salt: bool,
) -> list[Run]:
    """The runs, first to last; together they are all tokens from `lookup.stop` on.

    Args:
        prompt: who asks.
        lookup: what was found.
        known: what `known_of` said of what was not.
        past: the prompt that this one was meant to extend, and `shared`.
        shared: blocks that both have.
        block_tokens: tokens of a block.
        other_salt: whether the session came with another salt before.
    """
    found = _Found(lookup.stop)
    reach = lookup.reach - lookup.reach % block_tokens
    if lookup.blocked:
        found.add(lookup.blocked, max(lookup.stop, min(lookup.here, reach)), by=lookup.by)
    for one in known:
        more = _told(one.departure, prompt.salt) if one.departure is not None else {}
        found.add(one.reason, one.stop * block_tokens, **{"tier": one.tier, **more})
    if past is None:
        found.add("salt_changed" if other_salt else "first_time", reach)
    else:
        _unknown(found, prompt, past, shared, reach, block_tokens)
    found.add("block_floor", prompt.n_tokens)
    return found.runs


def _same_until(fate_of: Callable[[int], str], first: int, last: int, fate: str) -> int:
    """The end of the blocks from `first` on that have this fate: by doubling, then by halving."""
    low, step = first + 1, 1
    while low < last and fate_of(min(last, low + step) - 1) == fate:
        low, step = min(last, low + step), step * 2
    high = min(last, low + step)  # [first, low) have it, block `high` - 1 has not, or is the last
    while low < high:
        middle = (low + high) // 2
        if fate_of(middle) == fate:
            low = middle + 1
        else:
            high = middle
    return low


def _told(departure: Departure, salt: bytes) -> dict[str, object]:
    more: dict[str, object] = {"tier": departure.tier, "policy": departure.policy}
    if departure.salt == salt:  # I11
        more |= {"at_s": departure.at_s, "for_request": departure.request_id}
    return more


def _unknown(
    found: _Found, prompt: Prompt, past: Past, shared: int, reach: int, block_tokens: int
) -> None:
    """Blocks that no tier remembers, beside those of the earlier prompt."""
    stop = min(reach, shared * block_tokens)
    if past.weights != prompt.weights:
        found.add("weights_changed", stop)
    elif past.content != prompt.content:
        found.add("adapter_changed", stop)
    elif past.store_off:
        found.add("disabled_by_request", stop, by=past.store_off)
    else:
        found.add("not_stored", stop)
    old = past.n_blocks * block_tokens
    if past.adapter != prompt.adapter:
        found.add("adapter_changed", min(reach, old, _same_tokens(past, prompt, block_tokens)))
    elif shared < past.n_blocks:
        found.add("input_changed", min(reach, old))
    found.add("first_time", reach)


def _same_tokens(past: Past, prompt: Prompt, block_tokens: int) -> int:
    """How far the two are the same in tokens, in whole blocks."""
    if prompt.tokens is None:
        return 0
    same = first_difference(past.tokens, pack_tokens(prompt.tokens), 0)
    return same - same % block_tokens
