"""Children that a benchmark starts, each in a process group of its own that it also ends.

    with Child(["python", "-m", "some.server"], log=path) as child:
        child.until(ready, seconds=120, what="the server")
        child.settle()

Whatever ends the benchmark (an exception, Ctrl-C, SIGTERM), the group gets SIGTERM, a grace in
which the engine unlinks its shared memory, then SIGKILL. A benchmark killed outright takes its
children along through PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, NoReturn, Self

from kvmem.store.arena import sweep

__all__ = ["Child", "ChildError", "exit_on_sigterm", "free_port", "leftovers", "shared_memory"]

_GRACE_S = 20.0
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
# PR_SET_PDEATHSIG is 1. The launcher execs, so the child's pid and command line are the server's.
_LAUNCH = (
    "import ctypes, os, sys;"
    "ctypes.CDLL(None).prctl(1, 15, 0, 0, 0) if sys.platform == 'linux' else None;"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class ChildError(RuntimeError):
    """A child ended, or was not ready in time; the message holds the end of its log."""


class Child:
    """One child process with its descendants; a context manager that ends all of them."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pipes: bool = False,
    ) -> None:
        """Starts `command`; its messages go to `log`.

        Args:
            command: program and arguments.
            log: a file for stderr, and for stdout unless `pipes`.
            env: added to this process's environment.
            cwd: where it runs.
            pipes: stdin and stdout are pipes to this process (`stdin`, `stdout`).
        """
        self.log = log
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAUNCH, *command],
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else sink,
                stderr=sink,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def group(self) -> int:
        """The process group, which is the child's own."""
        return self._process.pid

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Ends the whole group: SIGTERM, a grace, SIGKILL. Returns when none of it is left."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        deadline = time.monotonic() + _GRACE_S
        self._signal(signal.SIGTERM)
        while self._members() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def check(self) -> None:
        """Raises ChildError where the child has ended."""
        if self._process.poll() is not None:
            self.fail()

    def fail(self) -> NoReturn:
        """Raises ChildError with the end of the log, after the child closed its end or ended."""
        try:
            code: int | str = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            code = "no exit status: it hangs"
        raise ChildError(f"the child ended with {code}; its log ends:\n{self.tail()}")

    def until(self, ready: Callable[[], bool], *, seconds: float, what: str) -> None:
        """Polls `ready` until it says so.

        Raises:
            ChildError: the child ended first, or `seconds` passed.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ChildError(
                    f"{what} was not ready in {seconds:.0f} s; its log ends:\n{self.tail()}"
                )
            time.sleep(0.1)

    def cpu_s(self) -> float:
        """CPU seconds of the group's living processes, in ticks of 10 ms."""
        total = 0
        for pid in self._members():
            with contextlib.suppress(OSError):
                fields = _stat(pid)
                total += int(fields[11]) + int(fields[12])
        return total * _TICK_S

    def settle(self, *, seconds: float = 5.0) -> bool:
        """Waits until the group hardly uses CPU, so that what it put off is done: at most one
        tick in each of two windows of 50 ms. False where `seconds` passed first.
        """
        deadline = time.monotonic() + seconds
        quiet, before = 0, self.cpu_s()
        while quiet < 2:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
            now = self.cpu_s()
            quiet = quiet + 1 if now - before <= 1.5 * _TICK_S else 0
            before = now
        return True

    def tail(self, lines: int = 25) -> str:
        """The last lines of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _members(self) -> list[int]:
        self._process.poll()  # reaps the child, which else stays a zombie
        return [pid for pid in _pids() if _group_of(pid) == self.group]

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, number)


def exit_on_sigterm() -> None:
    """Makes SIGTERM unwind the main thread, so that every `Child` is ended."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(f"ended by {signal.Signals(number).name}")

    assert threading.current_thread() is threading.main_thread()
    signal.signal(signal.SIGTERM, leave)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shared_memory() -> set[str]:
    """The names in /dev/shm now; empty where there is no such folder."""
    folder = Path("/dev/shm")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def leftovers(before: set[str], marks: Sequence[str] = ("kvmem", "lmcache", "vllm")) -> list[str]:
    """Names that came into /dev/shm since `before`, of kvmem and its competitors, behind which
    nobody lives: another engine on this machine keeps its own.
    """
    sweep()  # an engine that vLLM killed leaves a link of no bytes, which the next start removes
    new = [n for n in shared_memory() - before if any(mark in n.lower() for mark in marks)]
    mapped = "".join(_maps(pid) for pid in _pids()) if new else ""
    return sorted(
        name
        for name in new
        if f"/dev/shm/{name}" not in mapped and not _leads_somewhere(Path("/dev/shm") / name)
    )


def _leads_somewhere(path: Path) -> bool:
    return path.is_symlink() and path.exists()


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name; [0] is the state, [2] the group."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return text[text.rindex(")") + 2 :].split()


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it ended, or is another user's
        return ""


def _group_of(pid: int) -> int | None:
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[2])
