"""A quote: what a prompt would cost if it were sent now, as a value.

Tokens are counted, not estimated: sent before anything leaves a tier, the prompt is answered so.
Milliseconds are estimates by what this engine measured so far; None where it has measured nothing
of that kind yet.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Quote"]


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """What of a prompt's `prompt` tokens would come from where, and what the rest would cost.

    `ms` is from the scheduler's first look at it to the end of its prefill, in an engine without
    other requests (`running` says how many there are); `ms_cold` if nothing of it were here.
    `misses` are the runs that would be computed, each with its reason and the fix, as in a receipt.
    `off` says what is off for all requests, and by whom. `exact` is False where the salt allows
    approximate KV. No far store is asked: `far` is 0, and what only such a store has is `computed`.
    """

    prompt: int
    device: int
    host: int
    disk: int
    far: int = 0
    computed: int
    ms: float | None
    ms_cold: float | None
    disk_ms: float | None
    load_ms: float | None
    prefill_ms: float | None
    misses: tuple[dict[str, Any], ...] = ()
    off: dict[str, str] = {}
    running: int = 0
    exact: bool = True

    @property
    def reused(self) -> int:
        """Tokens that would not be computed."""
        return self.prompt - self.computed
