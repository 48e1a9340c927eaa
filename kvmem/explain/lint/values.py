"""What the linter passes around: parts of prompts, calls, faults of the input, breaks, reports."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = ["Break", "Call", "Fault", "FileReport", "Part", "Prefill", "Request", "Unit"]

Unit = Literal["token", "character"]
Kind = Literal["tools", "system", "message", "text"]


class Part(msgspec.Struct, frozen=True, eq=False):
    """One piece of a prompt, as it stands in the order that an engine reads it.

    `text` is all of it: thinking, content and tool calls. `pieces` are JSON texts in it, each by
    itself: a tool's description, or a tool call's arguments. `message` is its place in the
    request's list of messages, None for what stands outside it. `origin` is the JSON value that it
    was read from.
    """

    kind: Kind
    role: str
    text: str
    message: int | None = None
    content: str = ""
    thinking: str = ""
    pieces: tuple[str, ...] = ()
    origin: Any = None

    def same(self, other: Part) -> bool:
        """Whether an engine reads the same from both."""
        if self is other:
            return True
        return (self.text, self.role, self.kind) == (other.text, other.role, other.kind)

    @property
    def identity(self) -> tuple[str, str, str]:
        """What `same` compares, hashable."""
        return self.kind, self.role, self.text


class Call(msgspec.Struct):
    """One call of a model.

    Its prompt is `parts`, or where only numbers were recorded `ids`, each for `tokens_per_id`
    tokens. `agent` None: the log does not say, and the prompt itself decides. `known_ids` of the
    ids' front are those of an earlier call in the same scope, so that nobody compares them again.
    `output` is what the model sampled, where its ids are known: the engine has computed all of it
    but the last.
    `at_s` is when it came, on the log's clock; before that its agent waited `waited_s` for what
    `waited_for` says, "tool" or "user", where the log tells.
    """

    line: int
    session: str | None
    agent: str | None
    parts: list[Part] = []
    reply: Part | None = None
    model: str | None = None
    cache_salt: str = ""
    ids: list[int] | None = None
    tokens_per_id: int = 1
    known_ids: int = 0
    output: list[int] = []
    scope: Literal["session", "global"] = "global"
    input_tokens: int | None = None
    at_s: float | None = None
    waited_s: float | None = None
    waited_for: str | None = None
    record: Any = None
    body: Any = None


class Fault(msgspec.Struct, frozen=True):
    """A place of the input that could not be read; what follows it was."""

    path: str
    line: int
    reason: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}. {self.next_step}"


class Break(msgspec.Struct, frozen=True):
    """A prompt that is not its predecessor plus new parts at the end.

    `turn` counts the calls of (session, agent) from 0; `message` is the place in the request's
    messages, None for tools and for prompts of ids. `at` is the first differing unit in the whole
    prompt, `offset` in that part. `lost_tokens` have to be computed again, a quarter of the
    characters where `unit` is "character". `excerpt` shows the place before and now.
    """

    path: str
    line: int
    session: str
    agent: str
    turn: int
    part: str
    message: int | None
    at: int
    offset: int
    unit: Unit
    rule: str
    name: str
    lost_tokens: int
    fix: str
    fixable: bool
    before: str = ""
    now: str = ""


class Request(msgspec.Struct, frozen=True):
    """What an engine with room for everything would find of one prompt, in `unit`s."""

    line: int
    session: str
    agent: str
    turn: int
    prompt: int
    cached: int


class Prefill(msgspec.Struct):
    """Units computed for one role of an agent: for the first time, and again after a break."""

    session: str
    agent: str
    role: str
    new: int = 0
    again: int = 0


class FileReport(msgspec.Struct, frozen=True):
    """What was found in one file. `n_` counts all; the lists hold the first of each, bounded."""

    path: str
    format: str
    unit: Unit
    block_tokens: int
    n_calls: int
    n_sessions: int
    n_breaks: int
    n_faults: int
    prompt: int
    cached: int
    lost_tokens: int
    breaks: tuple[Break, ...]
    faults: tuple[Fault, ...]
    prefill: tuple[Prefill, ...]
    requests: tuple[Request, ...] = ()
