"""Far tiers: blocks in a store that many hosts share, behind one narrow Protocol."""

from __future__ import annotations

from kvmem.store.far.base import FarStore, Unsupported
from kvmem.store.far.open import check_url, open_far
from kvmem.store.far.tier import Far

__all__ = ["Far", "FarStore", "Unsupported", "check_url", "open_far"]
