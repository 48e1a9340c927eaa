"""One vLLM server of the demo: started, waited for, asked for its counters, and ended for sure."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import httpx
import msgspec

from kvmem.errors import KVMemError

__all__ = ["Server", "ServerFailed", "Tokens", "free_port"]

READY_WITHIN_S = 600.0
POLL_S = 0.2
LOOK_S = 0.02
END_WITHIN_S = 30.0
LAST_LINES = 12
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")


class ServerFailed(KVMemError):
    """The server ended, or was not ready in time; the message holds the end of its log."""


class Tokens(msgspec.Struct, frozen=True):
    """Prompt tokens by where their KV came from, as the server itself counts them."""

    computed: int
    device: int
    host: int

    @property
    def total(self) -> int:
        """All prompt tokens."""
        return self.computed + self.device + self.host

    def since(self, earlier: Tokens) -> Tokens:
        """What was added after `earlier`."""
        return Tokens(
            self.computed - earlier.computed, self.device - earlier.device, self.host - earlier.host
        )


class Server:
    """A vLLM OpenAI server in a process group of its own; a context manager that ends the group.

    Args:
        command: what to execute; the port is added.
        log: where the server's output goes.
        environ: variables on top of this process's own.
        tell: is called with a line of progress now and then while the server starts.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environ: dict[str, str],
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.started_in_s = 0.0
        self._command = [*command, "--port", str(self.port)]
        self._environ = {**os.environ, **environ}
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        """Starts the server and returns when it answers.

        Raises:
            ServerFailed: it ended, or did not answer within ten minutes.
        """
        began = time.monotonic()
        try:
            with self.log.open("wb") as log, _signals_held():
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environ,
                    start_new_session=True,  # Ctrl-C reaches the demo, which then ends the server
                )
            self._wait_until_ready(began)
        except BaseException:
            self._end()
            raise
        self.started_in_s = time.monotonic() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the server and every process it started."""
        self._end()

    @property
    def pid(self) -> int:
        """The process group's leader."""
        assert self._process is not None
        return self._process.pid

    def tokens(self) -> Tokens:
        """The server's counters of prompt tokens by source."""
        text = httpx.get(f"{self.url}/metrics", timeout=30.0).raise_for_status().text
        found = counters(text, "vllm:prompt_tokens_by_source_total", "source")
        return Tokens(
            computed=found["local_compute"],
            device=found["local_cache_hit"],
            host=found["external_kv_transfer"],
        )

    def _wait_until_ready(self, began: float) -> None:
        process = self._process
        assert process is not None
        with httpx.Client(timeout=5.0) as client:
            while True:
                if process.poll() is not None:
                    raise self._failed(f"The server ended with code {process.returncode}")
                if time.monotonic() - began > READY_WITHIN_S:
                    raise self._failed(f"The server was not ready after {READY_WITHIN_S:.0f} s")
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    self._tell(self._stage())  # it does not listen yet
                try:
                    process.wait(POLL_S)  # returns at once should the process end
                except subprocess.TimeoutExpired:
                    continue

    def _stage(self) -> str:
        """The last thing the log says, without vLLM's prefix."""
        lines = self.log.read_text(errors="replace").splitlines()
        for line in reversed(lines):
            found = re.search(r"INFO \S+ \S+ \[\S+\] (.+)$", line)
            if found and re.search(r"\w", found.group(1)):
                return found.group(1).strip()
        return "starting Python"

    def _failed(self, what: str) -> ServerFailed:
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        quoted = "\n".join(f"    {line}" for line in lines)
        return ServerFailed(
            f"{what}. Its last lines:\n{quoted}\n",
            next_step=f"The whole log: {self.log}",
            log=self.log,
        )

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._tell("the server does not end by itself; it is killed")
            process.kill()
            process.wait()
        # Its children clean up (shared memory) after it, and are killed where they do not.
        if not _wait_until_empty(process.pid):
            _signal_group(process.pid, signal.SIGKILL)
            _wait_until_empty(process.pid)
        self._process = None


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that end the demo wait until the block is over.

    One between the start of a process and the moment that we know its number would orphan it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def counters(text: str, name: str, label: str) -> dict[str, int]:
    """The samples of the counter `name` in Prometheus text, summed by the value of `label`."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None or match["name"] != name:
            continue
        labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match["labels"] or ""))
        key = labels.get(label, "")
        found[key] = found.get(key, 0) + int(float(match["value"]))
    return found


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # all of them have ended


def _wait_until_empty(group: int) -> bool:
    """Whether every process of the group has ended, at the latest after `END_WITHIN_S`.

    They are nobody's children any more, and the kernel tells nobody when such a group is empty:
    hence it is looked at, again and again.
    """
    deadline = time.monotonic() + END_WITHIN_S
    while _any_alive(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def _any_alive(group: int) -> bool:
    """Whether a process of the group runs; one that only waits to be reaped does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if int(pgrp) == group and state not in "ZX":
            return True
    return False
