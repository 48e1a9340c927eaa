"""`kvmem node`: the node in a process of its own."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket

from kvmem.node.health import Health
from kvmem.node.server import Node, Settings
from kvmem.store.arena import sweep

__all__ = ["run"]

NOTIFY = "NOTIFY_SOCKET"


def run(settings: Settings, *, health_port: int | None) -> None:
    """Serves until the process is told to end (SIGTERM, SIGINT); what is queued is then written.

    Raises:
        ConfigError: the settings can't be met.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    sweep()
    node = Node(settings)
    health = None
    try:
        health = Health(node, health_port) if health_port is not None else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: node.stop())
        print(f"kvmem node: engines attach with node={settings.path}", flush=True)
        if health is not None:
            print(f"  http://127.0.0.1:{health.port}/health and /ready", flush=True)
        gc.freeze()  # what the start made stays: no later pass looks at it
        notify("READY=1")
        node.run()
        notify("STOPPING=1")
    finally:
        if health is not None:
            health.close()
        node.close()


def notify(state: str) -> None:
    """Tells systemd, where it started this process with Type=notify (sd_notify(3))."""
    address = os.environ.get(NOTIFY)
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall(state.encode())
