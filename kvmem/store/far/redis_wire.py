"""Values over a connection that redis-py made, without its parser, which copies each three times.

redis-py resolves, connects, speaks TLS and logs in. From then on its socket is used here: values
are sent from where they lie and received where they are wanted. RESP, version 2, as the server's
own documentation has it ("Redis serialization protocol specification").
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any

from kvmem.store.far.base import Bytes

__all__ = ["Refusal", "Wire"]

BUFFER_BYTES = 1 << 16
LINE_BYTES = 4096
IOVECS = 512  # of one call; Linux takes 1,024
Part = bytes | Bytes


class Refusal(Exception):
    """The server's answer is an error; the connection goes on."""


class Wire:
    """Commands and answers on one connected socket. One thread."""

    def __init__(self, connection: Any) -> None:
        self._socket = connection._sock
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._at = self._end = 0

    # -- sending -----------------------------------------------------------------------------

    def send(self, commands: Sequence[Sequence[bytes | Sequence[Part]]]) -> None:
        """Commands at once; an argument may be of several parts, which stay where they are."""
        pieces: list[bytes | memoryview] = []
        small: list[bytes] = []
        for command in commands:
            small.append(b"*%d\r\n" % len(command))
            for argument in command:
                parts = [argument] if isinstance(argument, bytes) else argument
                small.append(b"$%d\r\n" % sum(len(part) for part in parts))
                for part in parts:
                    if isinstance(part, bytes):
                        small.append(part)
                    else:
                        pieces += (b"".join(small), part.data)
                        small.clear()
                small.append(b"\r\n")
        pieces.append(b"".join(small))
        if isinstance(self._socket, ssl.SSLSocket):
            for piece in pieces:
                self._socket.sendall(piece)
        else:
            self._send(pieces)

    def _send(self, pieces: list[bytes | memoryview]) -> None:
        at = 0  # of the pieces; what is left of that one is in its place
        while at < len(pieces):
            sent = self._socket.sendmsg(pieces[at : at + IOVECS])
            while at < len(pieces) and sent >= len(pieces[at]):
                sent -= len(pieces[at])
                at += 1
            if sent:
                pieces[at] = memoryview(pieces[at])[sent:]

    # -- receiving ---------------------------------------------------------------------------

    def integer(self) -> int:
        """An integer's answer.

        Raises:
            Refusal: the server's answer is an error.
            OSError: it is none of the protocol's.
        """
        kind, text = self._answer()
        if kind != b":":
            raise OSError("the server answers out of turn")
        return int(text)

    def done(self) -> bool:
        """Whether it was done: OK, or nothing."""
        kind, text = self._answer()
        if kind == b"$" and int(text) == -1:
            return False
        if kind != b"+":
            raise OSError("the server answers out of turn")
        return True

    def into(self, room: Bytes) -> int:
        """A string's answer: how long it is, -1 for none; as much of it as there is room for."""
        kind, text = self._answer()
        if kind != b"$":
            raise OSError("the server answers out of turn")
        size = int(text)
        if size >= 0:
            kept = min(size, len(room))
            self._read(room.data[:kept])
            left = size - kept + 2
            while left:  # what is too long, and the line's end
                n = min(left, BUFFER_BYTES)
                self._read(memoryview(bytearray(n)))
                left -= n
        return size

    def _answer(self) -> tuple[bytes, bytes]:
        line = self._line()
        if line[:1] == b"-":
            raise Refusal(line[1:].decode("utf-8", "replace"))
        return line[:1], line[1:]

    def _line(self) -> bytes:
        while True:
            found = self._buffer.find(b"\r\n", self._at, self._end)
            if found >= 0:
                line = bytes(self._view[self._at : found])
                self._at = found + 2
                return line
            if self._end - self._at > LINE_BYTES:
                raise OSError("the server answers out of turn")
            self._fill()

    def _fill(self) -> None:
        left = self._end - self._at
        self._buffer[:left] = self._buffer[self._at : self._end]
        self._at, self._end = 0, left
        n = self._socket.recv_into(self._view[left:])
        if not n:
            raise ConnectionError("the server closed the connection")
        self._end += n

    def _read(self, room: memoryview) -> None:
        have = min(len(room), self._end - self._at)
        room[:have] = self._view[self._at : self._at + have]
        self._at += have
        while have < len(room):
            if len(room) - have < BUFFER_BYTES // 4:  # the next answer's line with it
                self._fill()
                n = min(len(room) - have, self._end - self._at)
                room[have : have + n] = self._view[self._at : self._at + n]
                self._at += n
            else:
                n = self._socket.recv_into(room[have:])
                if not n:
                    raise ConnectionError("the server closed the connection")
            have += n
