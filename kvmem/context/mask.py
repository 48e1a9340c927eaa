"""Which tools may be called this turn, without a word of the prompt changed.

The list of tools is part of the head: taking one out of it loses everything behind it. Instead the
answer is held to the allowed ones while it is sampled, by vLLM's structured outputs: the prefix
stays, and a masked tool cannot be called.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from kvmem.errors import ConfigError

__all__ = ["HERMES", "CallFormat", "Mask", "mask"]

Mode = Literal["auto", "required", "none"]


class CallFormat(msgspec.Struct, frozen=True):
    """How a model writes a tool call: `begin`, a JSON object with name and arguments, `end`."""

    begin: str
    end: str


HERMES = CallFormat("<tool_call>\n", "\n</tool_call>")  # Qwen 2.5 and 3, Hermes, SmolLM


class Mask(msgspec.Struct, frozen=True):
    """What a request is given beside its prompt.

    Args:
        allowed: names that may be called.
        fields: for the body of vLLM's endpoints.
        prefill: text that the answer is made to begin with; `Ledger.request(prefill=...)`.
    """

    allowed: tuple[str, ...]
    fields: dict[str, Any]
    prefill: str = ""


def mask(
    tools: Sequence[Mapping[str, Any]],
    *,
    allow: str = "*",
    mode: Mode = "auto",
    form: CallFormat = HERMES,
) -> Mask:
    """Holds the next answer to some of the tools.

    Args:
        tools: those of the head, all of them.
        allow: a pattern of names: "browser_*".
        mode: "auto": text, or calls of allowed tools; "required": a call of an allowed tool;
            "none": no call, as far as the model begins it with the tokens that it was taught: the
            same letters in other tokens are not held back. Where that matters too, ask the chat
            endpoint with `tool_choice: "none"`, which parses no call.
        form: how the model writes calls.

    Raises:
        ConfigError: a call is required and no tool is allowed, or there is no such mode.
    """
    if mode not in get_args(Mode):
        raise ConfigError(
            f"{mode!r} is no mode", next_step=f"One of {', '.join(get_args(Mode))}.", setting="mode"
        )
    functions = [dict(tool.get("function") or tool) for tool in tools]
    allowed = [f for f in functions if fnmatch.fnmatchcase(str(f["name"]), allow)]
    names = tuple(str(f["name"]) for f in allowed)
    if mode == "none" or (mode == "auto" and not allowed):
        # The usual tokens of what begins a call cannot be sampled.
        return Mask((), {"bad_words": [form.begin.strip()]})
    if not allowed:
        raise ConfigError(
            f"No tool is allowed by {allow!r}, and a call is required",
            next_step=f"Known: {', '.join(str(f['name']) for f in functions) or 'none'}.",
            setting="allow",
        )
    schemas = [_schema(function) for function in allowed]
    if mode == "required":
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        return Mask(names, {"structured_outputs": {"json": schema}}, prefill=form.begin)
    # Free text until a call begins; then one of these.
    tag = {
        "structures": [
            {"begin": form.begin, "schema": schema, "end": form.end} for schema in schemas
        ],
        "triggers": [form.begin.strip()],
    }
    return Mask(names, {"structured_outputs": {"structural_tag": json.dumps(tag)}})


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
