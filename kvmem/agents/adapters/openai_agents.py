"""openai-agents: an input filter and run hooks, around a `Session` of the SDK's or ours.

    kept = KvmemSession("trip", "history.db", announcer=announcer)
    await Runner.run(agent, "Go.", session=kept, hooks=kept.hooks, run_config=kept.run_config())

`KvmemSession` is the SDK's SQLite session. What it gives back is what was put in, so the gateway
finds all of it; `run_config` carries the name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents import Agent, ModelSettings, RunConfig, RunHooks, SQLiteSession
from agents.items import ModelResponse
from agents.run_config import CallModelData, ModelInputData
from agents.run_context import RunContextWrapper
from agents.tool import Tool

from kvmem.agents.adapters.gaps import Conversation, Conversations
from kvmem.agents.announcing import Announcer

__all__ = ["KvmemHooks", "KvmemSession"]


class KvmemSession(SQLiteSession):
    """See the module.

    Args:
        session_id: its name, here and at the gateway.
        db_path: where it is kept; ":memory:" for nowhere.
        announcer: is told when tools start and end.
    """

    def __init__(
        self,
        session_id: str,
        db_path: str | Path = ":memory:",
        *,
        announcer: Announcer | None = None,
    ) -> None:
        super().__init__(session_id, db_path)
        self._conversations = Conversations(announcer)
        self.conversation = self._conversations.of(session_id)
        self.hooks = KvmemHooks(self.conversation)

    def run_config(self, base: RunConfig | None = None) -> RunConfig:
        """A run's settings with the session's name in them; `base` holds others."""
        base = base or RunConfig()
        mine = ModelSettings(
            extra_headers={
                **((base.model_settings and base.model_settings.extra_headers) or {}),
                **self.conversation.headers,
            }
        )
        settings = base.model_settings.resolve(mine) if base.model_settings else mine
        return dataclasses.replace(
            base, model_settings=settings, call_model_input_filter=self._filter(base)
        )

    def end(self) -> None:
        """Announces that it is not asked again."""
        self.conversation.end()

    def _filter(self, base: RunConfig) -> Callable[[CallModelData[Any]], Any]:
        """Sees what is sent, after a filter of the user's own."""
        inner = base.call_model_input_filter

        async def seen(data: CallModelData[Any]) -> ModelInputData:
            told: Any = data.model_data if inner is None else inner(data)
            if hasattr(told, "__await__"):
                told = await told
            self.conversation.sends([told.instructions, *map(_told, told.input)])
            return told

        return seen


class KvmemHooks(RunHooks[Any]):
    """Announces tools."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._running: dict[str, Callable[[], None]] = {}

    async def on_llm_end(
        self, context: RunContextWrapper[Any], agent: Agent[Any], response: ModelResponse
    ) -> None:
        """Notes how long the session is."""
        self._conversation.heard(response.usage.total_tokens)

    async def on_tool_start(
        self, context: RunContextWrapper[Any], agent: Agent[Any], tool: Tool
    ) -> None:
        """A tool runs."""
        self._running[_call(context, tool)] = self._conversation.started(tool.name)

    async def on_tool_end(
        self, context: RunContextWrapper[Any], agent: Agent[Any], tool: Tool, result: object
    ) -> None:
        """It has ended."""
        ended = self._running.pop(_call(context, tool), None)
        if ended is not None:
            ended()

    async def on_agent_end(self, context: Any, agent: Any, output: Any) -> None:
        """What a raised error has left open has ended, too."""
        while self._running:
            self._running.popitem()[1]()


def _call(context: Any, tool: Tool) -> str:
    return str(getattr(context, "tool_call_id", None) or tool.name)


def _told(item: Any) -> Any:
    """An item without what the SDK makes anew."""
    if not isinstance(item, dict):
        return item
    return {name: value for name, value in item.items() if name not in {"id", "status"}}
