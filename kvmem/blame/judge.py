"""Whether an answer is right, where there are no candidates to compare it with.

judge = judge_of("regex:^4[.,]?300")
judge("4300 ms")
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from typing import Any

from kvmem.context.renderer import canonical
from kvmem.errors import ConfigError

__all__ = ["Judge", "contains", "exact", "judge_of", "matches", "tool_call"]

Judge = Callable[[str], bool]
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def exact(expected: str) -> Judge:
    """Right where the answer is this text, but for blanks at its ends and letters' case."""
    wanted = expected.strip().casefold()
    return lambda answer: answer.strip().casefold() == wanted


def contains(expected: str) -> Judge:
    """Right where the answer says this value somewhere, not as a part of a larger one."""
    from kvmem.blame.words import holds

    return lambda answer: holds(answer, expected)


def matches(pattern: str) -> Judge:
    """Right where the regular expression is found in the answer.

    Raises:
        ConfigError: it is no regular expression.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is no regular expression: {error}", next_step="Mend it.", setting="judge"
        ) from error
    return lambda answer: found.search(answer) is not None


def tool_call(name: str, arguments: dict[str, Any]) -> Judge:
    """Right where the answer is that call: JSON, by itself or between <tool_call> and its end;
    the order of the arguments does not matter."""
    wanted = (name, canonical(arguments))

    def judge(answer: str) -> bool:
        found = _CALL.search(answer)
        try:
            call = json.loads(found[1] if found else answer)
        except ValueError:
            return False
        if not isinstance(call, dict):
            return False
        call = call.get("function", call)
        told = call.get("arguments", call.get("parameters"))
        if isinstance(told, str):  # OpenAI's form
            try:
                told = json.loads(told)
            except ValueError:
                return False
        return (call.get("name"), canonical(told)) == wanted

    return judge


def judge_of(spec: str, expected: str = "") -> Judge:
    """The judge that a command line names.

    Args:
        spec: "exact", "contains" or "tool-call" (of what is expected), "regex:PATTERN", or
            "python:MODULE:FUNCTION", a function of the answer's text.
        expected: of the turn.

    Raises:
        ConfigError: there is no such judge, or it needs an expected answer and there is none.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("exact", "contains", "tool-call") and not expected:
        raise ConfigError(
            f"The judge {kind!r} needs the expected answer, and this turn has none",
            next_step="Give `expected` in the run, or --judge regex:PATTERN.",
            setting="judge",
        )
    if kind == "exact":
        return exact(expected)
    if kind == "contains":
        return contains(expected)
    if kind == "regex":
        return matches(rest)
    if kind == "tool-call":
        return _of_call(expected)
    if kind == "python" and rest.count(":") == 1:
        return _of_python(*rest.split(":"))
    raise ConfigError(
        f"There is no judge {spec!r}",
        next_step="Use exact, contains, tool-call, regex:PATTERN or python:MODULE:FUNCTION.",
        setting="judge",
    )


def _of_call(expected: str) -> Judge:
    try:
        call = json.loads(expected)
        return tool_call(str(call["name"]), dict(call["arguments"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"The expected answer is no tool call: {error}",
            next_step='Give it as {"name": ..., "arguments": {...}}.',
            setting="judge",
        ) from error


def _of_python(module: str, function: str) -> Judge:
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The judge {module}:{function} cannot be had: {error}",
            next_step="Name a function that can be imported from here.",
            setting="judge",
        ) from error
    return lambda answer: bool(found(answer))
