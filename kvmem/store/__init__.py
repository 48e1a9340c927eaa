"""Where bytes live: the host arena; disk segments and far tiers come later."""

from __future__ import annotations

from kvmem.store.arena import Arena, LiveArena, list_live, sweep

__all__ = ["Arena", "LiveArena", "list_live", "sweep"]
