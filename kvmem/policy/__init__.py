"""Who stays and who goes: pure decisions, without I/O, clock or chance.

`Returns` learns when prompts are continued, `Keeper` says from that what each is worth keeping,
`Agents` picks by it the ends to cut in a `Room`, and `Duel` lets plain `Lru` decide while that does
better. `Tree` numbers the runs of prompts as they come.
"""

from kvmem.policy.agents import Agents
from kvmem.policy.duel import Duel
from kvmem.policy.keeper import Keeper
from kvmem.policy.lru import Lru
from kvmem.policy.returns import Returns
from kvmem.policy.room import Room, Runs
from kvmem.policy.tree import Tree

__all__ = ["Agents", "Duel", "Keeper", "Lru", "Returns", "Room", "Runs", "Tree"]
