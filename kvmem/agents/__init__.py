"""Agents on one engine: sessions on ledgers, fan-out that computes a prefix once, teams.

async with Runtime("http://127.0.0.1:8000") as runtime:
    lead = runtime.session("lead", system="You lead a team of researchers.", tools=[search])
    await lead.run("Plan it.")
    found = await lead.map(["the sea", "the hills"], schema=Finding)
    found.join(lead)

`kvmem.agents.sync` has the same without `await`.
"""

from __future__ import annotations

from kvmem.agents.announcing import Announcer, Hint
from kvmem.agents.budget import Budget, Spent
from kvmem.agents.choice import Choice, Side
from kvmem.agents.fanout import Fanout, Result
from kvmem.agents.runtime import Runtime
from kvmem.agents.session import Session
from kvmem.agents.state import resume, save
from kvmem.agents.stream import Stream
from kvmem.agents.team import Member, Team
from kvmem.agents.tools import Tool, tool
from kvmem.agents.values import Reply, ToolCall, Usage
from kvmem.agents.wire import Retries

__all__ = [
    "Announcer",
    "Budget",
    "Choice",
    "Fanout",
    "Hint",
    "Member",
    "Reply",
    "Result",
    "Retries",
    "Runtime",
    "Session",
    "Side",
    "Spent",
    "Stream",
    "Team",
    "Tool",
    "ToolCall",
    "Usage",
    "resume",
    "save",
    "tool",
]
