"""A turn at the engine: sent, read chunk by chunk or whole, committed before its end is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from kvmem.agents.gateway.turn import Turn
from kvmem.agents.gateway.wire import Answer, UpstreamGone
from kvmem.errors import EngineError

__all__ = ["Exchange"]

Chunk = dict[str, Any]
_decoder = msgspec.json.Decoder()


def _decode(data: bytes) -> Chunk:
    try:
        found: Chunk = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise EngineError(
            "The server's answer is no JSON", next_step="Is it an OpenAI-compatible server?"
        ) from error
    return found


class _Choice:
    """What one choice has said so far."""

    __slots__ = ("calls", "ended", "ids", "text")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.ids: list[int] = []
        self.calls: dict[int, dict[str, Any]] = {}
        self.ended = False

    def take(self, delta: Mapping[str, Any]) -> None:
        content = delta.get("content")
        if content:
            self.text.append(content)
        for call in delta.get("tool_calls") or ():
            told = self.calls.setdefault(
                call.get("index", len(self.calls)), {"id": None, "name": "", "arguments": ""}
            )
            function = call.get("function") or {}
            told["id"] = call.get("id") or told["id"]
            told["name"] += function.get("name") or ""
            told["arguments"] += function.get("arguments") or ""

    def message(self) -> dict[str, Any]:
        calls = [
            {"id": one["id"], "function": {"name": one["name"], "arguments": one["arguments"]}}
            for _, one in sorted(self.calls.items())
        ]
        return {"content": "".join(self.text), "tool_calls": calls}


class Exchange:
    """The engine's answer to a turn; `close` in any case.

    A client that hangs up leaves with what it has seen: that much is committed.
    """

    def __init__(self, turn: Turn, answer: Answer) -> None:
        self.turn, self.answer = turn, answer
        self._choices: dict[int, _Choice] = {}
        self._prompt: list[int] | None = None

    @property
    def status(self) -> int:
        """Of HTTP; but for 200 `whole` and `chunks` are no answers."""
        return self.answer.status

    async def whole(self) -> Chunk:
        """The chat completion."""
        told: Chunk = _decode(await self.answer.read())
        prompt = told.get("prompt_token_ids")
        for choice in told.get("choices") or ():
            ids = choice.get("token_ids")
            self.turn.commit(choice.get("message") or {}, ids, prompt)
            if not self.turn.wants_ids:
                choice.pop("token_ids", None)
        if not self.turn.wants_ids:
            told.pop("prompt_token_ids", None)
        if told.get("usage"):
            told["usage"] = self.turn.usage(told["usage"])
        return told

    async def chunks(self) -> AsyncIterator[list[Chunk]]:
        """The stream's chunks, those that came together at once.

        Raises:
            UpstreamGone, UpstreamSilent: it broke off.
        """
        rest = b""
        while piece := await self.answer.piece():
            *events, rest = (rest + piece if rest else piece).split(b"\n\n")
            batch = []
            for event in events:
                if not event.startswith(b"data:"):
                    continue  # a comment
                if event.endswith(b"[DONE]"):
                    if batch:
                        yield batch
                    return
                chunk = _decode(event[5:])
                self._take(chunk)
                batch.append(chunk)
            if batch:
                yield batch
        raise UpstreamGone("The server ended its answer early", next_step="Send it again.")

    def _take(self, chunk: Chunk) -> None:
        turn = self.turn
        prompt = chunk.get("prompt_token_ids")
        if prompt is not None:
            self._prompt = prompt
            if not turn.wants_ids:
                del chunk["prompt_token_ids"]
        for choice in chunk.get("choices") or ():
            index = choice["index"]
            state = self._choices.get(index)
            if state is None:
                state = self._choices[index] = _Choice()
            state.take(choice.get("delta") or {})
            ids = choice.get("token_ids")
            if ids:
                state.ids += ids
            if ids is not None and not turn.wants_ids:
                del choice["token_ids"]
            if choice.get("finish_reason"):
                state.ended = True
                turn.commit(state.message(), state.ids, self._prompt)
        if chunk.get("usage"):
            chunk["usage"] = turn.usage(chunk["usage"])

    def left(self) -> None:
        """The client has gone in the middle of it."""
        for state in self._choices.values():
            if state.ids and not state.ended:
                state.ended = True
                self.turn.commit(state.message(), state.ids, self._prompt)

    def close(self) -> None:
        """Ends it at the engine too, where it was not over."""
        self.answer.close()
