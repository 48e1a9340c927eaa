"""Tools of a real MCP server, called by a session."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("mcp")

import mcp
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from kvmem.agents.mcp import changed_tools, mcp_tools
from tests.fake_engine import FakeEngine, runtime


def server() -> MCPServer:
    one = MCPServer("house")

    @one.tool()
    def look(q: str) -> str:
        """Looks at something."""
        return f"There is {q}."

    @one.tool()
    def burn(q: str) -> str:
        raise ToolError(f"{q} does not burn")

    return one


def test_a_session_calls_a_servers_tool() -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"q": "a door"}}\n</tool_call>'
    engine = FakeEngine(lambda prompt: "Done." if "There is" in prompt else call)

    async def main() -> Any:
        async with mcp.Client(server()) as client, runtime(engine) as opened:
            tools = await mcp_tools(client)
            one = opened.session("a", system="Look.", tools=tools)
            return [tool.name for tool in tools], await one.run("Go."), one.ledger.messages()

    names, reply, messages = asyncio.run(main())
    assert names == ["burn", "look"]
    assert reply.text == "Done."
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["There is a door."]


def test_what_a_server_says_of_a_failure_reaches_the_model() -> None:
    call = '<tool_call>\n{"name": "burn", "arguments": {"q": "stone"}}\n</tool_call>'
    engine = FakeEngine(lambda prompt: "Done." if "does not burn" in prompt else call)

    async def main() -> Any:
        async with mcp.Client(server()) as client, runtime(engine) as opened:
            one = opened.session("a", system="Look.", tools=await mcp_tools(client))
            return await one.run("Go.")

    assert asyncio.run(main()).text == "Done."


def test_a_changed_list_is_said_and_the_session_keeps_its_own() -> None:
    async def main() -> Any:
        house = server()
        async with mcp.Client(house, cache=None) as client:
            tools = await mcp_tools(client)
            same = await changed_tools(client, tools)
            house.remove_tool("burn")

            @house.tool()
            def open_it(q: str) -> str:
                return q

            return same, await changed_tools(client, tools), await mcp_tools(client, allow="l*")

    same, changed, allowed = asyncio.run(main())
    assert same == {}
    assert changed == {"added": ["open_it"], "removed": ["burn"]}
    assert [tool.name for tool in allowed] == ["look"]
