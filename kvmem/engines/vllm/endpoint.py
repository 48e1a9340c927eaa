"""kvmem's routes on vLLM's own server; beside them those of `hints_endpoint`.

    GET  /v1/kvmem/switch                        {"loads": true, "stores": true}
    POST /v1/kvmem/switch {"loads": false}       the same, as it then stands; the rest stays
    POST /v1/kvmem/quote {"messages": [...]}     what that prompt would find, and what it would cost
    GET  /v1/kvmem/metrics                       kvmem's metrics as they are now, for Prometheus

A `vllm.endpoint_plugins` entry point: vLLM adds the routes where VLLM_PLUGINS names it, as
`kvmem serve` does. The path lies below /v1, which vLLM's --api-key guards. Beside those that serve
HTTP themselves only these two modules import a web framework: the server is vLLM's.
A quote's messages are rendered by the server's own /tokenize, so they become the ids that a chat
completion would.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response

from kvmem.engines.vllm import hints_endpoint
from kvmem.engines.vllm.arenas import arenas_of
from kvmem.engines.vllm.hints_endpoint import error as _error
from kvmem.engines.vllm.plugin import ENDPOINT_NAME
from kvmem.errors import KVMemError
from kvmem.store import Switch, read_switch, set_switch
from kvmem.store.live import quote, snapshots
from kvmem.telemetry.prometheus import CONTENT_TYPE, exposition

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask

__all__ = ["METRICS_PATH", "PATH", "QUOTE_PATH", "SwitchEndpoint"]

PATH = "/v1/kvmem/switch"
MOST_QUOTES = 4  # at once
MOST_BODY = 32 << 20  # bytes of a question
QUOTE_PATH = "/v1/kvmem/quote"
METRICS_PATH = "/v1/kvmem/metrics"
# Of a chat completion's or a completion's body: what the rendering of its prompt depends on.
RENDERED = (
    "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
    "continue_final_message", "messages", "model", "prompt", "tools",
)  # fmt: skip
_FIELD = re.compile(r"`\$\.(\w+)`|unknown field `(\w+)`")


class SwitchEndpoint:
    """What vLLM makes of the entry point (vllm/plugins/endpoint_plugins/interface.py)."""

    name = ENDPOINT_NAME
    required_tasks: tuple[SupportedTask, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; vLLM's middleware goes around them afterwards."""
        app.add_api_route(PATH, _get, methods=["GET"], response_model=None)
        app.add_api_route(PATH, _post, methods=["POST"], response_model=None)
        app.add_api_route(QUOTE_PATH, _quote, methods=["POST"], response_model=None)
        app.add_api_route(METRICS_PATH, _metrics, methods=["GET"], response_model=None)
        hints_endpoint.attach(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Notes which engine is behind this server; a server that only renders has none."""
        config = engine_client.vllm_config if engine_client is not None else None
        state.kvmem_transfer = config.kv_transfer_config if config is not None else None
        names = getattr(args, "served_model_name", None) or [getattr(args, "model", None)]
        state.kvmem_models = frozenset(names)
        state.kvmem_core = getattr(engine_client, "engine_core", None)


class _Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    loads: bool | msgspec.UnsetType = msgspec.UNSET
    stores: bool | msgspec.UnsetType = msgspec.UNSET


async def _get(request: Request) -> JSONResponse:
    return await run_in_threadpool(_answer, request.app.state.kvmem_transfer, _Wanted())


async def _post(request: Request) -> JSONResponse:
    # A browser sends this type to another site only after asking that site, so no page that the
    # operator merely looks at can switch.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return _error(415, "Send the header Content-Type: application/json", "content-type")
    try:
        wanted = msgspec.json.decode(await request.body(), type=_Wanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        field = _FIELD.search(str(error))
        return _error(400, f"{error}", field and (field[1] or field[2]))
    if wanted == _Wanted():
        return _error(400, "Give `loads`, `stores` or both, true or false", "loads")
    return await run_in_threadpool(_answer, request.app.state.kvmem_transfer, wanted)


def _answer(transfer: KVTransferConfig | None, wanted: _Wanted) -> JSONResponse:
    """Switches what is given and tells what stands; of several engines, what all of them may."""
    loads = None if wanted.loads is msgspec.UNSET else wanted.loads
    stores = None if wanted.stores is msgspec.UNSET else wanted.stores
    try:
        paths = arenas_of(transfer)
        if not paths:
            return _error(503, "No engine with kvmem is running behind this server")
        if loads is None and stores is None:
            now = [read_switch(path) for path in paths]
        else:
            now = [set_switch(path, loads=loads, stores=stores) for path in paths]
    except (KVMemError, FileNotFoundError) as error:  # damaged, or it ended meanwhile
        return _error(503, str(error))
    switch = Switch(loads=all(one.loads for one in now), stores=all(one.stores for one in now))
    return JSONResponse(msgspec.to_builtins(switch))


# -- a quote -------------------------------------------------------------------------------------


class _NotQuotedError(Exception):
    """`answer` says why."""

    def __init__(self, answer: Response) -> None:
        super().__init__()
        self.answer = answer


async def _quote(request: Request) -> Response:
    state = request.app.state
    under_way = getattr(state, "kvmem_quotes", 0)
    if under_way >= MOST_QUOTES:  # each takes one of the server's threads
        return _error(429, f"{under_way} quotes are being made; ask again")
    state.kvmem_quotes = under_way + 1
    try:
        return await _quoted(request)
    finally:
        state.kvmem_quotes -= 1


async def _quoted(request: Request) -> Response:
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > MOST_BODY:
            return _error(413, f"A body has at most {MOST_BODY:,} bytes")
    try:
        body = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _error(400, f"{error}")
    model, models = body.get("model"), request.app.state.kvmem_models
    if model is not None and model not in models:
        return _error(404, f"No quotes for {model!r}: adapters are not quoted", "model")
    try:
        tokens = await _tokens_of(request, body)
    except _NotQuotedError as no:
        return no.answer
    named = {"session_id": request.headers.get("x-session-id"), "cache_salt": None}
    session, salt = ("" if (v := body.get(n, named[n])) is None else v for n in named)
    for name, value in zip(named, (session, salt), strict=True):
        if not isinstance(value, str):
            return _error(400, "It must be a string", name)

    def answer() -> JSONResponse:
        try:
            paths = arenas_of(request.app.state.kvmem_transfer)
            if not paths:
                return _error(503, "No engine with kvmem is running behind this server")
            told = quote(paths[0], tokens, session=session, salt=salt)
        except ValueError as error:
            return _error(400, str(error))
        except (KVMemError, FileNotFoundError) as error:  # it ended meanwhile, or is at work
            return _error(503, str(error))
        return JSONResponse(msgspec.to_builtins(told))

    return await run_in_threadpool(answer)


async def _tokens_of(request: Request, body: dict[str, Any]) -> list[int]:
    """The ids that the engine would be sent for this body."""
    params: Any = body.get("kv_transfer_params") or {}
    if not isinstance(params, dict):
        raise _NotQuotedError(_error(400, "It must be an object", "kv_transfer_params"))
    given = params.get("prompt_token_ids", body.get("prompt"))
    if isinstance(given, list):
        try:
            return msgspec.convert(given, list[int])
        except msgspec.ValidationError as error:
            raise _NotQuotedError(_error(400, f"{error}", "prompt")) from error
    if not isinstance(given, str) and not isinstance(body.get("messages"), list):
        raise _NotQuotedError(
            _error(400, "Give `messages`, or `prompt` as text or token ids", "messages")
        )
    headers = {"authorization": request.headers.get("authorization", "")}
    inside = httpx.ASGITransport(app=request.app)
    async with httpx.AsyncClient(transport=inside, base_url="http://server") as client:
        wanted = {name: body[name] for name in RENDERED if name in body}
        told = await client.post("/tokenize", json=wanted, headers=headers, timeout=None)
    if told.status_code != 200:
        raise _NotQuotedError(
            Response(told.content, told.status_code, media_type="application/json")
        )
    return msgspec.convert(told.json()["tokens"], list[int])


# -- metrics -------------------------------------------------------------------------------------


async def _metrics(request: Request) -> Response:
    def answer() -> Response:
        try:
            paths: list[Path] = arenas_of(request.app.state.kvmem_transfer)
        except KVMemError as error:
            return _error(503, str(error))
        found = [one for path in paths for one in snapshots(arena=path.name, sessions=0)]
        if len(found) < len(paths):  # no figures would read as no traffic
            return _error(503, "An engine behind this server did not answer; ask again")
        return Response(exposition(found), media_type=CONTENT_TYPE)

    return await run_in_threadpool(answer)
