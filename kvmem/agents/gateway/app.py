"""The gateway as an ASGI application: who may ask, what is asked, what becomes of failures."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from kvmem.agents.gateway import anthropic, chat, responses
from kvmem.agents.gateway.exchange import Exchange
from kvmem.agents.gateway.http import Receive, Refused, Request, Scope, Send, Stream, answer
from kvmem.agents.gateway.messages import NotLedgered
from kvmem.agents.gateway.models import Models, NoModel
from kvmem.agents.gateway.sessions import Sessions
from kvmem.agents.gateway.settings import Settings
from kvmem.agents.gateway.turn import Turn, Wish
from kvmem.agents.gateway.wire import UpstreamGone, UpstreamSilent
from kvmem.errors import EngineError, KVMemError
from kvmem.hints import of_header

__all__ = ["Dialect", "Gateway"]

log = logging.getLogger("kvmem.gateway")
HANDED_ON = ("x-request-id", "x-vllm-priority", "traceparent", "tracestate")


class Dialect(Protocol):
    """One API: its requests as chat requests, and the engine's answers as its own."""

    def asked(self, body: dict[str, Any]) -> tuple[dict[str, Any], Wish]:
        """The chat request, and what the client wants of its prefix."""
        ...

    async def whole(self, exchange: Exchange) -> Any:
        """The answer in one piece."""
        ...

    async def stream(self, exchange: Exchange, stream: Stream) -> None:
        """The answer as events."""
        ...

    def failed(self, status: int, kind: str, message: str) -> Any:
        """An error's body."""
        ...

    def broke_off(self, kind: str, message: str) -> bytes:
        """An error in the middle of a stream, as an event."""
        ...


class Gateway:
    """See the module. One event loop uses it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models = Models(settings)
        self.sessions = Sessions(settings.sessions, settings.max_sessions)
        self.active = 0
        self._places = asyncio.Semaphore(settings.max_streams)
        self._waiting = 0
        self._scopes = asyncio.Lock()
        self._dialects: dict[str, Dialect] = {
            "/v1/chat/completions": chat.Chat(),
            "/v1/messages": anthropic.Anthropic(),
            "/v1/responses": responses.Responses(),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._serve(Request(scope, receive), send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.models.close()
        self.sessions.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, request: Request, send: Send) -> None:
        dialect = self._dialects.get(request.path)
        begun = _Begun(send)
        try:
            self._admit(request)
            if request.method == "GET":
                await self._get(request, begun)
            elif request.method == "POST":
                await self._post(request, dialect, begun)
            else:
                raise Refused("There is no such method", status=405, kind="invalid_request_error")
        except (KVMemError, msgspec.DecodeError) as error:
            status, kind = _told(error)
            log.info("%s %s: %s", request.method, request.path, kind)
            await self._fail(begun, dialect, status, kind, str(error))
        except Exception as error:  # noqa: BLE001 the top of a request: the others go on
            # Where it was, but not what it says: that may hold text of a prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request failed: %s\n%s", type(error).__name__, where)
            await self._fail(
                begun, dialect, 500, "internal_error", "The gateway failed; see its log."
            )

    async def _fail(
        self, send: _Begun, dialect: Dialect | None, status: int, kind: str, message: str
    ) -> None:
        speaks = dialect or chat.Chat()
        with contextlib.suppress(OSError):
            if not send.begun:
                headers = {"retry-after": "1"} if status in {429, 502, 503} else None
                await answer(send, status, speaks.failed(status, kind, message), headers)
            else:
                body = speaks.broke_off(kind, message)
                await send({"type": "http.response.body", "body": body})

    def _admit(self, request: Request) -> None:
        token = self.settings.token
        if not token or request.path == "/health":
            return
        given = request.headers.get("x-api-key") or request.headers.get(
            "authorization", ""
        ).removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise Refused(
                "The token is not this gateway's",
                next_step="Give it as the client's API key.",
                status=401, kind="authentication_error",
            )  # fmt: skip

    def _headers(self, request: Request) -> dict[str, str]:
        """For the upstream."""
        found = {name: request.headers[name] for name in HANDED_ON if name in request.headers}
        if self.settings.upstream_key:
            found["authorization"] = f"Bearer {self.settings.upstream_key}"
        elif not self.settings.token:
            key = request.headers.get("x-api-key")
            given = request.headers.get("authorization") or (f"Bearer {key}" if key else None)
            if given:
                found["authorization"] = given
        return found

    def _tenant(self, request: Request) -> str:
        """Who may share: all that have the gateway's token, else all with one key of theirs."""
        if self.settings.token:
            return ""
        given = request.headers.get("x-api-key") or request.headers.get("authorization") or ""
        return hashlib.sha256(given.removeprefix("Bearer ").encode()).hexdigest()

    # -- what can be asked -------------------------------------------------------------------

    async def _get(self, request: Request, send: Send) -> None:
        if request.path == "/health":
            await self._health(send)
        elif request.path == "/v1/models":
            cards = await self.models.listed(self._headers(request))
            await answer(send, 200, {"object": "list", "data": cards})
        elif request.path.startswith("/v1/models/"):
            name = request.path.removeprefix("/v1/models/")
            cards = await self.models.listed(self._headers(request))
            found = [card for card in cards if card["id"] == name]
            if not found:
                raise NoModel(f"The model `{name}` does not exist", model=name)
            await answer(send, 200, found[0])
        elif request.path == "/v1/kvmem/gateway":
            await answer(send, 200, {"sessions": len(self.sessions), "active": self.active})
        else:
            raise _no_such(request)

    async def _health(self, send: Send) -> None:
        for upstream in self.models.upstreams:
            with contextlib.suppress(EngineError):
                if (await upstream.get("/health"))[0] == 200:
                    return await answer(send, 200, b"")
        return await answer(send, 503, {"error": {"message": "no upstream is healthy"}})

    async def _post(self, request: Request, dialect: Dialect | None, send: _Begun) -> None:
        settings = self.settings
        data = await request.body(int(settings.max_body_mb * 1e6), settings.head_timeout_s)
        body = msgspec.json.decode(data)
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise Refused(
                "The body names no model",
                next_step="Send a JSON object with `model`.",
                status=400, kind="invalid_request_error",
            )  # fmt: skip
        if not request.path.startswith("/v1/"):
            raise _no_such(request)
        async with self._place():
            work = asyncio.ensure_future(
                self._hand_on(request, data, body, send)
                if dialect is None
                else self._turn(request, dialect, body, send)
            )
            gone = asyncio.ensure_future(request.gone())
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                # The client has gone, or the gateway ends: so does the engine's request.
                gone.cancel()
                if not work.done():
                    work.cancel()
                    await asyncio.wait({work})
            if not work.cancelled():
                work.result()

    @contextlib.asynccontextmanager
    async def _place(self) -> Any:
        if self._places.locked() and self._waiting >= self.settings.max_streams:
            raise Refused(
                f"{self.settings.max_streams} requests run and as many wait",
                next_step="Send it again later, or raise --max-streams.",
                status=429, kind="rate_limit_error",
            )  # fmt: skip
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self._places.release()

    async def _turn(
        self, request: Request, dialect: Dialect, body: dict[str, Any], send: _Begun
    ) -> None:
        chat_body, wish = dialect.asked(body)
        exchange = await self._ask(request, chat_body, wish)
        try:
            if exchange.status != 200:
                await self._refused(exchange, dialect, send)
            elif chat_body.get("stream"):
                stream = Stream(send)
                await dialect.stream(exchange, stream)
                await stream.end()
            else:
                await answer(send, 200, await dialect.whole(exchange))
        except asyncio.CancelledError:
            exchange.left()
            raise
        except (UpstreamGone, UpstreamSilent):
            self.models.forget(exchange.turn.model.upstream)
            raise
        finally:
            exchange.close()

    async def _ask(self, request: Request, body: dict[str, Any], wish: Wish) -> Exchange:
        _take_hint(request, body)
        headers = self._headers(request)
        model = await self.models.get(body["model"], headers)
        turn = Turn(body, model, wish)
        name, by = _name(request, body)
        try:
            if not _is_sound(body):
                raise NotLedgered("the engine is to say what is wrong", reason="malformed")
            pieces = await model.renderer(body, headers)
            which = (model.name, pieces, self._tenant(request), str(body.get("cache_salt") or ""))
            if not self.sessions.knows(*which):
                async with self._scopes:  # its ledgers are read from the disk
                    await asyncio.to_thread(self.sessions.scope, *which)
            scope = self.sessions.scope(*which)
            if wish.previous:
                before = scope.before(wish.previous)
                if before is None:
                    raise _not_previous(wish.previous)
                turn.go_on(before)
            turn.begin(self.sessions, scope, name, by)
        except NotLedgered as why:
            if wish.previous:
                raise _not_previous(wish.previous) from why
            turn.hand_on(why)
        headers["content-type"] = "application/json"
        try:
            answered = await model.upstream.ask(
                "POST", "/v1/chat/completions", msgspec.json.encode(turn.body), headers
            )
        except (UpstreamGone, UpstreamSilent):
            self.models.forget(model.upstream)
            raise
        return Exchange(turn, answered)

    async def _refused(self, exchange: Exchange, dialect: Dialect, send: Send) -> None:
        """What the engine says of a request that it does not take, in the client's terms."""
        data = await exchange.answer.read()
        message, kind = "the engine refused the request", "invalid_request_error"
        with contextlib.suppress(msgspec.DecodeError, AttributeError):
            told = msgspec.json.decode(data)
            told = told.get("error") or told
            message, kind = str(told.get("message") or message), str(told.get("type") or kind)
        if exchange.status == 404:
            self.models.forget(exchange.turn.model.upstream)
        body = dialect.failed(exchange.status, kind, message)
        await answer(send, exchange.status, body)

    async def _hand_on(
        self, request: Request, data: bytes, body: Mapping[str, Any], send: Send
    ) -> None:
        """An endpoint that has no ledgers: byte for byte."""
        headers = self._headers(request)
        model = await self.models.get(body["model"], headers)
        headers["content-type"] = "application/json"
        answered = await model.upstream.ask("POST", request.path, data, headers)
        try:
            kind = answered.headers.get("content-type", "application/json").encode("latin-1")
            head = {
                "type": "http.response.start", "status": answered.status,
                "headers": [(b"content-type", kind)],
            }  # fmt: skip
            await send(head)
            while piece := await answered.piece():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            answered.close()


class _Begun:
    """`send` that remembers whether an answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def __call__(self, event: Any) -> None:
        self.begun = True
        await self._send(event)


def _name(request: Request, body: Mapping[str, Any]) -> tuple[str, str]:
    """The session's name as the client gives it, and how."""
    for given, by in (
        (request.headers.get("x-session-id"), "session_id"),
        (body.get("session_id"), "session_id"),
        (body.get("prompt_cache_key"), "prompt_cache_key"),
    ):
        if isinstance(given, str) and given:
            return given, by
    return "", "prefix"


def _take_hint(request: Request, body: dict[str, Any]) -> None:
    """Puts an X-Agent-Hint header where the engine takes hints; the body's own come first."""
    header = request.headers.get("x-agent-hint")
    given = body.get("kv_transfer_params") or {}
    if not header or not isinstance(given, dict):
        return
    ours = given.get("kvmem") or {}
    if isinstance(ours, dict) and "hints" not in ours:
        body["kv_transfer_params"] = {**given, "kvmem": {**ours, "hints": of_header(header)}}


def _is_sound(body: Mapping[str, Any]) -> bool:
    """Whether the messages have the form that they must have; what they say is the engine's."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return False
    for name in ("chat_template_kwargs", "kv_transfer_params"):
        if not isinstance(body.get(name) or {}, dict):
            return False
    return all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages)


def _told(error: Exception) -> tuple[int, str]:
    if isinstance(error, Refused):
        return error.details["status"], error.details["kind"]
    if isinstance(error, NoModel):
        return 404, "not_found_error"
    if isinstance(error, UpstreamSilent):
        return 504, "timeout_error"
    if isinstance(error, EngineError):
        status = error.details.get("status")
        return (status, "authentication_error") if status in {401, 403} else (502, "upstream_error")
    return 400, "invalid_request_error"


def _not_previous(name: str) -> Refused:
    return Refused(
        f"There is no response {name}",
        next_step="Send the whole history as `input`.", status=404, kind="not_found_error",
    )  # fmt: skip


def _no_such(request: Request) -> Refused:
    return Refused(
        f"There is no {request.path}",
        next_step="There are /v1/chat/completions, /v1/responses, /v1/messages and /v1/models.",
        status=404, kind="not_found_error",
    )  # fmt: skip
