"""The labelled set: conversations broken in one known way each, and what the explainer says.

A case serves a conversation up to one reply, breaks something, serves the next turn, and knows the
reason that the first missing tokens must be given. What the text of a prompt was changed to is
told by three routes: decoded by the namer, by an outline that the request brought, and, for
requests that name no session, by what they share with earlier prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks._explain_world import BLOCK, Conversation, Message, Served, World
from kvmem.explain.misses.runs import Run
from kvmem.types import Move, Moved

__all__ = ["CASES", "Outcome", "false_evicted", "outcomes", "tally"]

ROUTES = ("session", "outline", "nameless")


@dataclass(frozen=True)
class Outcome:
    """One case: what should have been said, what was, and by which route."""

    route: str
    expected: str
    case: str
    said: str
    unexplained: int
    false_evicted: int

    @property
    def right(self) -> bool:
        return self.said == self.expected


class StuckDisk:
    """A disk tier that takes blocks and does not give them back in time."""

    def __init__(self) -> None:
        self.n_records = self.room = 1 << 14
        self.used_bytes, self.disk_bytes, self.on = 0, 1 << 30, True
        self._written: list[Move] = []

    def recovered(self) -> None:
        return None

    def write(self, move: Move) -> bool:
        self._written.append(move)
        return True

    def read(self, move: Move) -> bool:
        return True

    def poll(self) -> list[Moved]:
        written, self._written = self._written, []
        return [Moved(move.ticket, "", 1) for move in written]

    def drop(self, record: int) -> None: ...
    def clear(self) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def too_slow(self, seconds: float) -> None: ...


@dataclass
class Scene:
    """A conversation that is to be broken: turn `at` is its reply that was served last."""

    talk: Conversation
    at: int
    session: str
    outlines: bool

    @property
    def asked(self) -> Conversation:
        """Up to the message that asks for the reply."""
        return self.talk.but(messages=self.talk.messages[: self.at])

    @property
    def answer(self) -> Message:
        return self.talk.messages[self.at]

    @property
    def next(self) -> Conversation:
        """The next turn: all of it, the reply and what follows."""
        return self.talk.but(messages=self.talk.messages[: self.at + 2])

    def world(self, **options: Any) -> World:
        return World(outlines=self.outlines, **options)


Case = Callable[[Scene], tuple[World, Served]]


def _twice(scene: Scene, after: Conversation, answer: Message | None = None, **options: Any) -> Any:
    world = scene.world()
    world.serve(scene.asked, answer or scene.answer, session=scene.session)
    return world, world.serve(after, session=scene.session, **options)


def _first_turn(scene: Scene) -> Any:
    world = scene.world()
    return world, world.serve(scene.asked, scene.answer, session=scene.session)


def _goes_on(scene: Scene) -> Any:
    last = len(scene.next.messages) - 1
    more = scene.talk.messages[last].content + " And say, step by step, what else there is to do."
    return _twice(scene, scene.next.edited(last, content=more))


def _another(scene: Scene) -> Any:
    world = scene.world()
    world.serve(scene.asked, scene.answer, session=scene.session)
    other = Message("user", "Something else altogether is wanted in this conversation, namely tea.")
    talk = scene.talk.but(messages=(other,))
    return world, world.serve(talk, session=scene.session and "another")


def _edit(scene: Scene) -> Any:
    users = [i for i, m in enumerate(scene.asked.messages) if m.role != "assistant"]
    at = users[len(users) // 2]
    changed = f"Edited since: {scene.talk.messages[at].content} Please."
    return _twice(scene, scene.next.edited(at, content=changed))


def _word(scene: Scene) -> Any:
    at = next(i for i, m in enumerate(scene.asked.messages) if m.role != "assistant")
    words = scene.talk.messages[at].content.split(" ")
    words[len(words) // 2] = "otherwise"
    return _twice(scene, scene.next.edited(at, content=" ".join(words)))


def _rewritten(scene: Scene) -> Any:
    changed = f"In other words: {scene.answer.content}"
    return _twice(scene, scene.next.edited(scene.at, content=changed))


def _inserted(scene: Scene) -> Any:
    reminder = Message("user", "A reminder that nobody had sent before.")
    messages = scene.next.messages
    return _twice(scene, scene.next.but(messages=(messages[0], reminder, *messages[1:])))


def _cleared_result(scene: Scene) -> Any:
    asked = scene.talk.edited(0, role="tool", content="A long result. " * 40)
    world = scene.world()
    world.serve(asked.but(messages=asked.messages[: scene.at]), scene.answer, session=scene.session)
    after = asked.edited(0, content="[cleared]").but(epoch=1)
    return world, world.serve(
        after.but(messages=after.messages[: scene.at + 2]), session=scene.session
    )


def _tools_reordered(scene: Scene) -> Any:
    return _twice(scene, scene.next.but(tools=scene.talk.tools[::-1]))


def _tool_added(scene: Scene) -> Any:
    more = json.dumps({"name": "think", "description": "Think about it."})
    return _twice(scene, scene.next.but(tools=(*scene.talk.tools, more)))


def _clock(scene: Scene) -> Any:
    before = scene.asked.but(system=f"It is 2026-05-01 09:15. {scene.talk.system}")
    after = scene.next.but(system=f"It is 2026-05-01 09:16. {scene.talk.system}")
    world = scene.world()
    world.serve(before, scene.answer, session=scene.session)
    return world, world.serve(after, session=scene.session)


def _system(scene: Scene) -> Any:
    return _twice(scene, scene.next.but(system=scene.talk.system + " Answer in French."))


def _template(scene: Scene) -> Any:
    return _twice(scene, scene.next.but(strips=True))


def _retokenized(scene: Scene) -> Any:
    answer = Message("assistant", "Understood, considering everything mentioned previously: "
                     + scene.answer.content, scene.answer.thinking, scene.answer.calls)  # fmt: skip
    talk = scene.talk.edited(scene.at, content=answer.content)
    world = scene.world()
    world.serve(scene.asked, Message(answer.role, answer.content, answer.thinking, answer.calls,
                                     cut=True), session=scene.session)  # fmt: skip
    # The ledger's own view of what was sampled goes with the turn before.
    if scene.outlines:
        sampled = talk.edited(scene.at, cut=True).but(messages=talk.edited(scene.at, cut=True)
                                                      .messages[: scene.at + 2])  # fmt: skip
        world.serve(sampled, session=scene.session)
    after = talk.but(messages=talk.messages[: scene.at + 2])
    return world, world.serve(after, session=scene.session)


def _arguments(scene: Scene) -> Any:
    at = next(i for i, m in enumerate(scene.next.messages) if m.calls)
    calls = tuple(json.dumps(json.loads(call), separators=(",", ":"))
                  for call in scene.talk.messages[at].calls)  # fmt: skip
    return _twice(scene, scene.next.edited(at, calls=calls))


def _compacted(scene: Scene) -> Any:
    summary = Message("user", "So far: the task was begun and half of it is done.")
    after = scene.next.but(messages=(summary, *scene.next.messages[-2:]), epoch=1)
    return _twice(scene, after)


def _truncated(scene: Scene) -> Any:
    after = scene.next.but(messages=scene.next.messages[2:], epoch=1)
    return _twice(scene, after)


def _salt(scene: Scene) -> Any:
    return _twice(scene, scene.next, salt="tenant-b")


def _adapter(scene: Scene) -> Any:
    return _twice(scene, scene.next, adapter="sql")


def _weights(scene: Scene) -> Any:
    world = scene.world()
    world.serve(scene.asked, scene.answer, session=scene.session)
    world.weights = b"another epoch"
    world.cache.drop("weights")
    return world, world.serve(scene.next, session=scene.session)


def _repeat(scene: Scene) -> Any:
    world = scene.world()
    world.serve(scene.asked, scene.answer, session=scene.session)
    return world, world.serve(scene.asked, session=scene.session)


def _short(scene: Scene) -> Any:
    world = scene.world()
    world.tokenizer.encode(scene.talk.head())
    talk = Conversation("", (), (Message("user", "Hi"),))
    assert len(world.render(talk)[0]) > BLOCK
    ids = world.render(talk)[0][: BLOCK - 3]
    world.render = lambda _: (ids, [])  # type: ignore[method-assign]
    world.outlines = False
    return world, world.serve(talk, session=scene.session)


def _evicted(scene: Scene) -> Any:
    world = scene.world(n_slots=1024)
    served = world.serve(scene.asked, scene.answer, session=scene.session)
    filler = Conversation("Filler", ("{}",), (Message("user", "word " * 4000),))
    n = 0
    while world.cache.match([served.keys], 0, len(served.keys) * BLOCK):
        n += 1
        world.serve(filler.but(system=f"Filler {n}"), session=f"other-{n}")
    return world, world.serve(scene.next, session=scene.session)


def _evicted_partly(scene: Scene) -> Any:
    world = scene.world(n_slots=1024)
    served = world.serve(scene.asked, scene.answer, session=scene.session)
    n = 0
    while world.cache.match([served.keys], 0, len(served.keys) * BLOCK) == len(served.keys) * BLOCK:
        n += 1
        filler = Conversation(f"Filler {n}", ("{}",), (Message("user", "word " * 400),))
        world.serve(filler, session=f"other-{n}")
    return world, world.serve(scene.next, session=scene.session)


def _too_slow(scene: Scene) -> Any:
    world = scene.world(n_slots=1024, mover=StuckDisk())
    served = world.serve(scene.asked, scene.answer, session=scene.session)
    n = 0
    while world.cache._tier.match(served.keys):
        n += 1
        filler = Conversation(f"Filler {n}", ("{}",), (Message("user", "word " * 4000),))
        world.serve(filler, session=f"other-{n}")
    return world, world.serve(scene.next, session=scene.session)


def _tier_error(scene: Scene) -> Any:
    world = scene.world()

    def copy_fails(keys: list[bytes]) -> None:
        room = world.cache.reserve("copy", 0, keys, range(len(keys)))
        world.cache.abandon(room.slots, room.generations)

    world.serve(scene.asked, scene.answer, session=scene.session, missing=True, before=copy_fails)
    return world, world.serve(scene.next, session=scene.session)


def _disk_off(scene: Scene) -> Any:
    disk = StuckDisk()
    world = scene.world(n_slots=1024, mover=disk)
    served = world.serve(scene.asked, scene.answer, session=scene.session)
    n = 0
    while world.cache._tier.match(served.keys):
        n += 1
        filler = Conversation(f"Filler {n}", ("{}",), (Message("user", "word " * 4000),))
        world.serve(filler, session=f"other-{n}")
    disk.on = False
    return world, world.serve(scene.next, session=scene.session)


def _quarantined(scene: Scene) -> Any:
    world = scene.world()
    served = world.serve(scene.asked, scene.answer, session=scene.session)
    key = served.keys[len(served.keys) // 2]
    slot, generation = world.cache._tier.find(key) or (0, 0)
    world.cache.quarantine(slot, generation, key=key, reason="checksum")
    return world, world.serve(scene.next, session=scene.session)


def _loads_off(scene: Scene) -> Any:
    return _twice(scene, scene.next, load=False)


def _stores_off(scene: Scene) -> Any:
    world = scene.world()
    world.serve(scene.asked, scene.answer, session=scene.session, store=False)
    return world, world.serve(scene.next, session=scene.session)


def _pending(scene: Scene) -> Any:
    world = scene.world()

    def being_stored(keys: list[bytes]) -> None:
        world.cache.reserve("other", 0, keys, range(len(keys)))

    return world, world.serve(scene.next, session=scene.session, before=being_stored)


def _cleared(scene: Scene) -> Any:
    world = scene.world()
    world.serve(scene.asked, scene.answer, session=scene.session)
    world.cache.drop("reset")
    return world, world.serve(scene.next, session=scene.session)


def _not_stored(scene: Scene) -> Any:
    world = scene.world()
    world.serve(scene.asked, scene.answer, session=scene.session, missing=True)
    return world, world.serve(scene.next, session=scene.session)


# By name: what must be said, the case, and by which routes it can be known at all. A session's
# salt, and a history that shares nothing with what it was, are only seen where it is named.
CASES: dict[str, tuple[str, Case, tuple[str, ...]]] = {
    "first turn": ("first_time", _first_turn, ROUTES),
    "goes on": ("first_time", _goes_on, ROUTES),
    "another conversation": ("first_time", _another, ROUTES),
    "message edited": ("input_changed", _edit, ROUTES),
    "word edited": ("input_changed", _word, ROUTES),
    "reply rewritten": ("input_changed", _rewritten, ROUTES),
    "message inserted": ("input_changed", _inserted, ROUTES),
    "tool result cleared": ("context_compacted", _cleared_result, ROUTES),
    "tools reordered": ("tools_changed", _tools_reordered, ROUTES),
    "tool added": ("tools_changed", _tool_added, ROUTES),
    "clock in the system prompt": ("system_changed", _clock, ROUTES),
    "system prompt edited": ("system_changed", _system, ROUTES),
    "thinking stripped": ("template_rewrote_history", _template, ROUTES),
    "reply retokenized": ("retokenized", _retokenized, ROUTES),
    "arguments reserialised": ("tool_args_reserialized", _arguments, ROUTES),
    "history compacted": ("context_compacted", _compacted, ("session", "outline")),
    "history truncated": ("context_compacted", _truncated, ("session", "outline")),
    "salt changed": ("salt_changed", _salt, ("session", "outline")),
    "adapter changed": ("adapter_changed", _adapter, ("session", "outline")),
    "weights changed": ("weights_changed", _weights, ROUTES),
    "repeated": ("block_floor", _repeat, ROUTES),
    "shorter than a block": ("block_floor", _short, ROUTES),
    "evicted": ("evicted", _evicted, ROUTES),
    "evicted in part": ("evicted", _evicted_partly, ROUTES),
    "disk too slow": ("demoted_too_slow", _too_slow, ROUTES),
    "copy failed": ("tier_error", _tier_error, ROUTES),
    "disk off": ("tier_error", _disk_off, ROUTES),
    "quarantined": ("quarantined", _quarantined, ROUTES),
    "loads off": ("disabled_by_request", _loads_off, ROUTES),
    "stores were off": ("disabled_by_request", _stores_off, ROUTES),
    "being stored": ("pending", _pending, ROUTES),
    "reset": ("cleared", _cleared, ROUTES),
    "no room": ("not_stored", _not_stored, ROUTES),
}


def outcomes(talk: Conversation, routes: tuple[str, ...] = ROUTES) -> Iterator[Outcome]:
    """Every case of one conversation, broken at its middle."""
    replies = [i for i, m in enumerate(talk.messages[:-1]) if m.role == "assistant" and i > 2]
    if not replies or not any(m.calls for m in talk.messages[: replies[len(replies) // 2] + 1]):
        return
    for name, (expected, case, by) in CASES.items():
        for route in by:
            if route in routes:
                session = "" if route == "nameless" else "main"
                scene = Scene(talk, replies[len(replies) // 2], session, route == "outline")
                world, served = case(scene)
                world.close()
                yield Outcome(
                    route, expected, name, _main(served.runs), _unexplained(served),
                    false_evicted(world, served),
                )  # fmt: skip


def _main(runs: list[Run]) -> str:
    return runs[0].reason if runs else "none"


def _unexplained(served: Served) -> int:
    """Tokens of the prompt that no run names, or two do."""
    covered = np.zeros(len(served.prompt), np.int64)
    for run in served.runs:
        covered[run.first : run.first + run.tokens] += 1
    begin = served.runs[0].first if served.runs else len(served.prompt)
    return int((covered[begin:] != 1).sum())


def false_evicted(world: World, served: Served) -> int:
    """Blocks that are said to have been evicted and never were."""
    return sum(
        served.keys[at] not in world.evicted
        for run in served.runs
        if run.reason == "evicted"
        for at in range(run.first // BLOCK, (run.first + run.tokens) // BLOCK)
    )


def tally(found: list[Outcome]) -> dict[str, float]:
    """The figures of a set."""
    return {
        "accuracy": round(sum(one.right for one in found) / max(1, len(found)), 4),
        "false_evicted": sum(one.false_evicted for one in found),
        "unexplained": sum(one.unexplained for one in found),
        "cases": len(found),
    }
