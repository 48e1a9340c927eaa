"""Real Redis servers for tests and benchmarks: on a Unix socket or loopback, private, ended by
their user."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

__all__ = ["RedisServer", "binary", "cluster"]

START_S = 20.0


def binary() -> str | None:
    """The server's program: Valkey's where there is one, else Redis's."""
    return shutil.which("valkey-server") or shutil.which("redis-server")


class RedisServer:
    """One server, of an empty memory and no file; `close` ends it."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.port = port
        self.url = f"redis://127.0.0.1:{port}" if port else f"unix://{self.socket}"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        program = binary()
        assert program is not None
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
                    "--unixsocket", str(self.socket), "--unixsocketperm", "700",
                    "--dir", str(self.folder), "--appendonly", "no", *self._options,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        options = dict(zip(self._options[::2], self._options[1::2], strict=True))
        until_it_listens = Retry(ConstantBackoff(0.01), int(START_S / 0.01))
        password = options.get("--requirepass")
        with contextlib.closing(self.client(until_it_listens, password=password)) as client:
            client.ping()

    def client(self, retry: Retry | None = None, **options: Any) -> redis.Redis:
        return redis.Redis(
            unix_socket_path=str(self.socket), retry=retry,
            retry_on_error=[redis.ConnectionError, redis.BusyLoadingError] if retry else None,
            **options,
        )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        self.kill()


def free_ports(n: int) -> list[int]:
    """Loopback ports that nobody has now, low enough for a cluster's second port above each."""
    held = [socket.socket() for _ in range(n)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


@contextlib.contextmanager
def cluster(folder: Path, n: int = 3) -> Iterator[list[RedisServer]]:
    """n nodes that share the slots and know one another."""
    ports = free_ports(2 * n)
    nodes: list[RedisServer] = []
    try:
        for i in range(n):
            own = folder / f"node{i}"
            own.mkdir()
            nodes.append(
                RedisServer(
                    own, "--cluster-enabled", "yes", "--cluster-port", str(ports[n + i]),
                    "--cluster-node-timeout", "2000", port=ports[i],
                )
            )  # fmt: skip
        for i, node in enumerate(nodes):
            with contextlib.closing(node.client()) as client:
                first, last = 16384 * i // n, 16384 * (i + 1) // n - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                for other in range(n):
                    if other != i:
                        client.execute_command(
                            "CLUSTER", "MEET", "127.0.0.1", ports[other], ports[n + other]
                        )
        for node in nodes:
            _until_it_is_whole(node, n)
        yield nodes
    finally:
        for node in nodes:
            node.close()


def _until_it_is_whole(node: RedisServer, n: int) -> None:
    with contextlib.closing(node.client()) as client:
        for _ in range(400):
            info = client.execute_command("CLUSTER", "INFO")
            text = info.decode() if isinstance(info, bytes) else str(info)
            if ("cluster_state:ok" in text or "'cluster_state': 'ok'" in text) and (
                f"cluster_known_nodes:{n}" in text or f"'cluster_known_nodes': '{n}'" in text
            ):
                return
            _moment()
    raise AssertionError("the cluster does not come up")


def _moment() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            one.recv(1)
