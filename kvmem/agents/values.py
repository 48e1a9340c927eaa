"""What agents are answered, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

__all__ = ["Reply", "ToolCall", "Usage", "Where"]

T = TypeVar("T")


class Usage(msgspec.Struct, frozen=True):
    """Tokens of requests, as the engine counts them.

    Args:
        requests: how many.
        prompt_tokens: of all prompts.
        cached_tokens: of them, those whose KV was reused, from whichever tier.
        sampled_tokens: of all answers.
        untold: requests whose cached tokens the engine did not tell: they count as computed.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    untold: int = 0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the engine computed."""
        return self.prompt_tokens - self.cached_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.sampled_tokens + other.sampled_tokens,
            self.untold + other.untold,
        )

    def __repr__(self) -> str:
        return f"<Usage {self.explain()}>"

    def explain(self) -> str:
        """One line."""
        share = self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        told = f", {self.untold} of {self.requests} untold" if self.untold else ""
        return (
            f"{self.prompt_tokens:,} prompt tokens, {self.cached_tokens:,} reused "
            f"({share:.0%}{told}), {self.sampled_tokens:,} sampled"
        )

    @classmethod
    def of(cls, response: Mapping[str, Any], n_prompt: int, n_sampled: int) -> Usage:
        """What a response of vLLM says: its receipt from kvmem, else its own details."""
        receipt = ((response.get("kv_transfer_params") or {}).get("kvmem") or {}).get("tokens")
        details = (response.get("usage") or {}).get("prompt_tokens_details") or {}
        cached: int | None = details.get("cached_tokens")
        if receipt:
            cached = int(receipt["prompt"]) - int(receipt["computed"])
        return cls(1, n_prompt, cached or 0, n_sampled, int(cached is None))


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model wrote.

    `fault` is empty, or says why it cannot be made; the model is told.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    fault: str = ""

    @property
    def message(self) -> dict[str, Any]:
        """As OpenAI's messages have it."""
        arguments = msgspec.json.encode(self.arguments).decode()
        function = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Reply(msgspec.Struct, Generic[T], frozen=True):
    """One turn's answer.

    Args:
        agent: whose turn.
        turn: its number, the first is 1.
        text: all that the model wrote, calls of tools included.
        value: of the type that was asked for; None where none was.
        tool_calls: calls of tools, in order.
        finish_reason: the engine's: "stop", "length", ...
        usage: tokens of this turn.
        seconds: from sending to the last token, retries included.
        first_s: from sending to the first token, where the answer was streamed.
    """

    agent: str
    turn: int
    text: str
    value: T
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    seconds: float
    first_s: float | None = None

    def __repr__(self) -> str:
        return f"<Reply {self.agent} {self.turn}: {self.usage.explain()} in {self.seconds:.2f} s>"


class Where(msgspec.Struct, frozen=True):
    """Whose turn it is; errors begin with it. Turn 0 is nobody's, and told by the name alone."""

    agent: str
    turn: int

    def __str__(self) -> str:
        return f"Agent {self.agent}, turn {self.turn}" if self.turn else self.agent

    @property
    def details(self) -> dict[str, Any]:
        """For an error's attributes."""
        return {"agent": self.agent, "turn": self.turn}
