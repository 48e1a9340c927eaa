"""LangChain and LangGraph: a middleware for `create_agent`.

    agent = create_agent(ChatOpenAI(base_url=f"{gateway}/v1", ...), tools,
                         middleware=[KvmemMiddleware(announcer)], checkpointer=InMemorySaver())
    agent.invoke({"messages": [...]}, {"configurable": {"thread_id": "trip"}})

A thread is a session; without a checkpointer, the name that the middleware is given.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain.tools.tool_node import ToolCallRequest
from langchain_core.messages import ToolMessage
from langgraph.types import Command

from kvmem.agents.adapters.gaps import Conversation, Conversations
from kvmem.agents.announcing import Announcer

__all__ = ["KvmemMiddleware"]


class KvmemMiddleware(AgentMiddleware):
    """See the module.

    Args:
        announcer: is told when tools start and end.
        session_id: of the session, where there is no thread's id.
    """

    def __init__(self, announcer: Announcer | None = None, *, session_id: str = "") -> None:
        super().__init__()
        self._conversations = Conversations(announcer)
        self._session_id = session_id or uuid.uuid4().hex

    def wrap_model_call(
        self, request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]
    ) -> ModelResponse:
        """Asks under the session's name."""
        mine = self._of(request.runtime)
        return _heard(mine, handler(_named(mine, request)))

    async def awrap_model_call(
        self, request: ModelRequest, handler: Callable[[ModelRequest], Awaitable[ModelResponse]]
    ) -> ModelResponse:
        """The same."""
        mine = self._of(request.runtime)
        return _heard(mine, await handler(_named(mine, request)))

    def wrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]],
    ) -> ToolMessage | Command[Any]:
        """Announces the tool."""
        with self._of(request.runtime).gap(request.tool_call["name"]):
            return handler(request)

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        """The same."""
        with self._of(request.runtime).gap(request.tool_call["name"]):
            return await handler(request)

    def end(self, thread_id: str = "") -> None:
        """Announces that a thread is not asked again."""
        self._conversations.of(thread_id or self._session_id).end()

    def _of(self, runtime: Any) -> Conversation:
        told = getattr(runtime, "execution_info", None)
        return self._conversations.of(getattr(told, "thread_id", None) or self._session_id)


def _named(mine: Conversation, request: ModelRequest) -> ModelRequest:
    first = [request.system_message] if request.system_message is not None else []
    mine.sends([_told(one) for one in (*first, *request.messages)])
    settings = dict(request.model_settings)
    settings["extra_headers"] = {**(settings.get("extra_headers") or {}), **mine.headers}
    return request.override(model_settings=settings)


def _told(message: Any) -> list[Any]:
    """What of a message reaches the model."""
    calls = [[call["name"], call["args"]] for call in getattr(message, "tool_calls", None) or ()]
    return [message.type, message.content, calls]


def _heard(mine: Conversation, response: ModelResponse) -> ModelResponse:
    for message in response.result:
        usage = getattr(message, "usage_metadata", None)
        mine.heard(usage["total_tokens"] if usage else None)
    return response
