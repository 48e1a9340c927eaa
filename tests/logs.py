"""Logs for the linter's tests: a conversation with tools, thinking and results, and its turns."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from kvmem.explain.lint import FileReport, lint_file

Body = dict[str, Any]
SYSTEM = (
    "You are the planner of team 7. It is 2026-01-05 10:00:00 UTC. Session 41. " + "Plan. " * 40
)


def tool(name: str) -> Body:
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def call(name: str, arguments: str) -> Body:
    return {"id": f"call_{name}", "type": "function",
            "function": {"name": name, "arguments": arguments}}  # fmt: skip


def conversation() -> Body:
    """A chat request of eight messages, its last one the user's."""
    return {
        "model": "planner-1",
        "tools": [tool("read"), tool("write"), tool("search")],
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "Find the three files that define the ledger, please."},
            {"role": "assistant", "content": "I look.", "reasoning_content": "They may be many.",
             "tool_calls": [call("search", '{"path": "src", "depth": 3}')]},
            {"role": "tool", "tool_call_id": "call_search",
             "content": '{"hits": ["a", "b"], "n": 2}'},
            {"role": "assistant", "content": "There are two: a and b."},
            {"role": "user", "content": "Read the first one and tell me what it says."},
            {"role": "assistant", "content": "It says that tokens are never changed."},
            {"role": "user", "content": "And the second?"},
        ],
    }  # fmt: skip


def next_turn(body: Body) -> Body:
    """The request after this one: the same, a reply and a question more."""
    grown = copy.deepcopy(body)
    n = len(grown["messages"])
    grown["messages"] += [
        {"role": "assistant", "content": f"The answer to {n} is in the second file."},
        {"role": "user", "content": f"Thanks. Go on with part {n}."},
    ]
    return grown


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def linted(folder: Path, *bodies: Body, **options: Any) -> FileReport:
    """What the linter finds in these requests of one session."""
    records = [{"session_id": "s", "request": body} for body in bodies]
    return lint_file(write(folder / "log.jsonl", records), **options)
