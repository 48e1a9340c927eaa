"""Logs of any form that `kvmem lint` reads, as calls whose prompts are chains of block keys.

Block keys are numbers that stand for a block and all before it. A log that has block hashes keeps
its blocks; token ids are cut into blocks of 16; text into blocks of 64 bytes, about 16 tokens, so
that no tokenizer is needed: what matters here is which prompts begin alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import msgspec

from kvmem.errors import ConfigError
from kvmem.explain.lint.readers import FORMATS, reader_of
from kvmem.explain.lint.values import Call, Fault

__all__ = ["Recorded", "Trace", "read_trace"]

BLOCK_TOKENS, BLOCK_BYTES = 16, 64
_TOOL = re.compile(r'"name":\s*"(\w+)"|^\W*(\w+)\(')


class Recorded(msgspec.Struct):
    """One call of a log. `kind` is what its agent waits for after it: "tool:NAME" or "tool",
    "user", "?" where the log does not say, and "over" after the last call of an agent."""

    session: str
    agent: str
    keys: list[int]
    at_s: float | None
    waited_s: float | None
    waited_for: str | None
    kind: str = "?"
    tool: str = ""


class Trace(msgspec.Struct):
    """The calls of a log in its order, and tokens of a block."""

    calls: list[Recorded]
    block_tokens: int
    faults: int


def read_trace(path: Path, progress: Callable[[int], None] = lambda n: None) -> Trace:
    """The calls of a log.

    Raises:
        ConfigError: the log can't be read, or nothing of it.
    """
    reader = reader_of(path)
    if reader is None:
        raise ConfigError(
            f"{path} is no log of a known form", next_step=f"Give one of {', '.join(FORMATS)}."
        )
    keys, calls, faults, block_tokens = _Keys(), [], 0, BLOCK_TOKENS
    for call in reader.calls(path):
        if isinstance(call, Fault):
            faults += 1
            continue
        if call.ids is not None and call.tokens_per_id > 1:
            block_tokens = call.tokens_per_id
        session = call.session or f"call {call.line}"
        calls.append(
            Recorded(
                session=session,
                agent=f"{session}/{call.agent or 'main'}",
                keys=keys.of(call, session),
                at_s=call.at_s,
                waited_s=call.waited_s,
                waited_for=call.waited_for,
                tool=_tool_of(call),
            )
        )
        progress(len(calls))
    if not calls:
        raise ConfigError(
            f"{path} has no call that can be read ({faults} faults)",
            next_step="Look at it with `kvmem lint`.",
        )
    _say_kinds(calls)
    return Trace(calls, block_tokens, faults)


def _say_kinds(calls: Sequence[Recorded]) -> None:
    if len({call.session for call in calls}) == len(calls):
        for call in calls:  # a log without sessions
            call.agent = ""
        return
    later: dict[str, Recorded] = {}
    for call in reversed(calls):
        after = later.get(call.agent)
        if after is None:
            call.kind = "over"
        elif after.waited_for == "tool" and call.tool:
            call.kind = f"tool:{call.tool}"
        else:
            call.kind = after.waited_for or "?"
        later[call.agent] = call


def _tool_of(call: Call) -> str:
    found = _TOOL.search(call.reply.text) if call.reply is not None else None
    return (found[1] or found[2]) if found is not None else ""


class _Keys:
    """Numbers for blocks and what is before them."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def of(self, call: Call, session: str) -> list[int]:
        if call.ids is None:
            text = "".join(f"<{p.role}>{p.text}\n" for p in call.parts).encode()
            whole = len(text) // BLOCK_BYTES * BLOCK_BYTES
            return self._chained([text[i : i + BLOCK_BYTES] for i in range(0, whole, BLOCK_BYTES)])
        if call.tokens_per_id == 1:
            ids, whole = call.ids, len(call.ids) // BLOCK_TOKENS * BLOCK_TOKENS
            return self._chained(
                [tuple(ids[i : i + BLOCK_TOKENS]) for i in range(0, whole, BLOCK_TOKENS)]
            )
        if not call.ids:
            return []
        # Ids are chained already; those of a session are told apart by their first one.
        scope = session if call.scope == "session" else ""
        return [-1 - self._number((scope, call.ids[0])), *call.ids[1:]]

    def _chained(self, blocks: Sequence[Hashable]) -> list[int]:
        before, keys = -1, []
        for block in blocks:
            before = self._number((before, block))
            keys.append(before)
        return keys

    def _number(self, what: Hashable) -> int:
        return self._numbers.setdefault(what, len(self._numbers))
