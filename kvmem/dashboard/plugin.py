"""The page on vLLM's own server, at /kvmem/: what `kvmem serve` has vLLM load.

A `vllm.endpoint_plugins` entry point (vllm/plugins/endpoint_plugins/interface.py). vLLM's
--api-key guards what lies below /v1 only, so the page asks for the first of them itself. Without a
key the server is on this machine alone, as `kvmem serve` sees to.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from kvmem.dashboard.app import Dashboard
from kvmem.dashboard.guard import Access
from kvmem.dashboard.source import Source, engines

__all__ = ["MOUNT", "DashboardEndpoint"]

MOUNT = "/kvmem"


class DashboardEndpoint:
    """What vLLM makes of the entry point."""

    name = "kvmem_dashboard"
    required_tasks: tuple[Any, ...] | None = None

    def __init__(self) -> None:
        self._dashboard: Dashboard | None = None
        self._prefix = ""

    def attach_router(self, app: Starlette) -> None:
        """Adds the page."""
        app.mount(MOUNT, self._serve)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Notes whose engines are behind this server, and its key."""
        keys = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY") or ""
        key = keys if isinstance(keys, str) else next((k for k in keys if k), "")
        config = engine_client.vllm_config if engine_client is not None else None
        transfer = config.kv_transfer_config if config is not None else None

        def find() -> list[Source]:
            from kvmem.engines.vllm.arenas import arenas_of

            mine = {path.name for path in arenas_of(transfer)}
            return [one for one in engines() if one.name in mine]

        # A key names who may come; without one vLLM is on loopback, or behind what guards it.
        self._dashboard = Dashboard(find, Access(key, ("*",) if key else ()))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._dashboard is not None:
            await self._dashboard(scope, receive, send)
