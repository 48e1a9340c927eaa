"""A team of recorded agents with waits as real ones have, and what their orchestrator says of them.

Conversations of `tau_airline` and `bfcl_multi_turn`, whole up to so many calls. After a tool an
agent waits as agents did (the trace weka_a of kv-cache-tester has the times and no tools' names, so
each tool has a band of its own of them), after a person as agents did for persons; scaled, and at
most so long. All is drawn once: every arm plays the same.

An orchestrator knows what its agent waits for when the reply is over, and hears that the wait is
over when the tool answers, `lead_s` before the next prompt is there: results have to be put into
messages, checked and rendered. That is within the wait, so that arms without hints wait as long.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from openai import AsyncOpenAI, OpenAIError

from benchmarks._corpus import Agent, generated, recorded
from benchmarks._fleet import MODEL, Call, Server, as_openai, call_of
from benchmarks._math import gap_s, user_gap_s
from kvmem import hints
from kvmem.explain.replay.traces import read_trace

__all__ = ["SETS", "Hinted", "Member", "Team", "play", "team_of", "waits_of"]

SETS = ("tau_airline", "bfcl_multi_turn")
BAND = 0.3  # of the ranks of real waits for tools, a tool has so many
OVER = "over"


class Member(msgspec.Struct, frozen=True):
    """One agent: `waits[i]` is what it waits for before its call i, `gaps_s[i]` how long. Before
    the first call it waits for its place in the queue."""

    agent: Agent
    waits: list[str]
    gaps_s: list[float]


class Team(msgspec.Struct, frozen=True):
    """Agents that are at work together."""

    members: list[Member]
    max_tokens: int
    lead_s: float

    @property
    def last_prompts(self) -> list[list[Any]]:
        """The messages of each agent's last call: all that it ever sends."""
        return [member.agent.turns[-1] for member in self.members]


class Hinted(msgspec.Struct):
    """What became of the hints of a team: how many of each status, envelopes that failed."""

    statuses: dict[str, int] = {}
    failed: int = 0

    def take(self, answer: Any) -> None:
        """Counts the receipts of an answer."""
        for receipt in answer["receipts"]:
            key = f"{receipt['do']} {receipt['status']}"
            self.statuses[key] = self.statuses.get(key, 0) + 1


def team_of(
    folder: Path | None,
    *,
    agents: int,
    turns: int,
    seed: int,
    gap_scale: float,
    gap_cap_s: float,
    start_s: float,
    max_tokens: int,
    lead_s: float,
    fits: Callable[[Sequence[Any]], bool],
    size: float = 1.0,
) -> Team:
    """A team of so many agents, half of either set.

    Args:
        folder: of traces; None makes conversations up, of the same shape and `size`.
        agents: how many.
        turns: calls of each; those that have fewer than three quarters of that are left out.
        seed: of the choice, the waits and what is made up.
        gap_scale: times the real waits.
        gap_cap_s: the longest wait.
        start_s: first calls come within such a time.
        max_tokens: of each reply.
        lead_s: see the module.
        fits: whether the engine takes a prompt of these messages.
    """
    draw = random.Random(seed)
    if folder is None:
        picked = [
            (agent, [draw.choice(("tool:search", "tool:run", "user")) for _ in agent.turns])
            for agent in generated(agents=agents, turns=turns, seed=seed, size=size)
        ]
    else:
        counts = [agents - agents // 2, agents // 2]
        picked = [
            one
            for name, n in zip(SETS, counts, strict=True)
            for one in _picked(folder, name, n, turns=turns, draw=draw, fits=fits)
        ]
        draw.shuffle(picked)
    members = []
    for agent, kinds in picked:
        waits = ["", *kinds][: len(agent.turns)]
        gaps = [min(gap_cap_s, gap_scale * _wait_s(kind, draw)) for kind in waits]
        gaps[0] = draw.random() * start_s
        members.append(Member(agent, waits, gaps))
    return Team(members, max_tokens, lead_s)


def _picked(
    folder: Path,
    source: str,
    n: int,
    *,
    turns: int,
    draw: random.Random,
    fits: Callable[[Sequence[Any]], bool],
) -> list[tuple[Agent, list[str]]]:
    """Conversations of a set, cut to so many calls, with what each waits for after each call."""
    waits = waits_of(folder / f"{source}.jsonl.gz")
    enough = (
        msgspec.structs.replace(agent, turns=agent.turns[:turns])
        for agent in recorded(folder, source, most=40 * n)
        if len(agent.turns) >= 0.75 * turns
    )
    fitting = list(itertools.islice((one for one in enough if fits(one.turns[-1])), 4 * n))
    if len(fitting) < n:
        raise SystemExit(f"{source} has {len(fitting)} conversations of {turns} calls that fit")
    return [(one, waits[one.name.partition("/")[2]]) for one in draw.sample(fitting, n)]


def waits_of(trace: Path) -> dict[str, list[str]]:
    """By session, what its agent waits for after each of its calls: "tool:NAME", "user", "over"."""
    found: dict[str, list[str]] = {}
    for call in read_trace(trace).calls:
        found.setdefault(call.session, []).append(call.kind)
    return found


def _wait_s(kind: str, draw: random.Random) -> float:
    """Seconds of a wait of this kind, as long as real ones; a tool's are of its own band."""
    if not kind.startswith("tool"):
        return user_gap_s(draw.random())
    digest = hashlib.sha256(kind.encode()).digest()
    low = int.from_bytes(digest[:4], "little") / 2**32 * (1 - BAND)
    return gap_s(low + BAND * draw.random())


# -- at work ---------------------------------------------------------------------------------------


def play(server: Server, team: Team, *, hinting: bool) -> tuple[list[Call], Hinted]:
    """All agents' calls in the order they were sent, and what became of the hints."""
    return asyncio.run(_play(server, team, hinting))


async def _play(server: Server, team: Team, hinting: bool) -> tuple[list[Call], Hinted]:
    told = Hinted()
    async with server.client() as client:
        orchestrator = _Orchestrator(client, told) if hinting else None
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            agents = [
                tasks.create_task(_agent(client, team, i, start, orchestrator))
                for i in range(len(team.members))
            ]
        if orchestrator is not None:
            await orchestrator.done()
    calls = sorted((c for task in agents for c in task.result()), key=lambda call: call.sent_s)
    return calls, told


class _Orchestrator:
    """Says what agents do. It waits for no answer: an agent's next step does not depend on it."""

    def __init__(self, client: AsyncOpenAI, told: Hinted) -> None:
        self._client, self._told = client, told
        self._last: dict[str, asyncio.Task[None]] = {}  # by session

    def say(self, action: hints.AnyAction) -> None:
        """Puts a hint on its way, after those of its session."""
        posting = self._post(hints.envelope_of([action]), self._last.get(action.session))
        self._last[action.session] = asyncio.get_running_loop().create_task(posting)

    async def done(self) -> None:
        """Returns when all were answered."""
        await asyncio.gather(*self._last.values())

    async def _post(self, envelope: dict[str, Any], before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        try:
            answer = await self._client.post("/kvmem/hints", body=envelope, cast_to=object)
        except OpenAIError:
            self._told.failed += 1
        else:
            self._told.take(answer)


async def _agent(
    client: AsyncOpenAI, team: Team, index: int, start: float, says: _Orchestrator | None
) -> list[Call]:
    member, calls = team.members[index], []
    session = f"agent-{index}"
    for turn, messages in enumerate(member.agent.turns):
        await _wait(member, turn, session, team.lead_s, says)
        sent = time.perf_counter() - start
        response = await client.chat.completions.create(
            model=MODEL,
            messages=as_openai(messages),
            temperature=0.0,
            max_completion_tokens=team.max_tokens,
            extra_body={"return_token_ids": True, "session_id": session},
        )
        done = time.perf_counter() - start
        calls.append(call_of(index, turn, sent, done, response.model_dump()))
    if says is not None:
        says.say(hints.SessionEnd(session=session))
    return calls


async def _wait(
    member: Member, turn: int, session: str, lead_s: float, says: _Orchestrator | None
) -> None:
    gap, kind = member.gaps_s[turn], member.waits[turn]
    lead = min(lead_s, gap)
    tool = kind.removeprefix("tool:")
    if says is not None and turn:
        says.say(hints.ToolStarted(session=session, tool=tool))
    await asyncio.sleep(gap - lead)
    if says is not None and turn:
        says.say(hints.ToolEnded(session=session, tool=tool))
    await asyncio.sleep(lead)
