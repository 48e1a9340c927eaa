"""pydantic-ai: a capability.

    agent = Agent(OpenAIChatModel("m", provider=OpenAIProvider(base_url=f"{gateway}/v1")),
                  capabilities=[Kvmem(announcer)])
    agent.run_sync("Go.", conversation_id="trip")

A conversation is a session: the id that `run` is given, else that of the message history.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai import RunContext
from pydantic_ai.capabilities import (
    AbstractCapability,
    WrapModelRequestHandler,
    WrapToolExecuteHandler,
)
from pydantic_ai.messages import ModelMessagesTypeAdapter, ModelResponse, ToolCallPart
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition

from kvmem.agents.adapters.gaps import Conversation, Conversations
from kvmem.agents.announcing import Announcer

__all__ = ["Kvmem"]

# What of a message the model reads.
_READ = {"kind", "parts", "part_kind", "content", "tool_name", "args", "instructions"}


@dataclass
class Kvmem(AbstractCapability[Any]):
    """See the module.

    Args:
        announcer: is told when tools start and end.
    """

    announcer: Announcer | None = None
    _conversations: Conversations = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._conversations = Conversations(self.announcer)

    async def wrap_model_request(
        self,
        ctx: RunContext[Any],
        *,
        request_context: ModelRequestContext,
        handler: WrapModelRequestHandler,
    ) -> ModelResponse:
        """Asks under the conversation's name."""
        mine = self._of(ctx)
        told = ModelMessagesTypeAdapter.dump_python(request_context.messages, mode="json")
        mine.sends([_read(one) for one in told])
        settings: dict[str, Any] = {**(request_context.model_settings or {})}
        settings["extra_headers"] = {**(settings.get("extra_headers") or {}), **mine.headers}
        response = await handler(
            dataclasses.replace(request_context, model_settings=ModelSettings(**settings))
        )
        mine.heard(response.usage.total_tokens)
        return response

    async def wrap_tool_execute(
        self,
        ctx: RunContext[Any],
        *,
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: dict[str, Any],
        handler: WrapToolExecuteHandler,
    ) -> Any:
        """Announces the tool."""
        with self._of(ctx).gap(call.tool_name):
            return await handler(args)

    def end(self, conversation_id: str) -> None:
        """Announces that a conversation is not asked again."""
        self._conversations.of(conversation_id).end()

    def _of(self, ctx: RunContext[Any]) -> Conversation:
        return self._conversations.of(str(ctx.conversation_id or ctx.run_id))


def _read(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _read(value) if name == "parts" else value
                for name, value in told.items() if name in _READ}  # fmt: skip
    return [_read(one) for one in told] if isinstance(told, list) else told
