"""Hints that concern no request, on vLLM's own server beside the switch.

    POST /v1/kvmem/hints      {"version": 1, "actions": [...], "cache_salt": ""}
                              {"receipts": [{"do": "tool_started", "status": "accepted", ...}]}
    GET  /v1/kvmem/receipts   the last receipts of sessions under ?cache_salt=, oldest first

Both ask the engine, on its scheduler's thread. vLLM's --api-key guards them as it does all below
/v1: who has the key may speak for the sessions under each salt that he can name.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from kvmem.engines.vllm.hinting import METHOD

__all__ = ["HINTS_PATH", "RECEIPTS_PATH", "attach", "error"]

HINTS_PATH, RECEIPTS_PATH = "/v1/kvmem/hints", "/v1/kvmem/receipts"
MOST_BYTES = 64 << 10
MOST_AT_ONCE = 64  # beyond that the client is to come again: the engine has steps to make
WITHIN_S = 30.0


def attach(app: FastAPI) -> None:
    """Adds the routes."""
    app.add_api_route(HINTS_PATH, _post, methods=["POST"], response_model=None)
    app.add_api_route(RECEIPTS_PATH, _get, methods=["GET"], response_model=None)


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    actions: list[Any]
    cache_salt: str = ""


async def _post(request: Request) -> Response:
    # As at the switch: no page that somebody merely looks at can send this type.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return error(415, "Send the header Content-Type: application/json", "content-type")
    text = bytearray()
    async for piece in request.stream():
        text += piece
        if len(text) > MOST_BYTES:
            return error(413, f"An envelope of more than {MOST_BYTES:,} bytes")
    try:
        body = msgspec.json.decode(text, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        return error(400, f"{wrong}")
    envelope = {"version": body.version, "actions": body.actions}
    return await _ask(request, {"envelope": envelope, "cache_salt": body.cache_salt})


async def _get(request: Request) -> Response:
    return await _ask(request, {"cache_salt": request.query_params.get("cache_salt", "")})


async def _ask(request: Request, asked: dict[str, Any]) -> Response:
    state = request.app.state
    core = getattr(state, "kvmem_core", None)
    if core is None or not hasattr(core, "call_utility_async"):
        return error(503, "No engine that takes hints is running behind this server")
    under_way = getattr(state, "kvmem_asked", 0)
    if under_way >= MOST_AT_ONCE:
        return error(429, f"{under_way} envelopes are on their way to the engine")
    state.kvmem_asked = under_way + 1
    try:
        text = msgspec.json.encode(asked).decode()
        told = await asyncio.wait_for(core.call_utility_async(METHOD, text), WITHIN_S)
    except Exception as failed:  # noqa: BLE001 the engine's own error, of whatever kind: told
        return error(503, f"The engine did not take it: {type(failed).__name__}: {failed}")
    finally:
        state.kvmem_asked -= 1
    if told == "{}":
        return error(503, "No engine with kvmem is running behind this server")
    return Response(told, media_type="application/json")


def error(code: int, message: str, param: str | None = None) -> JSONResponse:
    """In the shape of vLLM's own errors."""
    kind = {429: "RateLimitError"}.get(
        code, "BadRequestError" if code < 500 else "ServiceUnavailableError"
    )
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}, code
    )
