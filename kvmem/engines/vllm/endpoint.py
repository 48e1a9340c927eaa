"""`/v1/kvmem/switch` on vLLM's own server: kvmem's loads and stores, off and on. Beside it the
routes of `hints_endpoint`.

    GET                              {"loads": true, "stores": true}
    POST {"loads": false}            the same, as it stands then; what is not named stays

A `vllm.endpoint_plugins` entry point: vLLM adds the routes where VLLM_PLUGINS names it, as
`kvmem serve` does. The path lies below /v1, which vLLM's --api-key guards. Beside those that serve
HTTP themselves only these two modules import a web framework: the server is vLLM's.
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.responses import JSONResponse

from kvmem.engines.vllm import hints_endpoint
from kvmem.engines.vllm.arenas import arenas_of
from kvmem.engines.vllm.hints_endpoint import error as _error
from kvmem.engines.vllm.plugin import ENDPOINT_NAME
from kvmem.errors import KVMemError
from kvmem.store import Switch, read_switch, set_switch

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask

__all__ = ["PATH", "SwitchEndpoint"]

PATH = "/v1/kvmem/switch"
_FIELD = re.compile(r"`\$\.(\w+)`|unknown field `(\w+)`")


class SwitchEndpoint:
    """What vLLM makes of the entry point (vllm/plugins/endpoint_plugins/interface.py)."""

    name = ENDPOINT_NAME
    required_tasks: tuple[SupportedTask, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; vLLM's middleware goes around them afterwards."""
        app.add_api_route(PATH, _get, methods=["GET"], response_model=None)
        app.add_api_route(PATH, _post, methods=["POST"], response_model=None)
        hints_endpoint.attach(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Notes which engine is behind this server; a server that only renders has none."""
        config = engine_client.vllm_config if engine_client is not None else None
        state.kvmem_transfer = config.kv_transfer_config if config is not None else None
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
