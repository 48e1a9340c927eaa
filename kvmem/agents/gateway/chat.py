"""OpenAI's chat completions: what the engine speaks itself."""

from __future__ import annotations

from typing import Any

import msgspec

from kvmem.agents.gateway.exchange import Exchange
from kvmem.agents.gateway.http import Stream
from kvmem.agents.gateway.turn import Wish

__all__ = ["Chat"]

_encode = msgspec.json.Encoder().encode


class Chat:
    """See `Dialect`."""

    def asked(self, body: dict[str, Any]) -> tuple[dict[str, Any], Wish]:
        """As it is."""
        return body, Wish()

    async def whole(self, exchange: Exchange) -> Any:
        """As it is."""
        return await exchange.whole()

    async def stream(self, exchange: Exchange, stream: Stream) -> None:
        """As it is; usage only where it was asked for."""
        hide = not exchange.turn.wants_usage
        async for batch in exchange.chunks():
            out = b"".join(
                b"data: %b\n\n" % _encode(chunk)
                for chunk in batch
                if chunk.get("choices") or "error" in chunk or not hide
            )
            if out:
                await stream.send(out)
        await stream.send(b"data: [DONE]\n\n")

    def failed(self, status: int, kind: str, message: str) -> Any:
        """OpenAI's form."""
        return {"error": {"message": message, "type": kind, "param": None, "code": status}}

    def broke_off(self, kind: str, message: str) -> bytes:
        """An event with the error; the openai client raises it."""
        return b"data: %b\n\n" % _encode(self.failed(502, kind, message))
