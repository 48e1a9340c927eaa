"""What the gateway needs of ASGI: a request with limits, answers, streams that notice who left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from kvmem.errors import KVMemError

__all__ = ["Receive", "Refused", "Request", "Send", "Stream", "answer"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
JSON = (b"content-type", b"application/json")


class Refused(KVMemError):
    """A request that is answered by an error: `status`, and `kind` as OpenAI names it."""


class Request:
    """A client's request."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self._receive = receive

    async def body(self, most_bytes: int, within_s: float) -> bytes:
        """All of it.

        Raises:
            Refused: it is too long, or does not come.
        """
        told = self.headers.get("content-length", "0")
        if told.isdecimal() and int(told) > most_bytes:
            raise _too_long(most_bytes)
        found, size = [], 0
        try:
            async with asyncio.timeout(within_s):
                while True:
                    event = await self._receive()
                    if event["type"] == "http.disconnect":
                        raise Refused("The client has gone", status=499, kind="closed")
                    piece = event.get("body", b"")
                    size += len(piece)
                    if size > most_bytes:
                        raise _too_long(most_bytes)
                    found.append(piece)
                    if not event.get("more_body"):
                        return b"".join(found)
        except TimeoutError as error:
            raise Refused(
                f"The body did not come within {within_s:g} s",
                next_step="Send it at once, or raise head_timeout_s.",
                status=408, kind="timeout",
            ) from error  # fmt: skip

    async def gone(self) -> None:
        """Returns when the client has hung up."""
        while (await self._receive())["type"] != "http.disconnect":
            continue


def _too_long(most_bytes: int) -> Refused:
    return Refused(
        f"The body is longer than {most_bytes:,} bytes",
        next_step="Shorten it, or start the gateway with a larger --max-body-mb.",
        status=413, kind="invalid_request_error",
    )  # fmt: skip


async def answer(
    send: Send, status: int, body: Any, headers: Mapping[str, str] | None = None
) -> None:
    """A whole answer; anything but bytes is made JSON."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    more = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in (headers or {}).items()]
    length = (b"content-length", str(len(data)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [JSON, length, *more]})
    await send({"type": "http.response.body", "body": data})


class Stream:
    """Server-sent events. The first sends the head; a client that reads slowly is waited for."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def send(self, data: bytes) -> None:
        """Sends whole events."""
        if not self.begun:
            self.begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """The last word."""
        await self._send({"type": "http.response.body", "body": b""})
