"""Which blocks of a prompt an engine would find: its own keys, the same verbs, no engine."""

import numpy as np

from kvmem import BlockHasher, Cache, GroupShape

hasher = BlockHasher("sha256", block_tokens=16)  # vLLM's chain of block hashes, bit for bit
cache = Cache(n_slots=1024, groups=[GroupShape(block_tokens=16)])  # full attention only

# One agent's prompt was computed, and its two blocks were written.
seen = hasher.hash_blocks(list(range(32)))
room = cache.reserve("planner", 0, seen, range(len(seen)))
checksums = np.zeros(len(room.slots), np.uint64)  # of the bytes; whoever copies them takes these
cache.publish(room.slots, room.generations, checksums)

# Another agent's prompt begins the same way.
prompt = [*range(32), *range(100, 132)]
grant = cache.acquire("worker", [hasher.hash_blocks(prompt)], start=0, limit=len(prompt))
print(
    f"{grant.stop} of {len(prompt)} tokens are here; "
    f"the next block is missing because it is {grant.missing}"
)
cache.release("worker")  # until then the blocks could not leave
