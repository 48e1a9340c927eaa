"""A node's /health and /ready, on loopback, for whoever starts and watches processes.

They say whether the node answers, and nothing of what it keeps: who may ask that is this user, over
the socket.
"""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kvmem.errors import ConfigError
from kvmem.node.server import Node

__all__ = ["Health"]

LOOPBACK = "127.0.0.1"
HEADER_S = 5.0


class Health:
    """Serves in threads of its own until `close`.

    Args:
        node: whose.
        port: where; 0 takes a free one, which `port` then is.

    Raises:
        ConfigError: the port can't be listened on.
    """

    def __init__(self, node: Node, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = HEADER_S
            server_version, sys_version = "kvmem", ""

            def do_GET(self) -> None:
                found = answer(node, self.path)
                status, told = found if found is not None else (HTTPStatus.NOT_FOUND, {})
                body = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 the base class's name
                """A look every second is no news."""

        try:
            self._server = ThreadingHTTPServer((LOOPBACK, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"--health-port {port} of {LOOPBACK} can't be listened on: {error.strerror}",
                next_step="Give another --health-port, or end what listens there.",
                setting="health_port",
            ) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="kvmem-health")
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answer(node: Node, path: str) -> tuple[HTTPStatus, dict[str, Any]] | None:
    """What is answered to a path; None where there is no such.

    /health fails where the loop stands still: start the node again. /ready fails too while it
    ends; a disk that is off does not make a node unready, since it serves from memory.
    """
    plain = path.partition("?")[0]
    if plain not in ("/health", "/ready"):
        return None
    good = node.is_alive and (plain == "/health" or not node.is_stopping)
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    return status, {"ok": good, "engines": node.n_engines, "failures": node.failures}
