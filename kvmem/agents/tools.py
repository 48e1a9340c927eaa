"""Tools: functions with a schema, and the calls of them that a model writes.

@tool
def search(query: Annotated[str, Meta(max_length=80)], most: int = 3) -> list[str]:
    "Finds passages that hold every word of the query."
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints, overload

import msgspec

from kvmem.agents.schemas import check_schema, fault_of, schema_of
from kvmem.agents.values import ToolCall
from kvmem.context import CallFormat
from kvmem.errors import ConfigError

__all__ = ["Tool", "calls_in", "describe", "tool"]


class Tool(msgspec.Struct, frozen=True):
    """A function that a model may call.

    Args:
        name: as the model writes it.
        description: what it does, for the model.
        parameters: JSON schema of its arguments.
        function: takes the arguments by name; a coroutine function is awaited, others run in a
            thread. What it raises is told to the model as an error.
        timeout_s: after so long it counts as failed; a thread cannot be ended, and goes on.
        arguments: the type that the arguments are converted to, where `tool` made one.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any]
    timeout_s: float | None = None
    arguments: type[msgspec.Struct] | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """As OpenAI's `tools` have it."""
        function = {
            "name": self.name, "description": self.description, "parameters": self.parameters,
        }  # fmt: skip
        return {"type": "function", "function": function}

    def __repr__(self) -> str:
        names = ", ".join(self.parameters.get("properties", {}))
        return f"<Tool {self.name}({names})>"

    async def run(self, arguments: Mapping[str, Any]) -> str:
        """The function's result as text: a string as it is, anything else as JSON.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            Exception: whatever the function raises.
        """
        given = dict(arguments)
        if self.arguments is not None:
            made = msgspec.convert(given, self.arguments)
            given = {name: getattr(made, name) for name in made.__struct_fields__}
        async with asyncio.timeout(self.timeout_s):
            if inspect.iscoroutinefunction(self.function):
                result = await self.function(**given)
            else:
                result = await asyncio.to_thread(self.function, **given)
        return result if isinstance(result, str) else msgspec.json.encode(result).decode()


@overload
def tool(function: Callable[..., Any]) -> Tool: ...
@overload
def tool(*, name: str = ..., timeout_s: float | None = ...) -> Callable[..., Tool]: ...
def tool(
    function: Callable[..., Any] | None = None, *, name: str = "", timeout_s: float | None = None
) -> Tool | Callable[..., Tool]:
    """A tool of a function: its name, its docstring's first paragraph, a schema of its types.

    Raises:
        ConfigError: an argument has no type, or none that has a schema.
    """
    if function is None:
        return lambda given: _tool_of(given, name, timeout_s)
    return _tool_of(function, name, timeout_s)


def _tool_of(function: Callable[..., Any], name: str, timeout_s: float | None) -> Tool:
    named = name or str(getattr(function, "__name__", "tool"))
    hints = get_type_hints(function, include_extras=True)
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in hints:
            raise ConfigError(
                f"The tool {named}: its argument {parameter.name} has no type",
                next_step="Annotate every argument.",
                setting=named,
            )
        field = (parameter.name, hints[parameter.name])
        has_default = parameter.default is not inspect.Parameter.empty
        fields.append((*field, parameter.default) if has_default else field)
    made = msgspec.defstruct(named, fields, forbid_unknown_fields=True, kw_only=True)
    parameters = schema_of(made)
    parameters.pop("title", None)
    check_schema(parameters, f"the tool {named}")
    told = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0]
    return Tool(named, " ".join(told.split()), parameters, function, timeout_s, made)


def describe(tools: Sequence[Tool], form: CallFormat) -> str:
    """What a system prompt says of tools, where the chat template says nothing of them."""
    lines = [msgspec.json.encode(one.schema).decode() for one in tools]
    return "\n".join(
        [
            "\n\n# Tools\n\nYou may call these functions:",
            *lines,
            "\nA call is a JSON object with name and arguments, written like this:",
            f'{form.begin}{{"name": ..., "arguments": ...}}{form.end}',
        ]
    )


def calls_in(
    text: str, tools: Mapping[str, Tool], form: CallFormat, *, first: int
) -> tuple[ToolCall, ...]:
    """The calls that a text holds, in order, each looked at against its tool's schema.

    Args:
        text: what the model wrote.
        tools: those that it may call, by name.
        form: how it writes a call.
        first: number of the first of them: their ids are made of numbers, so that equal
            conversations have equal ones.
    """
    begin, end = form.begin.strip(), form.end.strip()
    found = []
    for piece in text.split(begin)[1:]:
        written = piece.partition(end)[0].strip()
        found.append(_call(f"call{first + len(found):05d}", written, tools))
    return tuple(found)


def _call(call_id: str, written: str, tools: Mapping[str, Tool]) -> ToolCall:
    try:
        told = json.loads(written)
    except ValueError as error:
        return ToolCall(call_id, "", {}, f"this call is no JSON: {error}")
    name = told.get("name") if isinstance(told, dict) else None
    arguments = told.get("arguments", {}) if isinstance(told, dict) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return ToolCall(call_id, "", {}, "a call is an object with a name and arguments")
    if name not in tools:
        known = ", ".join(tools) or "none"
        return ToolCall(call_id, name, arguments, f"there is no tool {name}; known: {known}")
    return ToolCall(call_id, name, arguments, fault_of(arguments, tools[name].parameters))
