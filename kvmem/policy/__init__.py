"""Who stays and who goes: pure decisions, without I/O, clock or chance.

`Returns` learns when prompts are continued, `Keeper` says from that what each is worth keeping, and
`Duel` lets plain LRU decide while that does better.
"""

from kvmem.policy.duel import Duel
from kvmem.policy.keeper import Keeper
from kvmem.policy.returns import Returns

__all__ = ["Duel", "Keeper", "Returns"]
