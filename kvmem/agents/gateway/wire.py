"""HTTP/1.1 to the engines: httptools over asyncio, a pool of open connections, no more.

A general client costs several times what a streamed token may cost. Reading stops while nobody
takes what came (backpressure); an answer that is closed early closes its connection, by which vLLM
knows that the client has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import msgspec

from kvmem.errors import EngineError

__all__ = ["Answer", "Upstream", "UpstreamGone", "UpstreamSilent"]

HELD_BYTES = 1 << 20  # of an answer that nobody takes; then reading stops
CONNECT_WITHIN_S = 10.0


class UpstreamGone(EngineError):
    """The engine's server could not be reached, or went away in an answer."""


class UpstreamSilent(EngineError):
    """The engine's server sent nothing for longer than `timeout_s`."""


class _Connection(asyncio.Protocol):
    """One connection; httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: deque[bytes] = deque()
        self.held = 0
        self.begun = self.headed = self.done = self.lost = self.paused = False
        self.stays_open = False
        self._parser: Any = None
        self._errors: tuple[type[Exception], ...] = ()
        self._waiter: asyncio.Future[bool] | None = None
        self.waits_since: float | None = None

    def begin(self) -> None:
        """Before each request."""
        self.status, self.headers, self.held = 0, {}, 0
        self.pieces.clear()
        self.begun = self.headed = self.done = self.stays_open = False
        import httptools  # of the extra `gateway`

        self._parser = httptools.HttpResponseParser(self)
        self._errors = (httptools.HttpParserError, AttributeError)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.begun = True
        try:
            self._parser.feed_data(data)
        except self._errors:  # or bytes that nobody asked for
            self.lost = True
            self.close()
        if self.held > HELD_BYTES and not self.paused and self.transport is not None:
            self.paused = True
            self.transport.pause_reading()
        self.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        ends = self.headed and not {"content-length", "transfer-encoding"} & self.headers.keys()
        self.done = self.done or ends
        self.lost = True
        self.wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status, self.headed = self._parser.get_status_code(), True

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)
        self.held += len(body)

    def on_message_complete(self) -> None:
        self.done = True
        self.stays_open = bool(self._parser.should_keep_alive())

    @property
    def reusable(self) -> bool:
        """Whether another request can follow."""
        return self.done and self.stays_open and not self.lost

    def take(self) -> bytes:
        """All that is here of the body."""
        data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self.held = 0
        if self.paused and self.transport is not None:
            self.paused = False
            self.transport.resume_reading()
        return data

    async def wait(self) -> bool:
        """Until something came; true where `wake` says that nothing did for too long."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        self.waits_since = loop.time()
        try:
            return await self._waiter
        finally:
            self._waiter = self.waits_since = None

    def wake(self, *, timed_out: bool = False) -> None:
        """Ends a wait."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(timed_out)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Answer:
    """An engine's answer: `status`, `headers`, and its body once. `close` in any case."""

    def __init__(self, upstream: Upstream, connection: _Connection, timeout_s: float) -> None:
        self._upstream, self._connection, self._timeout_s = upstream, connection, timeout_s
        self._timer: asyncio.TimerHandle | None = None

    @property
    def status(self) -> int:
        """Of HTTP."""
        return self._connection.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in small letters."""
        return self._connection.headers

    async def head(self) -> None:
        """Waits for status and headers."""
        one = self._connection
        await self._until(lambda: one.headed)

    async def piece(self) -> bytes:
        """What came of the body since; b"" at its end.

        Raises:
            UpstreamGone, UpstreamSilent: there is no end.
        """
        one = self._connection
        if not one.pieces and not one.done:
            await self._until(lambda: bool(one.pieces) or one.done)
        return one.take() if one.pieces else b""

    async def read(self) -> bytes:
        """All of the body."""
        found = []
        while piece := await self.piece():
            found.append(piece)
        return b"".join(found)

    async def _until(self, here: Callable[[], bool]) -> None:
        one = self._connection
        if self._timer is None:
            # One for the whole answer: to set one for every token costs more than the token.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._timeout_s, self._look, loop)
        while not here():
            if one.lost:
                raise UpstreamGone(
                    f"{self._upstream.url} closed the connection",
                    next_step="Send the request again when the server is up.",
                    begun=one.begun,
                )
            if await one.wait():
                raise UpstreamSilent(
                    f"{self._upstream.url} sent nothing for {self._timeout_s:g} s",
                    next_step="Look at the server, or raise --timeout.",
                )

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends a wait that is too long; looks again when the one that is on might be."""
        since = self._connection.waits_since
        left = self._timeout_s if since is None else since + self._timeout_s - loop.time()
        if left <= 0:
            self._connection.wake(timed_out=True)
            left = self._timeout_s
        self._timer = loop.call_later(left, self._look, loop)

    def close(self) -> None:
        """Gives the connection back, or ends it where the answer was not taken whole."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._upstream.give_back(self._connection)


class Upstream:
    """One server; connections are kept open and used again."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._parts: SplitResult = urlsplit(self.url)
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if self._parts.scheme == "https" else None
        self._host = self._parts.netloc.rpartition("@")[2]

    async def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Sends a request; the answer's head is here when it returns.

        Raises:
            UpstreamGone, UpstreamSilent: it can't be reached, or does not answer.
        """
        lines = [f"{method} {self._parts.path}{path} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        lines += [f"Content-Length: {len(body)}", "", ""]
        head = "\r\n".join(lines).encode("latin-1")
        while True:
            connection, used = await self._connection()
            connection.begin()
            assert connection.transport is not None
            connection.transport.write(head + body)
            answer = Answer(self, connection, self._timeout_s)
            try:
                await answer.head()
            except UpstreamGone as gone:
                answer.close()
                # The server closed it while it was idle: the request was never read.
                if used and not gone.begun:
                    continue
                raise
            except BaseException:
                answer.close()
                raise
            return answer

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body."""
        return await self._whole(await self.ask("GET", path, headers=headers))

    async def post(
        self, path: str, body: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of what a JSON body is answered by."""
        more = {**(headers or {}), "Content-Type": "application/json"}
        return await self._whole(await self.ask("POST", path, msgspec.json.encode(body), more))

    async def _whole(self, answer: Answer) -> tuple[int, bytes]:
        try:
            return answer.status, await answer.read()
        finally:
            answer.close()

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            one = self._idle.pop()
            if not one.lost:
                return one, True
        host = self._parts.hostname or ""
        port = self._parts.port or (443 if self._tls else 80)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                _, made = await loop.create_connection(_Connection, host, port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            raise UpstreamGone(
                f"{self.url} can't be reached: {error or 'no answer'}",
                next_step="Start the server, or give another --upstream.",
                begun=False,
            ) from error
        return made, False

    def give_back(self, connection: _Connection) -> None:
        """See `Answer.close`."""
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Ends what is idle."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()
