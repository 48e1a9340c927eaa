"""Reads runs: what an agent's turns were asked, and what they could have been asked.

A run is a JSON file of messages, or a folder with the ledgers of a session and of its earlier
epochs (docs/blame.md has both forms). Everything in it is from outside and looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvmem.blame.values import Epoch, Piece, Turn
from kvmem.context import Renderer
from kvmem.errors import ConfigError

__all__ = ["FORM", "MOST_BYTES", "pieces_of", "read_run", "runs_in", "turn_of"]

FORM = 1
MOST_BYTES = 64 << 20  # of a run's file


class _Turn(msgspec.Struct, forbid_unknown_fields=True):
    question: str | dict[str, Any]
    served: list[dict[str, Any]] | None = None
    history: list[dict[str, Any]] | None = None
    answered: str = ""
    expected: str = ""
    candidates: tuple[str, ...] = ()
    kv: str = "exact"
    salt: str = ""
    evidence: tuple[int, ...] = ()
    epochs: tuple[Epoch, ...] = ()


class _Run(msgspec.Struct, forbid_unknown_fields=True):
    blame: int
    turns: list[_Turn]
    session: str = ""
    system: str | None = None
    tools: tuple[Any, ...] = ()
    history: list[dict[str, Any]] = []


def runs_in(path: Path) -> list[Path]:
    """The runs that a path names: itself, or of a folder of runs each one, in order of names.

    Raises:
        ConfigError: there is none.
    """
    from kvmem.blame.ledgers import is_ledgers

    if path.is_file() or is_ledgers(path):
        return [path]
    found = sorted(
        p for p in path.glob("*") if (p.is_file() and p.suffix == ".json") or is_ledgers(p)
    )
    if not found:
        raise ConfigError(
            f"{path} holds no run", next_step="Give a run's JSON, or a folder of runs.", path=path
        )
    return found


def read_run(path: Path, renderer: Renderer | None = None) -> list[Turn]:
    """The turns of one run, in order.

    Args:
        path: a JSON file, or a folder of ledgers.
        renderer: of the ledgers' model; messages need none.

    Raises:
        ConfigError: it is no run, or a ledger's renderer is another one or not given.
    """
    from kvmem.blame.ledgers import is_ledgers, turns_of_ledgers

    if is_ledgers(path):
        if renderer is None:
            raise ConfigError(
                f"{path} is a run of ledgers, which need the renderer they were made with",
                next_step="Give the model.",
            )
        return turns_of_ledgers(path, renderer)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise _no_run(path, f"has more than {MOST_BYTES:,} bytes")
        run = msgspec.json.decode(path.read_bytes(), type=_Run)
    except OSError as error:
        raise _no_run(path, f"can't be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_run(path, f"is no run: {error}") from error
    if run.blame != FORM:
        raise _no_run(path, f"is of version {run.blame}, not {FORM}")
    name = run.session or path.stem
    return [_turn(path, run, one, f"{name}/{n}") for n, one in enumerate(run.turns)]


def _no_run(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} {why}", next_step="docs/blame.md says what a run is.", path=path)


def _turn(path: Path, run: _Run, one: _Turn, name: str) -> Turn:
    history = run.history if one.history is None else one.history
    asked = one.question
    question = {"role": "user", "content": asked} if isinstance(asked, str) else asked
    try:
        return turn_of(
            name, question, history, history if one.served is None else one.served,
            system=run.system, tools=run.tools, answered=one.answered, expected=one.expected,
            candidates=one.candidates, kv=one.kv, salt=one.salt, evidence=one.evidence,
            epochs=one.epochs,
        )  # fmt: skip
    except ValueError as error:
        raise _no_run(path, f"has a turn that can't be used, {name}: {error}") from error


def turn_of(
    name: str,
    question: Mapping[str, Any],
    full: Sequence[Mapping[str, Any]],
    served: Sequence[Mapping[str, Any]],
    **fields: Any,
) -> Turn:
    """A turn of messages; `fields` are `Turn`'s.

    Raises:
        ValueError: a message has no role, or evidence or an epoch names no piece of the history.
    """
    for message in (question, *full, *served):
        if not isinstance(message.get("role"), str):
            raise ValueError("a message has no role")
    turn = Turn(
        name=name, question=question, full=pieces_of(full), served=pieces_of(served), **fields
    )
    named = {*turn.evidence, *(i for epoch in turn.epochs for i in epoch.removed)}
    wrong = sorted(i for i in named if not 0 <= i < len(turn.full))
    if wrong:
        raise ValueError(f"there is no piece {wrong[0]} in its history of {len(turn.full)}")
    return turn


def pieces_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Piece, ...]:
    """Each message with its text, and a tool's with the call that it answers: by its id, else the
    last one before it that no other answers."""
    calls: dict[str, tuple[str, Any]] = {}
    waiting: list[tuple[str, Any]] = []
    pieces = []
    for index, message in enumerate(messages):
        said = [_content(message.get("content"))]
        for call in _calls(message):
            calls[call[0]] = call[1:]
            waiting.append(call[1:])
            said.append(f"{call[1]} {_plain(call[2])}")
        name, arguments = "", None
        if message.get("role") == "tool":
            own = calls.get(str(message.get("tool_call_id", "")))
            if own is None and waiting:
                own = waiting[0]
            if own is not None:
                name, arguments = own
                if own in waiting:
                    waiting.remove(own)
        pieces.append(
            Piece(
                index=index, message=message, text="\n".join(s for s in said if s),
                call=f"{name} {_plain(arguments)}".strip() if name else "",
                arguments=tuple(_leaves(arguments)),
            )
        )  # fmt: skip
    return tuple(pieces)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    return "" if content is None else str(content)


def _calls(message: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    found: Any = message.get("tool_calls")
    if not isinstance(found, list):
        return
    for call in found:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            continue
        told = function.get("arguments")
        if isinstance(told, str):
            try:
                told = json.loads(told)
            except ValueError:
                told = {"arguments": told}
        yield str(call.get("id", "")), str(function.get("name", "")), told


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for one in value.values():
            yield from _leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    elif value is not None:
        yield str(value)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_plain(one)}" for key, one in value.items())
    return " ".join(_leaves(value))
