"""`kvmem dashboard`: the page in a process of its own."""

from __future__ import annotations

import logging
import socket

from kvmem.errors import ConfigError

__all__ = ["run"]


def run(*, arena: str | None, host: str, port: int, token: str, hosts: tuple[str, ...]) -> None:
    """Serves until the process is told to end.

    Raises:
        ConfigError: the settings can't be met, or the libraries are missing.
    """
    try:
        import uvicorn

        from kvmem.dashboard.app import Dashboard
        from kvmem.dashboard.guard import Access
        from kvmem.dashboard.source import engines
    except ImportError as error:
        raise ConfigError(
            f"The dashboard needs the package {error.name}",
            next_step="pip install 'kvmem[dashboard]'",
            setting="dashboard",
        ) from error
    access = Access.of(host, token, hosts)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--port {port} of {host} can't be listened on: {error.strerror}",
            next_step="Give another --port, or end what listens there.",
            setting="port",
        ) from error
    config = uvicorn.Config(
        Dashboard(lambda: engines(arena), access), log_level="warning", access_log=False,
        timeout_graceful_shutdown=1, server_header=False, ws="none", lifespan="off",
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    print(f"kvmem dashboard: http://{shown}:{listener.getsockname()[1]}/", flush=True)
    if not token:
        print("  every user of this machine can look; --token keeps them out", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
