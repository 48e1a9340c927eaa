"""What does the agent-aware policy cost the scheduler's thread, per scheduling step?

    python -m benchmarks.bench_policy [--short]

A `Cache` of 1,000,000 blocks of 16 tokens under the order "agents", full, with 10,000 sessions that
share a head and wait for one of twelve tools each, which take from a second to minutes: together
they have half as many blocks again as there is room for, so every new block is somebody's last. No
engine and
no bytes: a step is what a busy engine asks of the cache in one, 256 requests of which each
completes a block every 16 steps and ends after 200, so that 1.28 prompts come in a step, each with
40 blocks more than its session's last, and a hint comes for each second one.

CPU time of this thread within the policy, each call timed by itself less the clock's own cost:
looking a prompt's branch up, playing it in the shadow of LRU, replies, choosing whom to cut and
cutting, hints. What the index itself takes for reserve and publish is not the policy's. The step it
is held against is 20 ms, a decode step of a GPU; `p99` is of single steps, since choices are made
for many blocks at once.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import random
import resource
import time
from typing import Any

import numpy as np

from benchmarks._math import percentile
from benchmarks._report import finish
from kvmem import hints
from kvmem.cache import Cache
from kvmem.types import GroupShape

__all__: list[str] = []

SLOTS, SESSIONS = 1_000_000, 10_000
BLOCK, HEAD, MORE = 16, 40, 40
RUNNING, TOKENS, TOOLS = 256, 200, 12
DECODE_S = 0.020
TIMED = {
    "keeping": ("used", "replied", "over", "make_room"),
    "sessions": ("agent_of", "sent", "do", "expire"),
}


class Meter:
    """CPU seconds within what it wraps; nested calls count once."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.by: dict[str, float] = {}
        self._depth = 0
        began = time.thread_time()
        for _ in range(10_000):
            time.thread_time()
        self._clock = (time.thread_time() - began) / 10_000

    def wrap(self, of: Any, name: str) -> None:
        """Times calls of a method of this object."""
        real = getattr(of, name)

        @functools.wraps(real)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return real(*args, **kwargs)
            self._depth = 1
            began = time.thread_time()
            try:
                return real(*args, **kwargs)
            finally:
                took = max(0.0, time.thread_time() - began - self._clock)
                self.spent += took
                self.by[name] = self.by.get(name, 0.0) + took
                self._depth = 0

        setattr(of, name, timed)


class World:
    """Sessions, and the engine's steps over them."""

    def __init__(self, n_slots: int, n_sessions: int) -> None:
        self.now_s = 0.0
        self.cache = Cache(
            n_slots, (GroupShape(BLOCK),), eviction="agents", clock=lambda: self.now_s
        )
        self.draw = random.Random(20_261_127)
        each = n_slots * 3 // 2 // n_sessions
        self._each = each
        head = self._chain(b"", HEAD)
        self.chains = [list(head) for _ in range(n_sessions)]
        for own in self.chains:
            own.extend(self._chain(own[-1], self.draw.randint(each // 2, each * 3 // 2) - HEAD))
        self._n = 0
        self.running: list[tuple[int, str, int]] = []  # session, request, blocks published

    def _chain(self, parent: bytes, n: int) -> list[bytes]:
        made = []
        for _ in range(max(0, n)):
            parent = hashlib.sha256(parent + self.draw.randbytes(8)).digest()
            made.append(parent)
        return made

    def arrive(self, session: int) -> tuple[int, str, int]:
        """A session's next prompt, computed and published; its request."""
        cache, chain = self.cache, self.chains[session]
        self._n += 1
        request, who = f"r{self._n}", (b"", f"s{session}")
        cache.acquire(request, [chain], start=0, limit=len(chain) * BLOCK)
        assert cache.keeping is not None
        told = session % 2 == 0
        ref = cache.keeping.used(request, chain, cache.sessions.agent_of(who, told=told))
        if ref is not None:
            cache.sessions.sent(who, ref, told=told)
        self._store(request, chain, len(chain))
        return session, request, len(chain)

    def _store(self, request: str, chain: list[bytes], stop: int) -> None:
        room = self.cache.reserve(request, 0, chain, range(stop))
        self.cache.publish(room.slots, room.generations, np.ones(len(room.slots), np.uint64))
        self.cache.hold(request, 0, chain, stop)

    def decode(self, one: int) -> None:
        """A running request completes a block."""
        session, request, n = self.running[one]
        chain = self.chains[session]
        chain += self._chain(chain[-1], 1)
        self._store(request, chain, n + 1)
        self.running[one] = (session, request, n + 1)

    def wait(self, session: int) -> int:
        """Steps until a session's tool has ended: each tool has its own pace."""
        return 1 + int(40 * 1.7 ** (session % TOOLS) * self.draw.lognormvariate(0, 0.3))

    def end(self, one: int) -> int:
        """A request ends: its session waits for its tool; which session."""
        session, request, _ = self.running.pop(one)
        cache = self.cache
        assert cache.keeping is not None
        cache.keeping.replied(request, self.chains[session])
        cache.release(request)
        if session % 2 == 0:
            tool = hints.ToolStarted(tool=f"tool{session % TOOLS}")
            cache.sessions.do(tool, (b"", f"s{session}"))
        return session


def build(n_slots: int, n_sessions: int) -> World:
    """A world whose cache is full and whose sessions have all come once or more."""
    world = World(n_slots, n_sessions)
    for session in range(n_sessions):
        world.now_s += 0.01
        world.running.append(world.arrive(session))
        world.end(0)
    return world


def steps(world: World, n: int, meter: Meter) -> list[float]:
    """CPU seconds of the policy in each of so many steps."""
    draw, found = world.draw, []
    waiting = list(range(len(world.chains)))
    draw.shuffle(waiting)
    while len(world.running) < RUNNING:
        world.running.append(world.arrive(waiting.pop()))
    ready: dict[int, list[int]] = {}
    for session in waiting:
        ready.setdefault(int(world.wait(session) * draw.random()), []).append(session)
    queue: list[int] = []
    for step in range(n):
        world.now_s += DECODE_S
        queue += ready.pop(step, [])
        before = meter.spent
        for one in range(step % BLOCK, len(world.running), BLOCK):
            world.decode(one)
        ends = RUNNING // TOKENS + (draw.random() < RUNNING / TOKENS % 1)
        for _ in range(ends):
            session = world.end(draw.randrange(len(world.running)))
            ready.setdefault(step + world.wait(session), []).append(session)
        while len(world.running) < RUNNING:
            if not queue:
                queue = ready.pop(min(ready))
            session = queue.pop(0)
            chain = world.chains[session]
            if len(chain) > 3 * world._each:  # it begins anew from the head
                del chain[HEAD:]
            chain += world._chain(chain[-1], MORE)
            world.running.append(world.arrive(session))
        world.cache.settle()
        found.append(meter.spent - before)
    return found


def main() -> None:
    """Prints where the time goes, then the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a tenth of the blocks and sessions")
    args = parser.parse_args()
    scale = 10 if args.short else 1
    n_slots, n_sessions = SLOTS // scale, SESSIONS // scale
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    world = build(n_slots, n_sessions)
    meter = Meter()
    for owner, names in TIMED.items():
        for name in names:
            meter.wrap(getattr(world.cache, owner), name)
    n = 500 if args.short else 2000
    steps(world, n, meter)
    for one in range(len(world.running) - 1, -1, -1):
        world.end(one)
    meter.spent, meter.by = 0.0, {}
    cut = world.cache.stats()["policy"]["cut"]
    found = steps(world, n, meter)
    stats = world.cache.stats()["policy"]
    assert world.cache.keeping is not None
    if stats["off"] or not stats["cut"] > cut:
        raise SystemExit(f"bench_policy: nothing was decided: {stats}")
    print(f"{n} steps, {n_slots:,} blocks, {n_sessions:,} sessions; {stats}")
    for name, spent in sorted(meter.by.items(), key=lambda pair: -pair[1]):
        print(f"  {name:12} {spent / n * 1e6:8.1f} us a step")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    mean = sum(found) / n
    finish(
        {
            "policy_us_per_step": mean * 1e6,
            "policy_us_per_step_p99": percentile(found, 0.99) * 1e6,
            "policy_share_of_a_decode_step": mean / DECODE_S,
            "blocks": n_slots,
            "sessions": n_sessions,
            "branches": stats["branches"],
            "leads": stats["leads"],
            "peak_rss_gib": rss / 2**20,
        }
    )


if __name__ == "__main__":
    main()
