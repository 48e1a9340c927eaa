"""How much faster does a turn find its cached prefix than in the installed vLLM?

    python -m benchmarks.bench_index [--short]

Traffic: agents share a prompt of 8,192 tokens and take 20 turns of 500 tokens each, so that a turn
has 840 blocks of 16 on average. At each turn every arm finds the blocks that earlier turns have
left, then the turn's own blocks are stored on both sides. Arms:

    vllm          a Request's blocks hashed with vLLM's hasher and its default sha256, then
                  FullAttentionManager.find_longest_cache_hit on a filled BlockPool
    vllm match    the same match alone, hashes given
    turn list     a session's cursor given the whole token list (compare, hash what is new, match)
    turn delta    a session's cursor given the new tokens only (hash them, match from there on)
                  as an int32 array, the form a ledger keeps; `from ids` is the same from a list
    match         HostTier.match of vLLM's own list[bytes], hashes given
    stateless     every block hashed from the list, then matched (printed, not gated)

The keys are the same 32 bytes on both sides, so hits are compared block for block at every turn. A
session's opening, the shared prompt, is hashed when the session is made, before its first turn, and
is in no arm of ours but `stateless`. Time is the thread's CPU time; the arms of a turn run in
rotating order, each over all agents in one go. A ratio is that of a whole repetition (20 turns of
every agent); medians over repetitions are reported.

Inside the connector nothing is hashed, and what counts is the scheduler thread's CPU time in kvmem
a step: `connector_us_per_step` beside the step's own, 64 running requests of 8k tokens, as
bench_connector measures it.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from benchmarks import bench_connector
from benchmarks._arms import BLOCK_TOKENS
from benchmarks._report import Row, finish, table
from kvmem._core import HostTier
from kvmem.hashing import BlockHasher, TokenCursor

BLOCK = 16
SHARED_TOKENS = 8192
TURN_TOKENS = 500
TURNS = 20
AGENTS = 16
VOCABULARY = 49_152  # of the model that kvmem's tests and demo run
ARMS = ("vllm", "vllm match", "turn list", "turn delta", "from ids", "match", "stateless")


class Agent:
    """One agent's prompt, turn by turn, and its sessions in the arms that keep one."""

    def __init__(self, number: int, shared: list[int], hasher: BlockHasher, seed: int) -> None:
        self.number = number
        self.tokens = list(shared)
        self.new: list[int] = []
        self.new_array = np.zeros(0, np.int32)
        self.rng = random.Random(seed * 1000 + number)
        self.by_list = TokenCursor(hasher)
        self.by_delta = TokenCursor(hasher)
        self.by_ids = TokenCursor(hasher)
        for cursor in self.cursors():
            cursor.extend(shared)
        self.n_matched = dict.fromkeys(("turn delta", "from ids"), 0)  # blocks found last turn
        self.pool_blocks: list[Any] = []
        self.request: Request | None = None

    def cursors(self) -> tuple[TokenCursor, ...]:
        return self.by_list, self.by_delta, self.by_ids

    def next_turn(self) -> None:
        self.new = [self.rng.randrange(VOCABULARY) for _ in range(TURN_TOKENS)]
        self.new_array = np.array(self.new, np.int32)
        self.tokens = self.tokens + self.new
        self.request = Request(f"agent {self.number}", self.tokens, SamplingParams(), None)


class Vllm:
    """vLLM's prefix cache, filled as its scheduler fills it."""

    def __init__(self, n_blocks: int) -> None:
        init_none_hash(sha256)
        self.pool = BlockPool(n_blocks + 1, enable_caching=True, hash_block_size=BLOCK)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=8, head_size=128, dtype=torch.bfloat16
        )

    def match(self, hashes: list[bytes]) -> list[Any]:
        blocks, _ = FullAttentionManager.find_longest_cache_hit(
            block_hashes=hashes,
            max_length=len(hashes) * BLOCK,
            kv_cache_group_ids=[0],
            block_pool=self.pool,
            kv_cache_spec=self.spec,
            drop_eagle_block=False,
            alignment_tokens=BLOCK,
        )
        return blocks[0]

    def store(self, agent: Agent) -> None:
        """Makes the agent's computed blocks findable; shared ones are those of the first agent."""
        request, hits = agent.request, self.match(agent.request.block_hashes)
        n = len(request.block_hashes)
        agent.pool_blocks = hits + self.pool.get_new_blocks(n - len(hits))
        self.pool.cache_full_blocks(request, agent.pool_blocks, len(hits), n, BLOCK, 0)


def store(tier: HostTier, keys: list[bytes]) -> None:
    _, slots, generations, reason = tier.reserve(keys, 0, len(keys))
    if reason:
        raise RuntimeError(f"the tier of the benchmark is too small: {reason}")
    tier.publish(slots, generations, generations)


def arms(vllm: Vllm, tier: HostTier, hasher: BlockHasher) -> dict[str, Callable[[Agent], Any]]:
    """What each arm does for one agent at one turn; all answer with the hit."""

    def vllm_turn(agent: Agent) -> list[Any]:
        agent.request.block_hashes = vllm.hasher(agent.request)
        return vllm.match(agent.request.block_hashes)

    def turn_list(agent: Agent) -> int:
        agent.by_list.sync(agent.tokens)
        return tier.match(agent.by_list)

    def turn_delta(agent: Agent) -> int:
        agent.by_delta.extend(agent.new_array)
        n = tier.match(agent.by_delta, agent.n_matched["turn delta"])
        agent.n_matched["turn delta"] = n
        return n

    def from_ids(agent: Agent) -> int:
        agent.by_ids.extend(agent.new)
        n = tier.match(agent.by_ids, agent.n_matched["from ids"])
        agent.n_matched["from ids"] = n
        return n

    return {
        "vllm": vllm_turn,
        "vllm match": lambda agent: vllm.match(agent.request.block_hashes),
        "turn list": turn_list,
        "turn delta": turn_delta,
        "from ids": from_ids,
        "match": lambda agent: tier.match(agent.request.block_hashes),
        "stateless": lambda agent: tier.match(hasher.hash_packed(agent.tokens)),
    }


def repetition(n_agents: int, seed: int) -> tuple[dict[str, float], int]:
    """CPU seconds of each arm over all turns, and the number of (agent, turn) pairs."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCABULARY) for _ in range(SHARED_TOKENS)]
    hasher = BlockHasher("sha256", BLOCK)
    agents = [Agent(i, shared, hasher, seed) for i in range(n_agents)]
    n_blocks = (SHARED_TOKENS + n_agents * TURNS * TURN_TOKENS) // BLOCK + n_agents
    vllm, tier = Vllm(n_blocks), HostTier(n_blocks, "s3fifo")
    calls = arms(vllm, tier, hasher)
    spent = dict.fromkeys(ARMS, 0.0)
    for turn in range(TURNS):
        for agent in agents:
            agent.next_turn()
            agent.request.block_hashes = vllm.hasher(agent.request)
        hits: dict[str, list[Any]] = {}
        cut = turn % len(ARMS)
        for name in ARMS[cut:] + ARMS[:cut]:
            call = calls[name]
            if name == "vllm":  # the arms before it were given these hashes
                for agent in agents:
                    agent.request.block_hashes = []
            began = time.thread_time()
            hits[name] = [call(agent) for agent in agents]
            spent[name] += time.thread_time() - began
        same_hits(agents, hits)
        for agent in agents:
            vllm.store(agent)
            store(tier, agent.request.block_hashes)
    return spent, n_agents * TURNS


def same_hits(agents: list[Agent], hits: dict[str, list[Any]]) -> None:
    """Every arm found the same blocks: as many, and each under the same 32 bytes."""
    for i, agent in enumerate(agents):
        keys = agent.request.block_hashes
        found = hits["vllm"][i]
        assert [block.block_hash[:32] for block in found] == keys[: len(found)]
        for cursor in agent.cursors():
            assert bytes(cursor.packed) == b"".join(keys)
        for name in ARMS:
            n = hits[name][i] if isinstance(hits[name][i], int) else len(hits[name][i])
            assert n == len(found), f"{name} found {n} blocks, vLLM {len(found)}"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def memory_per_block(n_blocks: int = 1_000_000) -> tuple[float, dict[str, int]]:
    """Resident bytes a block of a full tier, and what the tier says of itself."""
    keys = np.random.default_rng(1).bytes(32 * n_blocks)
    before = resident_bytes()
    tier = HostTier(n_blocks, "s3fifo")
    for start in range(0, n_blocks, 10_000):
        prompt = keys[32 * start : 32 * (start + 10_000)]
        _, slots, generations, _ = tier.reserve(prompt, 0, 10_000)
        tier.publish(slots, generations, generations)
    grown = resident_bytes() - before
    stats = tier.stats()
    assert stats["published"] == n_blocks
    return grown / n_blocks, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer repetitions, under 60 s")
    parser.add_argument("--repetitions", type=int, default=0, help="at least 5")
    options = parser.parse_args()
    n_repetitions = max(5, options.repetitions or (5 if options.short else 15))
    resident, stats = memory_per_block()
    repetition(1, seed=0)  # warm-up
    gc.collect()
    gc.freeze()  # else collections of vLLM's own objects fall on the arm that allocates most
    samples: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in range(1, n_repetitions + 1):
        spent, n_turns = repetition(AGENTS, seed)
        for name in ARMS:
            samples[name].append(spent[name] / n_turns)
    rows = [
        Row.of("turn from the list", samples, ours="turn list", theirs="vllm"),
        Row.of("turn from the delta", samples, ours="turn delta", theirs="vllm"),
        Row.of("match, hashes given", samples, ours="match", theirs="vllm match"),
        Row.of("the delta as a list (not gated)", samples, ours="from ids", theirs="vllm"),
        Row.of("stateless (not gated)", samples, ours="stateless", theirs="vllm"),
    ]
    print(f"{AGENTS} agents x {TURNS} turns x {n_repetitions} repetitions, CPU time of a turn")
    print(table(rows))
    print(
        f"a full tier of 1,000,000 blocks grew the process by {resident:.1f} B a block: 32 key, "
        f"{stats['bytes_per_block']} index, {stats['side_bytes_per_block']} blocks gone"
    )
    phases = bench_connector.measure(64, BLOCK_TOKENS, BLOCK_TOKENS if options.short else 256)
    _, decode, _ = phases
    print(bench_connector.table(phases))
    finish(
        {
            "turn_list_vs_vllm": rows[0].ratio,
            "turn_delta_vs_vllm": rows[1].ratio,
            "match_given_hashes_vs_vllm": rows[2].ratio,
            "bytes_per_block": resident - 32 - stats["side_bytes_per_block"],
            "connector_us_per_step": decode.connector_us,
            "step_us": decode.step_us,
            "connector_share": decode.share,
        }
    )


if __name__ == "__main__":
    main()
