"""A trace under several eviction orders and capacities: what would another size, or order, do?"""

from kvmem.explain.replay.forest import Forest
from kvmem.explain.replay.orders import ORDERS
from kvmem.explain.replay.play import Played, Prefill, Prompt, play

__all__ = ["ORDERS", "Forest", "Played", "Prefill", "Prompt", "play"]
