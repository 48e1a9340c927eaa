"""Plays a script against a server over HTTP, as any client of the OpenAI API would.

Every agent is a coroutine with its own history; a turn waits for the turns it needs, spends its
tool's time, and streams a reply. What is recorded is what a client sees, and the engine's own
word for how long the request queued.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
from openai import AsyncOpenAI

from kvmem.demo.team import Script, Turn, agents
from kvmem.errors import EngineError

__all__ = ["Played", "play", "request_id", "warm_up"]

REQUEST_WITHIN_S = 300.0


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """One turn as it went; times are seconds since the arm's traffic began.

    `cached_tokens` of the prompt were reused, from whichever tier. `host_tokens` of them came
    from kvmem, None where that is not known. The tool ran in `[ready_s, sent_s)`, the agent waited
    for the first token in `[sent_s, first_s)`, of which the engine queued it for `queued_s`, and
    the reply was decoded in `[first_s, end_s)`.
    """

    turn_id: str
    agent: str
    tool: str
    ready_s: float
    sent_s: float
    first_s: float
    end_s: float
    queued_s: float
    prompt_tokens: int
    cached_tokens: int
    reply: str
    reply_tokens: int
    host_tokens: int | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from sending the request to the first token of the reply."""
        return self.first_s - self.sent_s

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that the engine had to compute."""
        return self.prompt_tokens - self.cached_tokens


def play(
    script: Script,
    *,
    url: str,
    model: str,
    extra_body: dict[str, Any],
    tell: Callable[[Played], None] = lambda turn: None,
) -> list[Played]:
    """Every turn of the script, in the order they ended.

    Args:
        script: what the team says.
        url: the server, without `/v1`.
        model: the name it serves.
        extra_body: goes into every request beside what the OpenAI API knows.
        tell: is called with each turn as it ends.

    Raises:
        EngineError: a reply broke off, or lacks what the server was asked to send.
        openai.OpenAIError: the server refused a request or could not be reached.
    """
    return asyncio.run(_Play(script, url, model, extra_body, tell).run())


def warm_up(*, url: str, model: str) -> None:
    """Sends one short request that shares nothing with the script: the first one costs more."""
    with_client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=REQUEST_WITHIN_S)

    async def once() -> None:
        async with with_client as client:
            # The system message differs from the script's in its first block.
            words = " ".join(f"{n} is a number." for n in range(200))
            await client.chat.completions.create(
                model=model,
                messages=[{"role": "system", "content": words}, {"role": "user", "content": "Hi"}],
                max_tokens=8,
                temperature=0.0,
            )

    asyncio.run(once())


class _Play:
    def __init__(
        self,
        script: Script,
        url: str,
        model: str,
        extra_body: dict[str, Any],
        tell: Callable[[Played], None],
    ) -> None:
        self._script = script
        self._url = url
        self._model = model
        self._extra_body = extra_body
        self._tell = tell
        self._done = {turn.turn_id: asyncio.Event() for turn in script.turns}
        self._histories: dict[str, list[dict[str, str]]] = {}  # by turn, its reply included
        self._replies: dict[str, str] = {}
        self._played: list[Played] = []
        self._began = 0.0

    async def run(self) -> list[Played]:
        async with AsyncOpenAI(
            base_url=f"{self._url}/v1",
            api_key="none",
            timeout=REQUEST_WITHIN_S,
            max_retries=0,  # a retry would be measured as one slow turn
        ) as client:
            self._began = time.monotonic()
            try:
                async with asyncio.TaskGroup() as group:
                    for agent in agents(self._script):
                        group.create_task(self._agent(client, agent))
            except ExceptionGroup as failures:
                # The first one ended the others.
                raise failures.exceptions[0] from failures
        return self._played

    async def _agent(self, client: AsyncOpenAI, agent: str) -> None:
        history: list[dict[str, str]] = []
        for turn in self._script.turns:
            if turn.agent != agent:
                continue
            for needed in turn.needs:
                await self._done[needed].wait()
            if turn.fork_of is not None:
                history = list(self._histories[turn.fork_of])
            ready_s = self._now()
            await asyncio.sleep(turn.pause_s)  # the tool at work
            history += [message.render(self._replies) for message in turn.messages]
            played = await self._ask(client, turn, history, ready_s)
            history.append({"role": "assistant", "content": played.reply})
            self._histories[turn.turn_id] = list(history)
            self._replies[turn.turn_id] = played.reply
            self._played.append(played)
            self._done[turn.turn_id].set()
            self._tell(played)

    async def _ask(
        self, client: AsyncOpenAI, turn: Turn, history: list[dict[str, str]], ready_s: float
    ) -> Played:
        sent_s = self._now()
        first_s: float | None = None
        pieces: list[str] = []
        usage: Any = None
        messages: Any = history  # the client's types name a class a role; dicts are what it sends
        queued_ms: float | None = None
        stream = await client.chat.completions.create(
            model=self._model,
            messages=messages,
            max_tokens=self._script.reply_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self._extra_body,
            extra_headers={"X-Request-Id": request_id(turn.turn_id)},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    first_s = self._now() if first_s is None else first_s
                    pieces.append(choice.delta.content)
            if chunk.usage is not None:
                usage = chunk.usage
                queued_ms = (getattr(chunk, "metrics", None) or {}).get("queue_time_ms")
        end_s = self._now()
        if usage is None or usage.prompt_tokens_details is None:
            raise EngineError(
                f"The stream of turn {turn.turn_id} ended without its token counts",
                next_step="The server's log says why.",
                turn_id=turn.turn_id,
            )
        return Played(
            turn_id=turn.turn_id,
            agent=turn.agent,
            tool=turn.tool,
            ready_s=ready_s,
            sent_s=sent_s,
            first_s=end_s if first_s is None else first_s,  # an empty reply has no first token
            end_s=end_s,
            queued_s=(queued_ms or 0.0) / 1000.0,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens or 0,
            reply="".join(pieces),
            reply_tokens=usage.completion_tokens,
        )

    def _now(self) -> float:
        return time.monotonic() - self._began


def request_id(turn_id: str) -> str:
    """The request's name in the engine: unique in the script, and fit for a header."""
    return "demo-" + turn_id.replace(" ", "-").replace("/", "-turn-") + "-"
