"""Which blocks of a prompt an engine would find: its own keys, the same verbs, no engine."""

import numpy as np

from kvmem import BlockHasher, Cache

hasher = BlockHasher("sha256", block_tokens=16)  # vLLM's chain of block hashes, bit for bit
cache = Cache(n_slots=1024)

# One agent's prompt was computed, and its two blocks were written.
seen = hasher.hash_blocks(list(range(32)))
room = cache.reserve("planner", seen, start=0, stop=len(seen))
checksums = np.zeros(len(room.slots), np.uint64)  # of the bytes; whoever copies them takes these
cache.publish(room.slots, room.generations, checksums)

# Another agent's prompt begins the same way.
asked = hasher.hash_blocks([*range(32), *range(100, 132)])
grant = cache.acquire("worker", asked, start=0, limit=len(asked))
print(
    f"{grant.n_blocks} of {len(asked)} blocks are here; "
    f"the next is missing because it is {grant.missing}"
)
cache.release("worker")  # until then the blocks could not leave
