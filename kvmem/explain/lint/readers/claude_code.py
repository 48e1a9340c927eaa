"""Reads transcripts of Claude Code: one JSON line for each entry of a conversation.

A reply, however many lines it was written as, is a call whose prompt is the entries on the way
from it up through `parentUuid`. A compaction starts the conversation anew, a rewind goes on from
an earlier entry, and each sub-agent (`isSidechain`) has a conversation of its own. The system
prompt and the tools are not in such a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmem.explain.lint.lines import decode, records
from kvmem.explain.lint.readers.parts import WrongMessage, message_part
from kvmem.explain.lint.values import Call, Fault, Part

__all__ = ["NAME", "accepts", "calls"]

NAME = "claude-code"
_FIX = "Take the line out; the rest was read."


def accepts(first: dict[str, Any]) -> bool:
    """Whether a file that begins with this record is a transcript of Claude Code."""
    if first.get("type") == "summary" and "leafUuid" in first:
        return True
    return first.get("type") is not None and "sessionId" in first and "payload" not in first


class _Chain:
    """One conversation: its parts, and which entry stands how many parts deep."""

    def __init__(self, agent: str) -> None:
        self.agent = agent
        self.parts: list[Part] = []
        self.depth: dict[str, int] = {}
        self.reply: str | None = None

    def go_to(self, parent: str | None) -> None:
        """Takes back what does not stand above a new entry."""
        depth = self.depth.get(parent, len(self.parts)) if parent else 0
        if depth < len(self.parts):
            self.parts = self.parts[:depth]
            self.depth = {uuid: n for uuid, n in self.depth.items() if n <= depth}
            self.reply = None


class _Session:
    """The conversations of one session: the main one and the sub-agents'."""

    def __init__(self) -> None:
        self.main = _Chain("main")
        self.others: dict[str, _Chain] = {}
        self.by_entry: dict[str, _Chain] = {}

    def chain(self, entry: dict[str, Any]) -> _Chain:
        agent, parent = entry.get("agentId"), _text(entry.get("parentUuid"))
        if not entry.get("isSidechain") and not agent:
            return self.main
        if not agent and parent in self.by_entry:
            return self.by_entry[parent]
        name = str(agent) if agent else f"sidechain-{len(self.others) + 1}"
        return self.others.setdefault(name, _Chain(name))


def calls(path: Path) -> Iterator[Call | Fault]:
    """Each reply of the transcript as a call."""
    name, session = "", _Session()
    for record in records(path):
        entry = record if isinstance(record, Fault) else decode(path, record, dict[str, Any])
        if isinstance(entry, Fault):
            yield entry
            continue
        if entry.get("sessionId") and entry["sessionId"] != name:
            name, session = str(entry["sessionId"]), _Session()
        try:
            call = _entry(record.line, name, session, entry)
        except WrongMessage as error:
            yield Fault(str(path), record.line, str(error), _FIX)
            continue
        if call is not None:
            yield call


def _entry(line: int, name: str, session: _Session, entry: dict[str, Any]) -> Call | None:
    uuid = entry.get("uuid")
    if not isinstance(uuid, str):
        return None  # a title, a snapshot of files, a queue's operation: nothing a model reads
    chain = session.chain(entry)
    session.by_entry[uuid] = chain
    parent = _text(entry.get("parentUuid"))
    message = entry.get("message")
    if _is_cut(entry) and (parent is None or parent in chain.depth):
        chain.go_to(parent)
    call = None
    if entry.get("type") in ("user", "assistant") and not entry.get("isMeta") and message:
        part = message_part(message, len(chain.parts))
        if part.role == "assistant":
            reply = str(message.get("id") or entry.get("requestId") or uuid)
            if reply != chain.reply and chain.parts and not _is_made_up(message):
                call = Call(line, name, chain.agent, parts=list(chain.parts))
            chain.reply = reply
        chain.parts.append(part)
    chain.depth[uuid] = len(chain.parts)
    return call


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _is_cut(entry: dict[str, Any]) -> bool:
    """Whether an entry may stand on an earlier one than the last: what a user says, a compaction.

    Results of tools called in parallel each name their own call as parent, and cut nothing.
    """
    if entry.get("type") == "system":
        return entry.get("subtype") == "compact_boundary"
    if entry.get("type") != "user" or "toolUseResult" in entry or entry.get("isMeta"):
        return False
    message = entry.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return not isinstance(content, list) or not any(
        isinstance(block, dict) and block.get("type") == "tool_result" for block in content
    )


def _is_made_up(message: dict[str, Any]) -> bool:
    """Whether Claude Code wrote a reply itself, about an error: no model was called."""
    return message.get("model") == "<synthetic>"
