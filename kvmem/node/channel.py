"""A client's connection to a node: greeted, with a deadline for each answer."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import msgspec

from kvmem.errors import ConfigError, NotAnswered
from kvmem.node import wire

__all__ = ["Channel"]


class Channel:
    """One connection to a node, greeted; one thread uses it.

    Args:
        folder: the node's.
        hello: who attaches.
        deadline_s: for each answer; `patience_s` for the first.

    Raises:
        NotAnswered: there is no node, or it does not answer.
        ConfigError: it refuses, and says why.
    """

    def __init__(
        self, folder: Path, hello: wire.Hello, *, deadline_s: float, patience_s: float, fds: int = 0
    ) -> None:
        self.fds: list[int] = []
        self._deadline_s = deadline_s
        self._buffer = bytearray()  # of the greeting
        self._out = bytearray()
        self._looking = wire.Looking()
        self._view = memoryview(bytearray(wire.RECV_BYTES))
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.settimeout(patience_s)
            _connect(self._sock, folder)
            self._sock.sendall(wire.frame(hello))
            self.welcome = self._greeted(patience_s, fds)
        except OSError as error:
            self.close()
            raise NotAnswered(
                f"The node at {folder} does not answer: {error.strerror or error}",
                next_step="Start it: kvmem node --path ...",
            ) from error
        except BaseException:
            self.close()
            raise
        self._wait(deadline_s)

    def _greeted(self, patience_s: float, fds: int) -> wire.Welcome:
        until = time.monotonic() + patience_s
        while (body := wire.split(self._buffer, wire.MAX_HELLO)) is None:
            self._sock.settimeout(max(0.001, until - time.monotonic()))
            text, ancillary, *_ = self._sock.recvmsg(
                wire.MAX_HELLO, socket.CMSG_LEN(fds * array.array("i").itemsize) if fds else 0,
                socket.MSG_CMSG_CLOEXEC,
            )  # fmt: skip
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self.fds += array.array("i", data[: len(data) - len(data) % 4]).tolist()
            if not text:
                raise ConnectionResetError("the connection was closed")
            self._buffer += text
        try:
            welcome = wire.WELCOMES.decode(body)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"What answers there is no kvmem node: {error}",
                next_step="Give the folder that `kvmem node --path` was given.",
                setting="node",
            ) from error
        if welcome.magic != wire.MAGIC or welcome.refused or welcome.version != wire.VERSION:
            why = welcome.refused or f"it speaks {welcome.magic} {welcome.version}"
            raise ConfigError(
                f"The kvmem node refuses: {why}",
                next_step="Give both sides the same kvmem, then start again.",
                setting="node",
            )
        return welcome

    def _wait(self, seconds: float) -> None:
        """The kernel's own clock on each call: cheaper than a poll before it."""
        whole = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self._sock.settimeout(None)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, whole)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, whole)

    def post(self, message: Any) -> None:
        """Sends what has no answer.

        Raises:
            OSError: it could not be sent in time.
        """
        self._send(message)

    def _send(self, message: Any) -> None:
        """As `frame`, without a copy of its bytes."""
        wire.ENCODER.encode_into(message, self._out, wire.LENGTH.size)
        wire.LENGTH.pack_into(self._out, 0, len(self._out) - wire.LENGTH.size)
        self._sock.sendall(self._out)

    def ask(self, message: Any, *, patience_s: float = 0.0) -> Any:
        """Sends a question and returns its answer.

        Raises:
            OSError: there is none in time; the connection is then of no use any more.
        """
        if patience_s:
            self._wait(self._deadline_s + patience_s)
        self._send(message)
        body = self._body(self._deadline_s + patience_s, spin=not patience_s)
        if patience_s:
            self._wait(self._deadline_s)
        try:
            return wire.REPLIES.decode(body)
        except msgspec.MsgspecError as error:
            raise OSError(f"no answer of this kind is known: {error}") from error

    def _body(self, within_s: float, *, spin: bool) -> memoryview:
        """The answer's bytes, until the next question."""
        begun = time.monotonic()
        view, n, end = self._view, 0, wire.LENGTH.size
        spin = spin and self._looking.begin(begun)
        while n < end:
            try:
                # The scheduler has nothing else to do, and to be woken takes longer than most
                # answers do.
                flags = socket.MSG_DONTWAIT if spin else 0
                got = self._sock.recv_into(view[n:], 0, flags)
            except BlockingIOError:
                now = time.monotonic()
                if spin:
                    spin = self._looking.go_on(now, begun)
                    continue
                if now - begun < within_s:
                    continue
                raise TimeoutError(f"no answer in {within_s:.2f} s") from None
            if not got:
                raise ConnectionResetError("the connection was closed")
            n += got
            if end == wire.LENGTH.size and n >= end:
                (length,) = wire.LENGTH.unpack_from(view)
                if length > wire.MAX_FRAME:
                    raise OSError(
                        f"a frame of {length:,} bytes, at most {wire.MAX_FRAME:,} are taken"
                    )
                end += length
                if end > len(view):
                    larger = bytearray(end)
                    larger[:n] = view[:n]
                    view = self._view = memoryview(larger)
            if n < end and time.monotonic() - begun > within_s:
                raise TimeoutError("half an answer")
        if n > end:
            raise OSError("more than was asked for")
        return view[wire.LENGTH.size : end]

    def hung_up(self) -> None:
        """Returns when the other side has ended the connection."""
        self._wait(0.0)  # for ever
        while self._sock.recv(4096):
            pass

    def shut(self) -> None:
        """Ends the connection for whoever waits on it; `close` is to follow."""
        with contextlib.suppress(OSError):  # the other side was quicker
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection."""
        self._sock.close()


def _connect(sock: socket.socket, folder: Path) -> None:
    """A socket's address has room for 107 bytes: a longer path is gone to through the folder."""
    path = folder / wire.SOCKET
    if len(os.fsencode(path)) < 100:
        sock.connect(str(path))
        return
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{fd}/{wire.SOCKET}")
    finally:
        os.close(fd)
