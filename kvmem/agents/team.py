"""Agents that hear one another, and where their common words stand in their prompts.

`role-first` is what most frameworks do: each agent has its own system prompt and, after it, its own
copy of what was said; every agent computes all of it. `shared-first` turns that round: one
transcript under one head, and whoever speaks is told its role after it, alone. The same text under
different roles is then the same prefix, and computed once. In `one-ledger` the role is said where
an agent first speaks, and stays: all read it, and no token is computed twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from kvmem.agents.asker import Asker
from kvmem.agents.budget import Budget
from kvmem.agents.session import Session
from kvmem.agents.tools import Tool
from kvmem.agents.turn import Message, as_message
from kvmem.agents.values import Reply, Usage
from kvmem.errors import ConfigError

__all__ = ["Layout", "Member", "Past", "Team"]

Layout = Literal["role-first", "shared-first", "one-ledger"]


class Member(msgspec.Struct, frozen=True):
    """An agent of a team.

    Args:
        name: its own.
        role: what it is told of it.
        allow: pattern of the tools that it may call.
        turn: turns done.
    """

    name: str
    role: str
    allow: str = "*"
    turn: int = 0


class Past(msgspec.Struct, frozen=True):
    """What a team goes on with: who is in it, their sessions, and what all heard."""

    members: list[Member]
    sessions: dict[str, Session]
    said: list[dict[str, Any]]


class Team:
    """See the module; `Runtime.team` makes one. One event loop uses it.

    Args:
        asker: the runtime's side.
        name: of the team.
        system: what everybody is told.
        layout: see the module. All but `role-first` have to be asked for: a role that stands after
            the transcript, or amid it, reads otherwise to a model than one before it.
        tools: that its agents may call, all in everybody's head; `Member.allow` masks them.
        budget: that all of its agents spend.
        seal: see `Runtime.session`.
        past: of a team that goes on.
    """

    def __init__(
        self,
        asker: Asker,
        name: str,
        *,
        system: str,
        layout: Layout = "role-first",
        tools: Sequence[Tool] = (),
        budget: Budget | None = None,
        seal: bool = True,
        past: Past | None = None,
    ) -> None:
        self.name, self.system, self.layout = name, system, layout
        self.budget = budget if budget is not None else Budget()
        self.tools = tuple(tools)
        then = past if past is not None else Past([], {}, [])
        self.members = {member.name: member for member in then.members}
        self.sessions = dict(then.sessions)
        self._asker, self._seal = asker, seal
        self._lock = asyncio.Lock()
        # Role-first: what all have heard, for those who come later.
        self._said: list[Mapping[str, Any]] = list(then.said)
        if layout != "role-first" and "transcript" not in self.sessions:
            self.sessions["transcript"] = self._session("transcript", system)

    def __repr__(self) -> str:
        return f"<Team {self.name}, {self.layout}: {', '.join(self.members)}; {self.usage!r}>"

    @property
    def usage(self) -> Usage:
        """Of all its agents."""
        return sum((session.usage for session in self.sessions.values()), Usage())

    @property
    def said(self) -> tuple[Mapping[str, Any], ...]:
        """What everybody has heard, as messages."""
        if self.layout == "role-first":
            return tuple(self._said)
        return tuple(self.sessions["transcript"].ledger.messages()[1:])

    def agent(self, name: str, *, role: str, allow: str = "*") -> Member:
        """A new agent, that hears what was said before it came too.

        Raises:
            ConfigError: the name is taken.
            PrefixBroken: the template refuses.
        """
        self._free(name)
        if self.layout == "role-first":
            session = self._session(name, f"{role}\n\n{self.system}")
            session.append(*self._said)
            self.sessions[name] = session
        self.members[name] = Member(name, role, allow)
        return self.members[name]

    def session(self, name: str, *, system: str | None = None) -> Session:
        """A conversation of the team beside what all hear: for a lead that maps, for instance. It
        is saved and closed with the team, and spends its budget.

        Raises:
            ConfigError: the name is taken.
        """
        self._free(name)
        self.sessions[name] = self._session(name, self.system if system is None else system)
        return self.sessions[name]

    def _free(self, name: str) -> None:
        if name in self.sessions or name in self.members:
            raise ConfigError(
                f"The team {self.name} has a {name} already",
                next_step="Give another name.",
                setting=name,
            )

    def _session(self, name: str, system: str) -> Session:
        full = f"{self.name}/{name}"
        ledger = self._asker.ledger(full, system, self.tools, seal=self._seal)
        return Session(self._asker, ledger, name=full, tools=self.tools, budget=self.budget)

    def tell(self, *messages: Message) -> None:
        """Everybody hears it; a string is a user's message."""
        told = [as_message(message) for message in messages]
        if self.layout != "role-first":
            self.sessions["transcript"].append(*told)
            return
        self._said += told
        for name in self.members:
            self.sessions[name].append(*told)

    async def turn(self, name: str, *messages: Message, **how: Any) -> Reply[Any]:
        """The agent speaks, and everybody hears what it says; calls of tools are made before.

        Args:
            name: who.
            messages: for it alone, beside its role.
            how: of `Session.run`, or with `schema` of `Session.step`.

        Raises:
            ConfigError: there is no such agent.
            AgentError: see `Session.run`; nobody has heard anything then.
        """
        if name not in self.members:
            raise ConfigError(
                f"The team {self.name} has no agent {name}",
                next_step=f"Known: {', '.join(self.members) or 'none'}.",
                setting=name,
            )
        async with self._lock:
            member = self.members[name]
            home = self.sessions[name if self.layout == "role-first" else "transcript"]
            # A child, so that a turn with calls of tools is all or nothing too.
            child = home.child(f"{self.name}/{name}", turn=member.turn, calls=home.calls)
            try:
                reply = await _speak(child, member, [*self._cue(member), *messages], how)
            finally:
                home.usage += child.usage
            self.members[name] = msgspec.structs.replace(member, turn=child.turn)
            if self.layout == "shared-first":
                _hear(home, child, reply, name)
            else:
                home.take(child)
            if self.layout == "role-first":
                self._spread({"role": "user", "content": f"{name}: {reply.text}"}, name)
            return reply

    def _cue(self, member: Member) -> list[Message]:
        """What an agent is told when it is its turn."""
        if self.layout == "role-first":
            return []
        if self.layout == "shared-first" or not member.turn:
            return [f"{member.name}: {member.role}"]
        return [f"{member.name} speaks."]

    def _spread(self, heard: Mapping[str, Any], speaker: str) -> None:
        self._said.append(heard)
        for other in self.members:
            if other != speaker:
                self.sessions[other].append(heard)

    def close(self) -> None:
        """Closes all sessions."""
        for session in self.sessions.values():
            session.close()


async def _speak(
    session: Session, member: Member, messages: Sequence[Message], how: Mapping[str, Any]
) -> Reply[Any]:
    if "schema" in how or not session.tools:
        return await session.step(*messages, **how)
    held: dict[str, Any] = {"allow": member.allow, **how}
    return await session.run(*messages, **held)


def _hear(transcript: Session, child: Session, reply: Reply[Any], speaker: str) -> None:
    """Puts the ids that were sampled behind a role to the transcript, which is without it."""
    known = transcript.ledger.n_tokens
    sampled = child.ledger.tokens()[-child.ledger.spans[-1].sampled :]
    heard = transcript.ledger.fork(transcript.ledger.session_id)
    heard.append({"role": "user", "content": f"{speaker} speaks."})
    sent = heard.request()["prompt"]
    message = {"content": reply.text, "name": speaker}
    heard.commit(
        {"prompt_token_ids": sent, "choices": [{"token_ids": sampled, "message": message}]}
    )
    transcript.adopt(heard)
    transcript.known_tokens = known
