"""What 16 streams ask for: a script a stream, drawn from one seed, that never ends by itself.

    session   an agent's turns, each prompt being the last one, the reply and something new
    shared    the instructions of a team and one question
    long      a long prompt that nothing follows
    short     less than a block or two

Some clients hang up in the middle and ask again, some stream, some have a cache salt of their own,
some want no load or no store. What is asked does not depend on time; who has been answered before
he hangs up does.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence

import msgspec

from benchmarks.soak.asks import Ask
from benchmarks.soak.plan import Plan

__all__ = ["KINDS", "Library", "Script", "Session", "library", "script"]

Script = Generator[Ask, list[int] | None, None]
Tokens = tuple[int, ...]

KINDS = {"session": 50, "shared": 20, "long": 12, "short": 18}
_TEAMS = 4
_SHORTS = 60
_SALTS = ("tenant-a", "tenant-b")
_SALTED = 0.2
_OFF = 0.05
_STREAMED = 0.3
_GIVES_UP = 0.15
_ADAPTED = 0.4


class Session(msgspec.Struct, frozen=True):
    """A conversation: its team's instructions, what is said in each turn, tokens of the replies."""

    system: Tokens
    turns: list[Tokens]
    n_tokens: list[int]


class Library(msgspec.Struct, frozen=True):
    """Everything that can be asked; bounded, so that the oracle answers each of it once."""

    systems: list[Tokens]
    sessions: list[Session]
    questions: list[Tokens]
    longs: list[Tokens]
    shorts: list[Tokens]


def library(ids: Sequence[int], plan: Plan) -> Library:
    """Pieces of a text's tokens `ids`, the same for the same seed and length of the soak."""
    draw = random.Random(f"{plan.seed}/library")

    def piece(low: int, high: int) -> Tokens:
        n = draw.randint(low, high)
        start = draw.randrange(len(ids) - n)
        return tuple(ids[start : start + n])

    systems = [piece(100, 180) for _ in range(_TEAMS)]
    sessions = [
        Session(
            system=systems[i % _TEAMS],
            turns=[piece(16, 96) for _ in range(draw.randint(2, 5))],
            n_tokens=[draw.choice((4, 8, 16, 48)) for _ in range(5)],
        )
        for i in range(plan.sessions)
    ]
    return Library(
        systems=systems,
        sessions=sessions,
        questions=[piece(8, 40) for _ in range(16)],
        longs=[piece(320, 700) for _ in range(plan.longs)],
        shorts=[piece(3, 64) for _ in range(_SHORTS)],
    )


def script(stream: int, shelf: Library, plan: Plan) -> Script:
    """The requests of one stream; send it each reply, or None where the client hung up."""
    draw = random.Random(f"{plan.seed}/{stream}")
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        kind = draw.choices(kinds, weights)[0]
        start = Ask(
            kind=kind,
            prompt=(),
            n_tokens=1,
            adapter=_adapter(draw, plan.adapters),
            salt=draw.choice(_SALTS) if draw.random() < _SALTED else None,
        )
        if kind == "session":
            yield from _session(draw, _popular(draw, shelf.sessions), start)
            continue
        if kind == "shared":
            prompt = draw.choice(shelf.systems) + draw.choice(shelf.questions)
        else:
            prompt = draw.choice(shelf.longs if kind == "long" else shelf.shorts)
        # Decided by the prompt, so that the same prompt is the same request to the oracle.
        n_tokens = 4 + len(prompt) % 37
        yield from _asked(draw, msgspec.structs.replace(start, prompt=prompt, n_tokens=n_tokens))


def _session(draw: random.Random, session: Session, start: Ask) -> Script:
    prompt = session.system
    for turn, n_tokens in zip(session.turns, session.n_tokens, strict=False):
        prompt += turn
        ask = msgspec.structs.replace(start, prompt=prompt, n_tokens=n_tokens)
        reply = yield from _asked(draw, ask)
        if reply is None:
            return
        prompt += tuple(reply)


def _asked(draw: random.Random, ask: Ask) -> Generator[Ask, list[int] | None, list[int] | None]:
    """The reply; a client that hung up asks once more and waits."""
    ask = msgspec.structs.replace(
        ask,
        load=draw.random() >= _OFF,
        store=draw.random() >= _OFF,
        stream=draw.random() < _STREAMED,
    )
    if draw.random() >= _GIVES_UP:
        return (yield ask)
    if ask.stream:
        hasty = msgspec.structs.replace(ask, give_up_tokens=draw.randint(1, ask.n_tokens))
    else:
        # From before the prompt is scheduled to some way into the reply.
        hasty = msgspec.structs.replace(ask, give_up_s=0.02 * 500 ** draw.random())
    reply = yield hasty
    return reply if reply is not None else (yield ask)


def _popular(draw: random.Random, sessions: list[Session]) -> Session:
    """Few are asked for often, most seldom, as agents' sessions are: Zipf's law."""
    return draw.choices(sessions, [1 / (rank + 1) for rank in range(len(sessions))])[0]


def _adapter(draw: random.Random, n_adapters: int) -> str | None:
    if draw.random() >= _ADAPTED or not n_adapters:
        return None
    return f"adapter-{draw.randrange(n_adapters)}"
