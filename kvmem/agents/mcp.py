"""Tools of an MCP server, for sessions: `mcp_tools` with the client of the package `mcp`, 2.x.

    async with Client("http://127.0.0.1:9000/mcp") as client, Runtime(url) as runtime:
        session = runtime.session("lead", system="...", tools=await mcp_tools(client))

A session's tools stand in its head and stay as they are. Where the server changes its list,
`changed_tools` says how; a new session, or an epoch, is the time to take the new one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import msgspec

from kvmem.agents.schemas import check_schema, inlined
from kvmem.agents.tools import Tool
from kvmem.errors import KVMemError

__all__ = ["McpClient", "McpToolFailed", "changed_tools", "mcp_tools"]

_canonical = msgspec.json.Encoder(order="sorted").encode
MOST_PAGES = 100


class McpClient(Protocol):
    """What of `mcp.Client` is used. It belongs to the event loop that opened it."""

    async def list_tools(self, *, cursor: str | None = None) -> Any:
        """A page of tools."""
        ...

    async def call_tool(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """A call's result."""
        ...


class McpToolFailed(KVMemError):
    """The server says that a call failed; the model is told what it says."""


async def mcp_tools(
    client: McpClient, *, allow: str = "*", timeout_s: float | None = None
) -> list[Tool]:
    """The server's tools, by name, so that equal servers give equal prompts.

    Args:
        client: an open `mcp.Client`.
        allow: a pattern of the names that are taken.
        timeout_s: of each call.

    Raises:
        ConfigError: a tool's schema can't be held to.
    """
    found: list[Any] = []
    cursor: str | None = None
    for _ in range(MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        found.extend(one for one in page.tools if fnmatchcase(one.name, allow))
        cursor = page.next_cursor
        if not cursor:
            break
    return [_tool(client, one, timeout_s) for one in sorted(found, key=lambda one: one.name)]


async def changed_tools(
    client: McpClient, tools: Sequence[Tool], *, allow: str = "*"
) -> dict[str, list[str]]:
    """The names that were `added`, `removed` and `changed` since `tools` were taken; {} for none.

    Args:
        client: as for `mcp_tools`.
        tools: what it gave.
        allow: as it was given.
    """
    now = {one.name: _canonical(one.schema) for one in await mcp_tools(client, allow=allow)}
    then = {one.name: _canonical(one.schema) for one in tools}
    told = {
        "added": sorted(now.keys() - then.keys()),
        "removed": sorted(then.keys() - now.keys()),
        "changed": sorted(name for name in now.keys() & then.keys() if now[name] != then[name]),
    }
    return {kind: names for kind, names in told.items() if names}


def _tool(client: McpClient, told: Any, timeout_s: float | None) -> Tool:
    parameters = inlined(told.input_schema)
    check_schema(parameters, f"the MCP tool {told.name}")
    call = _call(client, told.name)
    return Tool(told.name, told.description or "", parameters, call, timeout_s)


def _call(client: McpClient, name: str) -> Callable[..., Awaitable[str]]:
    async def call(**arguments: Any) -> str:
        told = await client.call_tool(name, arguments)
        text = "\n".join(_text(part) for part in told.content)
        if told.is_error:
            raise McpToolFailed(text, next_step="Call it otherwise.", tool=name)
        return text

    return call


def _text(part: Any) -> str:
    """A part as text; the model here reads nothing else."""
    if part.type == "text":
        return part.text
    if part.type == "resource" and getattr(part.resource, "text", None) is not None:
        return part.resource.text
    if part.type == "resource_link":
        return str(part.uri)
    return f"[{part.type}]"
