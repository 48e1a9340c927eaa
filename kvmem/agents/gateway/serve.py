"""`kvmem gateway`: the gateway in a process of its own."""

from __future__ import annotations

import logging
import socket

from kvmem.agents.gateway.settings import Settings
from kvmem.errors import ConfigError

__all__ = ["run"]

END_WITHIN_S = 10


def run(settings: Settings) -> None:
    """Serves until the process is told to end; streams that run then have ten seconds.

    Raises:
        ConfigError: the settings can't be met, or the libraries are missing.
    """
    settings.check()
    try:
        import uvicorn

        from kvmem.agents.gateway.app import Gateway
    except ImportError as error:
        raise ConfigError(
            f"The gateway needs the package {error.name}",
            next_step="pip install 'kvmem[gateway]'",
            setting="gateway",
        ) from error
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("kvmem.gateway").setLevel(logging.INFO)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--port {settings.port} of {settings.host} can't be listened on: {error.strerror}",
            next_step="Give another --port, or end what listens there.",
            setting="port",
        ) from error
    gateway = Gateway(settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    where = settings.sessions or "memory only; --sessions FOLDER keeps them over a restart"
    config = uvicorn.Config(
        gateway, loop="uvloop", http="httptools", log_level="warning", access_log=False,
        timeout_graceful_shutdown=END_WITHIN_S, server_header=False, ws="none",
    )  # fmt: skip
    print(f"kvmem gateway: http://{host}:{listener.getsockname()[1]}", flush=True)
    print(f"  before {', '.join(settings.upstreams)}; sessions in {where}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
