"""A desk beside an arena: other processes of the same user ask its owner, and are answered.

    the owner:     Desk(arena.path, answers)      answers on a thread of its own, one at a time
    anybody else:  ask(path, "live", sessions=10)

A local socket without a file: its name is the arena's in the kernel's own table of names, and is
gone with its owner, however that ends. Both ends look at the other's user before a byte is read.
One question a connection: a length of 4 bytes, little-endian, and so much msgpack, there and back.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvmem.errors import ArenaError, KVMemError, NotAnswered, NotUnderstood

__all__ = ["Desk", "ask"]

MOST_ASKED = 32 << 20  # bytes of a question: a prompt of millions of tokens
MOST_TOLD = 256 << 20
PATIENCE_S = 2.0  # for a peer that has begun to speak
RETRY_S = 5.0  # after nobody could be let in
_LENGTH = struct.Struct("<I")
_PEER = struct.Struct("3i")  # pid, uid, gid

log = logging.getLogger("kvmem")

Answer = Callable[[dict[str, Any]], Any]


class Desk:
    """See the module. `close` ends the thread; questions under way are answered first.

    Args:
        path: the arena's.
        answers: by what is asked; each is called on the desk's thread with the question's fields,
            and what it answers is encoded. A ValueError or a KVMemError is told to who asked;
            anything else to `failed` too.
        failed: told of what raised.
    """

    def __init__(
        self, path: Path, answers: Mapping[str, Answer], failed: Callable[[str], None]
    ) -> None:
        self.answers = dict(answers)
        self._failed = failed
        self._over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(_address(path))
            self._socket.listen(16)
        except OSError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, name="kvmem-desk", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; nobody is answered any more."""
        self._over.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        except OSError:
            log.debug("kvmem: the desk's socket was shut down already")
        self._thread.join(PATIENCE_S + 1.0)
        self._socket.close()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                peer, _ = self._socket.accept()
            except OSError:
                if self._over.is_set():
                    return
                self._failed("the desk's socket failed")
                if self._over.wait(RETRY_S):  # no file numbers are left, say: later there may be
                    return
                continue
            with peer:
                try:
                    peer.settimeout(PATIENCE_S)
                    if _user_of(peer) == os.getuid():
                        _put(peer, self._answer(_get(peer, MOST_ASKED)))
                except (OSError, EOFError, ValueError):
                    continue  # it went away, or spoke of something else
                except Exception as error:  # noqa: BLE001 the top of a thread: the next is answered (I9)
                    self._failed(f"{type(error).__name__}: {error}")

    def _answer(self, asked: bytes) -> bytes:
        try:
            fields = msgspec.msgpack.decode(asked, type=dict[str, Any])
            what = fields.pop("ask", None)
            answer = self.answers.get(what)
            if answer is None:
                raise ValueError(f"nobody here knows {what!r}")
            return msgspec.msgpack.encode({"told": answer(fields)})
        except (KVMemError, ValueError) as error:
            told = str(error) or type(error).__name__
            return msgspec.msgpack.encode({"error": told, "asked": True})
        except Exception as error:  # noqa: BLE001 whoever asked is told, and so is the owner (I9)
            self._failed(f"{type(error).__name__}: {error}")
            return msgspec.msgpack.encode({"error": f"it failed: {type(error).__name__}"})


def ask(path: Path, what: str, *, timeout_s: float = 10.0, **fields: Any) -> bytes:
    """What the owner of the arena at `path` answers, as msgpack.

    Raises:
        NotUnderstood: it refuses the question.
        NotAnswered: it failed at it, or took longer than `timeout_s`.
        FileNotFoundError: nobody sits there.
        ArenaError: it is another user's.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(timeout_s)
        try:
            peer.connect(_address(path))
            if _user_of(peer) != os.getuid():
                raise ArenaError(f"The desk of {path} is another user's", path=path)
            _put(peer, msgspec.msgpack.encode({"ask": what, **fields}))
            raw = _get(peer, MOST_TOLD)
        except ConnectionRefusedError:
            raise FileNotFoundError(f"{path}: nobody answers there") from None
        except (OSError, EOFError) as error:
            raise NotAnswered(
                f"The engine behind {path} did not answer: {error or type(error).__name__}",
                next_step="Ask again; it may have been busy, or have ended.",
            ) from error
    told = msgspec.msgpack.decode(raw, type=_Told)
    if told.error is not None:
        raise (NotUnderstood if told.asked else NotAnswered)(told.error)
    return bytes(told.told)


class _Told(msgspec.Struct, frozen=True):
    told: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: str | None = None
    asked: bool = False  # what is wrong is the question


def _address(path: Path) -> str:
    return f"\0{path.name}"


def _user_of(peer: socket.socket) -> int:
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(raw)[1])


def _put(peer: socket.socket, payload: bytes) -> None:
    peer.sendall(_LENGTH.pack(len(payload)) + payload)


def _get(peer: socket.socket, most: int) -> bytes:
    (length,) = _LENGTH.unpack(_read(peer, _LENGTH.size))
    if length > most:
        raise ValueError(f"{length:,} bytes are too many")
    return _read(peer, length)


def _read(peer: socket.socket, n: int) -> bytes:
    parts = bytearray()
    while len(parts) < n:
        piece = peer.recv(min(1 << 20, n - len(parts)))
        if not piece:
            raise EOFError("the other side has gone")
        parts += piece
    return bytes(parts)
