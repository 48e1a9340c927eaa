"""Recorded group chats through teams of each layout, and the prompt tokens that an engine with room
for everything would compute.

The engine is a stand-in that answers what was recorded and keeps every whole block of prompts and
replies (a reply's last token has no KV). The prompts are those that `Team` sends.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec

from kvmem.agents import Runtime
from kvmem.agents.team import Layout
from kvmem.context import ChatRenderer

__all__ = ["SET", "chats", "computed_tokens"]

SET = "whowhen_groupchat"
_SYSTEM = "You are one of a team of agents that solve a task together."


class Call(msgspec.Struct, frozen=True):
    """One recorded call: who spoke, its role, what had been said, and what it said."""

    agent: str
    role: str
    said: list[str]
    reply: str


def chats(folder: Path, most: int) -> Iterator[list[Call]]:
    """The first `most` chats, their calls in order."""
    with gzip.open(folder / f"{SET}.jsonl.gz", "rt", encoding="utf-8") as lines:
        next(lines)
        contents: dict[int, list[dict[str, Any]]] = {}
        session, calls = None, []
        for line in lines:
            row = json.loads(line)
            if row["session"] != session:
                if calls:
                    yield calls
                    most -= 1
                if not most:
                    return
                session, calls = row["session"], []
            whole = row["messages"]
            if row["base"] is not None:
                whole = contents[row["base"]][: row["keep"]] + whole
            contents[row["id"]] = whole
            said = [message["content"] for message in whole[1:]]
            # Who spoke is told by the layout.
            reply = row["output"]["content"].removeprefix(f"{row['agent']}: ")
            calls.append(Call(row["agent"], whole[0]["content"], said, reply))
        yield calls


class _Endless(httpx.AsyncBaseTransport):
    """The stand-in for an engine."""

    def __init__(self, renderer: ChatRenderer, block_tokens: int) -> None:
        self._renderer, self._block_tokens = renderer, block_tokens
        self._end = renderer.close()[:1]
        self._known: set[int] = set()
        self.reply = ""
        self.prompt_tokens = self.computed_tokens = 0

    def forget(self) -> None:
        self._known.clear()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        prompt = json.loads(request.content)["prompt"]
        sampled = [*self._renderer.encode(self.reply), *self._end]
        cached = 0
        for block in self._blocks(prompt[:-1]):
            if block not in self._known:
                break
            cached += self._block_tokens
        self._known.update(self._blocks([*prompt, *sampled[:-1]]))
        self.prompt_tokens += len(prompt)
        self.computed_tokens += len(prompt) - cached
        choice = {
            "text": self.reply, "token_ids": sampled, "prompt_token_ids": prompt,
            "finish_reason": "stop",
        }  # fmt: skip
        return httpx.Response(200, json={"choices": [choice]})

    def _blocks(self, ids: Sequence[int]) -> Iterator[int]:
        above, size = 0, self._block_tokens
        for start in range(0, len(ids) - len(ids) % size, size):
            above = hash((above, *ids[start : start + size]))
            yield above


def computed_tokens(
    renderer: ChatRenderer, played: Sequence[Sequence[Call]], *, block_tokens: int = 16
) -> dict[str, tuple[int, int]]:
    """By layout: prompt tokens computed, and prompt tokens in all."""

    async def play(layout: Layout) -> tuple[int, int]:
        engine = _Endless(renderer, block_tokens)
        async with Runtime("http://nowhere", renderer=renderer, transport=engine) as runtime:
            for chat in played:
                engine.forget()  # what chats share is not asked here
                team = runtime.team("chat", system=_SYSTEM, layout=layout, seal=False)
                for agent, role in {call.agent: call.role for call in reversed(chat)}.items():
                    team.agent(agent, role=role)
                heard = 0
                for call in chat:
                    team.tell(*call.said[heard:])
                    engine.reply = call.reply
                    await team.turn(call.agent)
                    heard = len(call.said) + 1
        return engine.computed_tokens, engine.prompt_tokens

    return {layout: asyncio.run(play(layout)) for layout in get_args(Layout)}
