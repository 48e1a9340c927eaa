"""A trace under one order and one capacity: what is hit, and what computing the rest takes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import msgspec

from kvmem.explain.replay.forest import Forest
from kvmem.explain.replay.orders import make_order

__all__ = ["Played", "Prefill", "Prompt", "play"]


class Prompt(msgspec.Struct, frozen=True):
    """One call of a trace.

    `keys` are its blocks', chained. `at_s` is when it arrives and `replied_s` when its reply is
    over, in seconds on any clock. `agent` sent it; `kind` is what that one waits for then, as far
    as anybody knew: "?" for unknown, "over" for nothing any more.
    """

    at_s: float
    keys: list[int]
    agent: str = ""
    kind: str = "?"
    replied_s: float = 0.0


class Prefill(msgspec.Struct, frozen=True):
    """Seconds to compute a prompt: linear in its tokens, and growing with those before each.

    The default is an assumption: 10,000 tokens a second at first, half of that after 60,000 tokens.
    Of shares saved only the second figure matters.
    """

    tokens_s: float = 10_000.0
    half_at_tokens: float = 60_000.0

    def seconds(self, start: int, stop: int) -> float:
        """For tokens [start, stop) of a prompt whose first `start` are there."""
        n = stop - start
        return n / self.tokens_s * (1 + (start + stop) / 2 / self.half_at_tokens)


class Played(msgspec.Struct, frozen=True):
    """What became of a trace under one order."""

    order: str
    capacity: int
    asked: int
    hit: int
    saved_s: float
    whole_s: float
    switches: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the blocks asked for that were there."""
        return self.hit / self.asked if self.asked else 0.0

    @property
    def saved_rate(self) -> float:
        """Share of the seconds of prefill that were saved."""
        return self.saved_s / self.whole_s if self.whole_s else 0.0


def play(
    prompts: Sequence[Prompt],
    forest: Forest,
    name: str,
    capacity: int,
    *,
    block_tokens: int = 16,
    prefill: Prefill | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Played:
    """Replays prompts, which must be in the order of their arrival.

    Raises:
        KeyError: there is no order of that name.
    """
    cost = prefill or Prefill()
    room, order = make_order(name, forest, capacity)
    replies: list[tuple[float, int]] = []
    asked = hit = 0
    saved_s = whole_s = 0.0
    for i, (prompt, path) in enumerate(zip(prompts, forest.paths, strict=True)):
        while replies and replies[0][0] <= prompt.at_s:
            when, of = heapq.heappop(replies)
            order.waits(of, prompts[of].kind, when)
        if not path:
            continue
        hits, n = room.hits(path), len(prompt.keys)
        room.fill(path, prompt.at_s)
        order.used(i, path, hits, prompt.at_s, prompt.agent)
        order.make_room(prompt.at_s)
        asked, hit = asked + n, hit + hits
        saved_s += cost.seconds(0, hits * block_tokens)
        whole_s += cost.seconds(0, n * block_tokens)
        heapq.heappush(replies, (max(prompt.at_s, prompt.replied_s), i))
        if i % 256 == 0:
            progress(i)
    switches = getattr(getattr(order, "duel", None), "switches", 0)
    return Played(name, capacity, asked, hit, saved_s, whole_s, switches)
