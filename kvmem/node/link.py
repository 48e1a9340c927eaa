"""The worker's half of an attachment: the arena's memory, and who is told that it is mapped.

The connection is what the node knows a writer by (I3): it is there before the memory is, and says
`Bye` when the memory is gone. A worker that dies says nothing; the node then waits until the
kernel calls its process dead.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from kvmem.errors import NotAnswered
from kvmem.node import wire
from kvmem.node.channel import Channel
from kvmem.store.arena import Arena

__all__ = ["Link"]

PATIENCE_S = 2.0


class Link:
    """A worker's attachment; `arena` is mapped as long as somebody uses its buffer.

    Args:
        folder: the node's.
        like: a worker's greeting, with the engine's token.
        on_lost: is told, by a thread of this link's, that the node has gone: whoever has the
            memory lets go of it, so that the next node finds room for its own.

    Raises:
        NotAnswered, ConfigError, ArenaError: there is no such node or engine, or its memory is
            not what was told.
    """

    def __init__(self, folder: Path, like: wire.Hello, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._closing = False
        self._lock = threading.Lock()
        self._channel = Channel(folder, like, deadline_s=PATIENCE_S, patience_s=PATIENCE_S,
                                     fds=1)  # fmt: skip
        try:
            fds = self._channel.fds
            if len(fds) != 1:
                raise NotAnswered("The node handed over no memory", next_step="Restart it.")
            self.arena = Arena.received(fds[0])
            header = self.arena.header
            told = (header.namespace, header.slot_bytes, header.ranks)
            if told != (like.namespace, like.slot_bytes, like.ranks):
                self.arena.close(unlink=False)
                raise NotAnswered("The node's memory is not of this engine's blocks")
        except BaseException:
            with contextlib.suppress(OSError):
                self._channel.post(wire.Bye())  # nothing of it is mapped
            self._channel.close()
            raise
        self._thread = threading.Thread(target=self._watch, name="kvmem-link", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.hung_up()
        if not self._closing:
            self._on_lost()
            self._unmap()

    def close(self) -> None:
        """Unmaps the arena and says so; where somebody still uses its memory, the node is told
        nothing, and takes this process for a writer until it ends."""
        self._closing = True
        if self._unmap():
            with contextlib.suppress(OSError):  # a node that has gone need not know
                self._channel.post(wire.Bye())
        self._channel.shut()
        self._thread.join()
        self._channel.close()

    def _unmap(self) -> bool:
        """Whether nothing of this process can reach the memory any more."""
        with self._lock:
            self.arena.close(unlink=False)
            try:
                self.arena.buffer.close()
            except BufferError:  # a copier, or an array over it, is still there
                return False
            return True
