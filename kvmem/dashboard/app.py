"""The page's routes.

    GET /                    the page; its files are below /static
    GET /login, POST /login  where there is a token
    GET /api/engines         which there are
    GET /api/stream          an engine's overview, every second, as server-sent events
    GET /api/tree            the tree below a node
    GET /api/lanes           sessions with their turns
    GET /api/session         one session, from near
    GET /api/search          sessions, requests and blocks

`engine` in the query says which, the first one without. An engine is asked only while a stream of
it is open, or when somebody asks, and then once for all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any, TypeVar, get_args
from urllib.parse import parse_qs

import msgspec
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvmem.dashboard.guard import COOKIE, Access, Guard
from kvmem.dashboard.source import Source
from kvmem.dashboard.state import EVERY_S, Sort, State
from kvmem.dashboard.tree import Weight
from kvmem.errors import KVMemError

__all__ = ["Dashboard"]

MOST_STREAMS = 32
MOST_FORM = 4096  # bytes
TEXT_CHARS = 200
TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}

log = logging.getLogger("kvmem.dashboard")
T = TypeVar("T")


class _Refused(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Dashboard:
    """An ASGI app, alone or mounted.

    Args:
        find: the engines that there are now.
        access: who may look.
    """

    def __init__(self, find: Callable[[], list[Source]], access: Access | None = None) -> None:
        self._find = find
        self._access = access if access is not None else Access()
        self._states: dict[str, State] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.n_streams = 0
        routes = [
            Route("/", self._page),
            Route("/login", self._login, methods=["GET", "POST"]),
            Route("/static/{name}", self._static),
            Route("/api/engines", self._engines),
            Route("/api/stream", self._stream),
            Route("/api/tree", self._tree),
            Route("/api/lanes", self._lanes),
            Route("/api/session", self._session),
            Route("/api/search", self._search),
        ]
        files = resources.files("kvmem.dashboard") / "static"
        self._files = {f.name: f.read_bytes() for f in files.iterdir() if f.is_file()}
        handlers: Any = {
            _Refused: _refused,
            KVMemError: _unanswered,
            FileNotFoundError: _unanswered,
        }
        self._app = Guard(Starlette(routes=routes, exception_handlers=handlers), self._access)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        await self._app(scope, receive, send)

    # -- the page --------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        if not request.scope["path"].endswith("/"):  # mounted; its files' addresses are relative
            return RedirectResponse(f"{request.scope['path']}/", 308)
        return self._file("index.html")

    async def _static(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        found = self._files.get(name)
        if found is None:
            raise _Refused(404, "no such file")
        return Response(
            found, media_type=TYPES[name.rpartition(".")[2]], headers={"Cache-Control": "no-cache"}
        )

    async def _login(self, request: Request) -> Response:
        root = request.scope.get("root_path", "")
        if request.method == "GET":
            return self._file("login.html")
        if not 0 < int(request.headers.get("content-length") or 0) <= MOST_FORM:
            raise _Refused(413, "a form of one field is expected")
        form = parse_qs((await request.body()).decode("ascii", "replace"))
        if not self._access.is_token("".join(form.get("token", ()))):
            return Response(
                self._files["login.html"].replace(b"hidden", b"", 1), 401, media_type="text/html"
            )
        answer = RedirectResponse(f"{root}/", 303)
        answer.set_cookie(
            COOKIE, self._access.cookie, path=f"{root}/", httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer

    # -- states ----------------------------------------------------------------------------------

    async def _state(self, request: Request) -> State:
        """The state of the engine that is meant, looked at anew where it is time."""
        wanted = request.query_params.get("engine", "")
        if not wanted or wanted not in self._states:
            found = {one.name: one for one in await run_in_threadpool(self._find)}
            if not found or (wanted and wanted not in found):
                raise _Refused(404, "no such engine is running")
            wanted = wanted or next(iter(found))
            for gone in self._states.keys() - found.keys():
                del self._states[gone], self._locks[gone]
            if wanted not in self._states:
                self._states[wanted] = State(found[wanted])
                self._locks[wanted] = asyncio.Lock()
        state = self._states[wanted]
        await self._with(state, state.look)
        return state

    async def _with(self, state: State, do: Callable[[], T]) -> T:
        """One thread at a time works on a state."""
        lock = self._locks.setdefault(state.source.name, asyncio.Lock())
        async with lock:
            return await run_in_threadpool(do)

    async def _engines(self, request: Request) -> Response:
        return _json([one.name for one in await run_in_threadpool(self._find)])

    async def _stream(self, request: Request) -> Response:
        if self.n_streams >= MOST_STREAMS:
            raise _Refused(503, "too many pages are open")
        state = await self._state(request)
        return EventSourceResponse(self._told(state), ping=15, send_timeout=10)

    async def _told(self, state: State) -> AsyncIterator[dict[str, str]]:
        self.n_streams += 1
        try:
            while True:
                try:
                    told = await self._with(state, lambda: _encoded(state))
                    yield {"event": "overview", "data": told}
                except (KVMemError, FileNotFoundError) as error:
                    yield {"event": "gone", "data": str(error)}
                await asyncio.sleep(EVERY_S)
        finally:
            self.n_streams -= 1

    # -- what is asked for -----------------------------------------------------------------------

    async def _tree(self, request: Request) -> Response:
        state, query = await self._state(request), request.query_params
        name = query.get("node", "")
        weight: Weight = "prompts" if query.get("weight") == "prompts" else "blocks"
        most, levels = _number(query, "most", 400, 2000), _number(query, "levels", 16, 64)

        def told() -> bytes:
            forest = state.forest
            view = forest.view(name, most=most, levels=levels, weight=weight)
            top = forest.above(name) if name and view else []
            return msgspec.json.encode({"version": forest.version, "above": top, "nodes": view})

        return Response(await self._with(state, told), media_type="application/json")

    async def _lanes(self, request: Request) -> Response:
        state, query = await self._state(request), request.query_params
        text, sort = query.get("text", "")[:TEXT_CHARS].lower(), _sort(query.get("sort", "last"))
        first, most = _number(query, "first", 0, 10_000), _number(query, "most", 25, 100)
        span_s = _number(query, "span_s", 300, 86_400)

        def told() -> bytes:
            lanes = state.lanes(text=text, sort=sort, first=first, most=most, span_s=span_s)
            return msgspec.json.encode(lanes)

        return Response(await self._with(state, told), media_type="application/json")

    async def _session(self, request: Request) -> Response:
        state, name = await self._state(request), request.query_params.get("name", "")
        told = await self._with(state, lambda: state.source.session(name))
        return _json(told)

    async def _search(self, request: Request) -> Response:
        state = await self._state(request)
        text = request.query_params.get("text", "").strip()[:TEXT_CHARS].lower()

        def told() -> dict[str, Any]:
            chains = state.forest.find(text) if text else []
            return {"chains": chains, "node": state.forest.node_of(text)}

        return _json(await self._with(state, told))


def _encoded(state: State) -> str:
    state.look()
    return msgspec.json.encode(state.overview()).decode()


def _number(query: Any, name: str, default: int, most: int) -> int:
    try:
        return max(0, min(most, int(query.get(name, default))))
    except ValueError:
        raise _Refused(400, f"{name} is a whole number") from None


def _sort(name: str) -> Sort:
    for known in get_args(Sort):
        if name == known:
            return known
    raise _Refused(400, f"sort is one of {', '.join(get_args(Sort))}")


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, _Refused)
    body = msgspec.json.encode({"error": str(error)})
    return Response(body, error.code, media_type="application/json")


async def _unanswered(_: Request, error: Exception) -> Response:
    log.info("the engine did not answer: %s", error)
    return Response(msgspec.json.encode({"error": str(error)}), 503, media_type="application/json")
