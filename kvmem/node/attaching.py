"""An engine's attachment to a node: made, lost, and made again beside the engine's work.

attached ── no answer, or the connection ends ──▶ away ── greeted, and adopted ──▶ attached
                                                        (the same token: same epoch)
"""

from __future__ import annotations

import abc
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from kvmem import events
from kvmem.errors import ConfigError, EngineError, KVMemError
from kvmem.node import wire
from kvmem.node.channel import Channel
from kvmem.types import GroupShape

__all__ = ["DEADLINE_S", "GREET_S", "Attaching", "Attachment", "hello_of"]

log = logging.getLogger("kvmem")

DEADLINE_S = 0.5
GREET_S = 60.0  # a node that makes its arena for the first engine takes its time
RETRY_S, RETRY_MOST_S = 0.05, 2.0
REFUSED_RETRY_S = 5.0


class Attachment(msgspec.Struct, frozen=True):
    """What a worker attaches by: the node's folder, the engine's token there, and its blocks'
    namespace."""

    folder: str
    token: str
    namespace: bytes


class Attaching(abc.ABC):
    """What a `NodeCache` is above: the connections, and the thread that makes them anew.

    Args: see `NodeCache`.
    """

    def __init__(
        self,
        folder: Path,
        like: wire.Hello,
        bus: events.Bus,
        *,
        deadline_s: float,
        on_trouble: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.bus = bus
        self.epoch = 0
        self.away = 0  # times that the node went away
        self._away_since_s: float | None = None
        self._like = like
        self._deadline_s = deadline_s
        self._on_trouble = on_trouble
        self._token = ""
        self._channel: Channel | None = None
        self._ready: Channel | None = None  # greeted, for the scheduler's thread to adopt
        self._has_disk = False
        self._look_lock = threading.Lock()
        self._looker: Channel | None = None
        self._closing = threading.Event()
        self._wanted = threading.Event()
        self._trouble = ""
        self._thread = threading.Thread(
            target=self._attach_for_ever, name="kvmem-node", daemon=True
        )

    def _begin(self, wait_s: float) -> None:
        """Attaches, within so long; if not, and whenever it is lost, a thread does."""
        if wait_s:
            self._attach(wait_s)
            self.adopt()
        if self._channel is None:
            self._away_since_s = time.monotonic()
            self._wanted.set()
        self._thread.start()

    # -- coming and going --------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether there is a node, as far as is known."""
        return self._channel is not None

    @property
    def attachment(self) -> Attachment:
        """What a worker attaches by, to read and write slots of this epoch."""
        return Attachment(str(self.folder), self._token, self._like.namespace)

    def adopt(self) -> bool:
        """Takes a new attachment over, if there is one; whether there is one now.

        The scheduler's thread calls it where nothing that it has begun holds slots of before.
        """
        channel, self._ready = self._ready, None
        if channel is None:
            return self._channel is not None
        welcome = channel.welcome
        known = welcome.known and welcome.token == self._token
        if not known:
            self.epoch += 1
            self._token = welcome.token
        self._has_disk = welcome.has_disk
        self._channel = channel
        self._attached(welcome, known=known)
        if self._away_since_s is not None:
            away_s = time.monotonic() - self._away_since_s
            self._away_since_s = None
            self.bus.emit(events.TierOn(tier="node", seconds=away_s))
        return self._channel is not None

    @abc.abstractmethod
    def _attached(self, welcome: wire.Welcome, *, known: bool) -> None:
        """There is a node; it has kept what this engine had where it is `known`."""

    @abc.abstractmethod
    def _gone(self) -> None:
        """There is none any more."""

    def _lost(self, error: BaseException) -> None:
        """From now on there is no node, until one is attached to again."""
        channel, self._channel = self._channel, None
        if channel is None:
            return
        channel.close()
        self.away += 1
        self._away_since_s = time.monotonic()
        self._gone()
        self.bus.emit(events.TierOff(tier="node", error=f"{type(error).__name__}: {error}"))
        self._tell(f"the node at {self.folder} is away: {type(error).__name__}: {error}")
        self._wanted.set()

    def _attach_for_ever(self) -> None:
        retry_s = RETRY_S
        while not self._closing.is_set():
            self._wanted.wait()
            if self._closing.is_set():
                return
            wait_s = self._attach(GREET_S)
            if wait_s is None:
                self._wanted.clear()
                retry_s = RETRY_S
                continue
            self._closing.wait(max(wait_s, retry_s))
            retry_s = min(RETRY_MOST_S, 2 * retry_s)

    def _attach(self, patience_s: float) -> float | None:
        """Greets the node; None where that went well, else how long to wait at least."""
        try:
            hello = msgspec.structs.replace(self._like, token=self._token)
            channel = Channel(
                self.folder, hello, deadline_s=self._deadline_s, patience_s=patience_s
            )
        except ConfigError as error:
            log.error("kvmem: %s", error) if str(error) != self._trouble else None
            self._tell(str(error))
            return REFUSED_RETRY_S
        except (KVMemError, OSError) as error:
            self._tell(str(error))
            return 0.0
        self._trouble = ""
        self._ready = channel
        return None

    def _tell(self, error: str) -> None:
        if error != self._trouble:
            self._trouble = error
            log.warning("kvmem: %s; this engine computes what it would have loaded", error)
            self._on_trouble(error)

    def _ask(self, message: Any, *, patience_s: float = 0.0) -> Any:
        """The node's answer; None where there is no node.

        Raises:
            EngineError: the node failed at it.
        """
        channel = self._channel
        if channel is None:
            return None
        try:
            answer = channel.ask(message, patience_s=patience_s)
        except OSError as error:
            self._lost(error)
            return None
        if isinstance(answer, wire.Failed):
            raise EngineError(f"kvmem's node failed: {answer.error}", next_step="See its log.")
        return answer

    def _post(self, message: Any) -> bool:
        channel = self._channel
        if channel is None:
            return False
        try:
            channel.post(message)
        except OSError as error:
            self._lost(error)
            return False
        return True

    def _look(self, message: Any) -> Any:
        """The answer over a connection of its own; None where there is none."""
        with self._look_lock:
            if self._channel is None:
                self._end_looker()
                return None
            try:
                if self._looker is None or self._looker.welcome.token != self._token:
                    self._end_looker()
                    hello = msgspec.structs.replace(self._like, token=self._token, role="look")
                    self._looker = Channel(
                        self.folder, hello, deadline_s=self._deadline_s,
                        patience_s=self._deadline_s,
                    )  # fmt: skip
                answer = self._looker.ask(message)
            except (KVMemError, OSError) as error:
                log.debug("kvmem: a look at the node failed: %s", error)
                self._end_looker()
                return None
        return answer.value if isinstance(answer, wire.Told) else None

    def _end_looker(self) -> None:
        if self._looker is not None:
            self._looker.close()
            self._looker = None

    def close(self) -> None:
        """Ends the attachment: the node takes back what this engine has when its workers end."""
        self._closing.set()
        self._wanted.set()
        self._thread.join(GREET_S)
        for channel in (self._channel, self._ready):
            if channel is not None:
                with contextlib.suppress(OSError):  # it sees the end of the connection, too
                    channel.post(wire.Bye())
                channel.close()
        self._channel = self._ready = None
        with self._look_lock:
            self._end_looker()


def hello_of(
    *, namespace: bytes, slot_bytes: int, ranks: int, groups: Sequence[GroupShape], label: str
) -> wire.Hello:
    """What an engine tells of its blocks: see `Arena.create`, and `GroupShape`."""
    return wire.Hello(
        magic=wire.MAGIC,
        version=wire.VERSION,
        role="engine",
        kvmem=metadata.version("kvmem"),
        namespace=namespace,
        slot_bytes=slot_bytes,
        ranks=ranks,
        groups=[wire.Shape(g.block_tokens, g.reach_tokens, g.chunk_tokens) for g in groups],
        label=label[:512],
    )
