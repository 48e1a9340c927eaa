"""A team on disk: one file a ledger, and one that names them, written last (docs/formats.md).

Whenever the process dies, the folder holds the team as it was saved last. Functions of tools are
not saved; whoever resumes gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvmem.agents.asker import Asker
from kvmem.agents.budget import Budget, Spent
from kvmem.agents.session import Session
from kvmem.agents.team import Layout, Member, Past, Team
from kvmem.agents.tools import Tool
from kvmem.agents.values import Usage
from kvmem.context import Ledger
from kvmem.context.file import read_checked, write_checked
from kvmem.context.renderer import canonical
from kvmem.errors import ConfigError

__all__ = ["MAGIC", "NAME", "Saved", "SavedSession", "resume", "save"]

MAGIC = b"KVMEMTM1"  # the last is the version
NAME = "team.kvt"


class SavedSession(msgspec.Struct, frozen=True):
    """A session; its ledger is in `file`."""

    name: str
    full_name: str
    file: str
    turn: int
    calls: int
    usage: Usage
    closed: bool


class Saved(msgspec.Struct, frozen=True):
    """What is in the team's file. `said` is canonical JSON."""

    name: str
    system: str
    layout: Layout
    members: list[Member]
    tools: list[str]
    sessions: list[SavedSession]
    said: bytes
    budget_tokens: int | None
    budget_seconds: float | None
    spent: Spent


def save(team: Team, folder: Path) -> None:
    """Writes the team, private (0600 in 0700); the last saved one stays until this one is whole.

    Turns that are under way are not in it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    sessions = []
    for number, (name, session) in enumerate(team.sessions.items()):
        # By its content: a file that the last saved team names is never written over.
        file = f"{number:03d}-{session.ledger.digest[:16]}.kvl"
        session.ledger.save(folder / file)
        sessions.append(
            SavedSession(
                name,
                session.name,
                file,
                session.turn,
                session.calls,
                session.usage,
                session.closed,
            )
        )
    saved = Saved(
        name=team.name, system=team.system, layout=team.layout, members=list(team.members.values()),
        tools=[tool.name for tool in team.tools], sessions=sessions,
        said=canonical(team.said if team.layout == "role-first" else []),
        budget_tokens=team.budget.tokens, budget_seconds=team.budget.seconds,
        spent=team.budget.spent,
    )  # fmt: skip
    write_checked(folder / NAME, MAGIC, msgspec.msgpack.encode(saved))
    kept = {one.file for one in sessions}
    for old in folder.glob("[0-9][0-9][0-9]-*.kvl"):
        if old.name not in kept:
            old.unlink()


def resume(asker: Asker, folder: Path, tools: Sequence[Tool]) -> Team:
    """The team that `save` wrote, with what it had spent of its budget.

    The engine may have forgotten its prompts meanwhile: a fan-out warms them first.

    Raises:
        ConfigError: there is none, it is damaged, another model's, or a tool is missing.
    """
    path = folder / NAME
    if not path.exists():
        raise ConfigError(
            f"There is no team in {folder}",
            next_step="Give the folder that Team.save was given.",
            path=path,
        )
    try:
        saved = msgspec.msgpack.decode(read_checked(path, MAGIC, "team"), type=Saved)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path} is no team: {error}", next_step="Begin a new team.", path=path
        ) from error
    given = {tool.name: tool for tool in tools}
    missing = [name for name in saved.tools if name not in given]
    if missing:
        raise ConfigError(
            f"The team {saved.name} has tools that are not given: {', '.join(missing)}",
            next_step="Give resume(..., tools=[...]) the functions; they are not saved.",
            setting="tools",
        )
    budget = Budget(saved.budget_tokens, saved.budget_seconds, spent=saved.spent)
    mine = [given[name] for name in saved.tools]
    sessions = {
        one.name: Session(
            asker, Ledger.load(folder / one.file, asker.renderer), name=one.full_name,
            tools=mine, budget=budget, turn=one.turn, calls=one.calls, usage=one.usage,
            closed=one.closed,
        )
        for one in saved.sessions
    }  # fmt: skip
    past = Past(saved.members, sessions, msgspec.json.decode(saved.said))
    return Team(
        asker, saved.name, system=saved.system, layout=saved.layout, tools=mine, budget=budget,
        past=past,
    )  # fmt: skip
