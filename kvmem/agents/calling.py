"""A call of a tool, made and answered; whoever keeps KV hears when it begins and ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kvmem.agents.announcing import Hint
from kvmem.agents.asker import Asker
from kvmem.agents.tools import Tool
from kvmem.agents.values import ToolCall
from kvmem.context import Ledger

__all__ = ["answered"]


async def answered(
    asker: Asker, ledger: Ledger, tools: Mapping[str, Tool], call: ToolCall
) -> dict[str, Any]:
    """The message that answers the call: its tool's result, or what is wrong.

    Errors are marked (`is_error`): edits of history leave them in.
    """
    message = {"role": "tool", "tool_call_id": call.id, "name": call.name}
    if call.fault:
        return {**message, "content": f"Error: {call.fault}", "is_error": True}
    tool, where = tools[call.name], (ledger.session_id, ledger.n_tokens, call.name)
    expected_s, salt = asker.expected_s(call.name), ledger.cache_salt
    asker.announce(Hint("tool_start", *where, expected_s, cache_salt=salt))
    began = time.monotonic()
    try:
        return {**message, "content": await tool.run(call.arguments)}
    except TimeoutError:
        limit = "its limit" if tool.timeout_s is None else f"{tool.timeout_s:g} s"
        told = f"{call.name} took longer than {limit}"
    except Exception as error:  # noqa: BLE001 - the caller's tool: the model is told what it raises
        told = f"{type(error).__name__}: {error}"
    finally:
        asker.took(call.name, time.monotonic() - began)
        asker.announce(Hint("tool_end", *where, cache_salt=salt))
    return {**message, "content": f"Error: {told}", "is_error": True}
