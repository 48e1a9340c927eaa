"""Microsoft's agent-framework: a chat middleware and a function middleware.

    agent = Agent(client=OpenAIChatCompletionClient(base_url=f"{gateway}/v1", ...), tools=[...],
                  middleware=[*middleware(announcer)])
    await agent.run("Go.", session=agent.create_session())

An `AgentSession` is a session; without one, the name that is given here.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from agent_framework import (
    ChatContext,
    ChatMiddleware,
    ChatResponse,
    FunctionInvocationContext,
    FunctionMiddleware,
)

from kvmem.agents.adapters.gaps import Conversation, Conversations
from kvmem.agents.announcing import Announcer

__all__ = ["KvmemChat", "KvmemTools", "middleware"]


class _Shared:
    """What both halves know."""

    def __init__(self, announcer: Announcer | None, session_id: str) -> None:
        self._conversations = Conversations(announcer)
        self._session_id = session_id or uuid.uuid4().hex

    def of(self, session: Any) -> Conversation:
        return self._conversations.of(getattr(session, "session_id", None) or self._session_id)


class KvmemChat(ChatMiddleware):
    """Asks under the session's name."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(self, context: ChatContext, call_next: Callable[[], Awaitable[None]]) -> None:
        """One request."""
        mine = self._shared.of(context.session)
        options = dict(context.options or {})
        first = [options.get("instructions")]
        mine.sends([*first, *(_told(message) for message in context.messages)])
        # Both of the framework's OpenAI clients hand this on; headers only one of them.
        options["prompt_cache_key"] = mine.session_id
        context.options = options
        if context.stream:
            context.stream_result_hooks.append(lambda told: _heard(mine, told))
        await call_next()
        if isinstance(context.result, ChatResponse):
            _heard(mine, context.result)

    def end(self, session: Any = None) -> None:
        """Announces that a session is not asked again."""
        self._shared.of(session).end()


class KvmemTools(FunctionMiddleware):
    """Announces tools."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    async def process(
        self, context: FunctionInvocationContext, call_next: Callable[[], Awaitable[None]]
    ) -> None:
        """One call."""
        with self._shared.of(context.session).gap(context.function.name):
            await call_next()


def middleware(
    announcer: Announcer | None = None, *, session_id: str = ""
) -> tuple[KvmemChat, KvmemTools]:
    """Both, for an agent's `middleware`.

    Args:
        announcer: is told when tools start and end.
        session_id: of the session, where a run has none.
    """
    shared = _Shared(announcer, session_id)
    return KvmemChat(shared), KvmemTools(shared)


def _told(message: Any) -> list[Any]:
    """What of a message reaches the model."""
    parts = [
        [part.type, part.text, part.name, part.arguments, str(part.result)]
        for part in message.contents
    ]
    return [str(message.role), parts]


def _heard(mine: Conversation, told: ChatResponse) -> ChatResponse:
    usage = told.usage_details or {}
    mine.heard(usage.get("total_token_count"))
    return told
