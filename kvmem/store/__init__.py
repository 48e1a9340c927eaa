"""Where bytes live: the host arena and the disk; far tiers come later."""

from __future__ import annotations

from kvmem.store.arena import Arena, LiveArena, list_live, sweep
from kvmem.store.capacity import check_room
from kvmem.store.disk import Disk
from kvmem.store.scrub import Scrub
from kvmem.store.switch import Switch, read_switch, set_switch

__all__ = [
    "Arena",
    "Disk",
    "LiveArena",
    "Scrub",
    "Switch",
    "check_room",
    "list_live",
    "read_switch",
    "set_switch",
    "sweep",
]
