"""The node's loop: one thread answers all engines, one frame after the other.

Whoever connects is this user's (the kernel says so), greets within GREET_S, and sends frames of
bounded size; what breaks the grammar loses its connection and nothing else. A question that fails
inside is answered with the failure (I9). Nothing here waits: a socket that takes no more bytes
keeps its own answers, up to a bound.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import struct
import threading
import time
from importlib import metadata
from typing import Any

import msgspec

from kvmem import events
from kvmem.errors import ConfigError, KVMemError
from kvmem.node import wire
from kvmem.node.answering import ANSWERED, DO, LOOKS, look
from kvmem.node.hall import Hall
from kvmem.node.listening import listen
from kvmem.node.members import Engine, Settings

__all__ = ["Node", "Settings"]

log = logging.getLogger("kvmem")

GREET_S = 5.0
ALIVE_S = 30.0  # the largest arenas take so long to be made
BUSY_S, QUIET_S = 0.002, 0.1  # between looks at the tiers
MOST_CONNECTIONS = 1024
MOST_UNSENT = 1 << 27
PEER = struct.Struct("3i")


class _Connection:
    """One that has connected; `role` is empty until it has greeted."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.sock = sock
        self.pid = pid
        self.role = ""
        self.engine: Engine | None = None
        self.buffer = bytearray()
        self.unsent = bytearray()
        self.since = time.monotonic()
        self.pidfd = -1  # of a worker's process
        self.said_bye = False


class Node:
    """See the module. `run` serves until `stop`; `close` ends all.

    Args:
        settings: see `Settings`.

    Raises:
        ConfigError: the folder can't be used, or a node serves there already.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bus = events.Bus()
        self.hall: Hall | None = None
        self.failures = 0
        self.refused = 0
        self.last_failure = ""
        self._started_s = time.time()
        self._stopping = threading.Event()
        self._selector = selectors.EpollSelector()
        self._connections: set[_Connection] = set()
        self._dying: dict[int, tuple[Engine, _Connection]] = {}  # by pidfd
        self._waiting: list[tuple[float, int, _Connection]] = []  # until, progress, who
        self._scratch = bytearray(wire.RECV_BYTES)
        self._lock, self._listener = listen(settings.path)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_r, selectors.EVENT_READ, None)
        self._asked_s = 0.0
        self._looking = wire.Looking()
        self.beat_s = time.monotonic()  # when the loop last came round; any thread may look

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to end. Any thread may ask."""
        return self._stopping.is_set()

    @property
    def n_engines(self) -> int:
        """Engines that it keeps something for. Any thread may ask."""
        hall = self.hall
        return len(hall.engines) if hall is not None else 0

    @property
    def is_alive(self) -> bool:
        """Whether the loop comes round. Any thread may ask."""
        return time.monotonic() - self.beat_s < ALIVE_S

    def run(self) -> None:
        """Serves until `stop`."""
        while not self._stopping.is_set():
            self.turn()

    def turn(self, most_s: float = QUIET_S) -> None:
        """One round of the loop, of so long at most where nothing comes."""
        hall = self.hall
        waits = BUSY_S if hall is not None and (self._waiting or hall.is_busy) else most_s
        for key, mask in self._spin() or self._selector.select(waits):
            who = key.data
            if isinstance(who, _Connection):
                if who in self._connections:
                    self._safely(who, mask)
            elif key.fd == self._listener.fileno():
                self._accept()
            elif key.fd == self._wake_r:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_r, 4096)
            else:
                self._died(key.fd)
        self._between()

    def _spin(self) -> list[Any]:
        """What has come, while it is not long ago that something was asked."""
        begun = self._asked_s
        now = time.monotonic()
        look = now - begun < wire.SPIN_S and self._looking.begin(now)
        while look:
            found = self._selector.select(0)
            if found:
                return found
            look = self._looking.go_on(time.monotonic(), begun)
        return []

    def _between(self) -> None:
        now = time.monotonic()
        if now - self.beat_s < BUSY_S:
            return
        self.beat_s = now
        if self.hall is not None:
            try:
                self.hall.tick(now)
            except Exception as error:  # noqa: BLE001 a door: the node goes on (I9)
                self._failed("tick", error)
            progress = self.hall.progress
            still = []
            for until, seen, who in self._waiting:
                if who not in self._connections:
                    continue
                if now >= until or progress != seen:
                    self._send(who, wire.Told(0))
                else:
                    still.append((until, seen, who))
            self._waiting = still
        for one in [c for c in self._connections if not c.role and now - c.since > GREET_S]:
            self._end(one)

    def stop(self) -> None:
        """Has `run` return soon. Any thread, and a signal's handler, may ask."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"x")

    def close(self) -> None:
        """Ends all connections, the tiers and the memory."""
        for one in list(self._connections):
            self._connections.discard(one)
            one.sock.close()
        for pidfd in self._dying:
            os.close(pidfd)
        self._dying.clear()
        self._selector.close()
        self._listener.close()
        os.close(self._wake_r)
        os.close(self._wake_w)
        if self.hall is not None:
            self.hall.close()
            self.hall = None
        os.close(self._lock)

    # -- connections -------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are no descriptors left
            return
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
        pid, uid, _ = PEER.unpack(peer)
        if uid != os.getuid() or pid <= 0 or len(self._connections) >= MOST_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        one = _Connection(sock, pid)
        self._connections.add(one)
        self._selector.register(sock, selectors.EVENT_READ, one)

    def _safely(self, who: _Connection, mask: int) -> None:
        try:
            self._serve(who, mask)
        except Exception as error:  # noqa: BLE001 a door: one engine's trouble is not the others' (I9)
            self._failed(f"a connection of process {who.pid}", error)
            self._end(who)

    def _serve(self, who: _Connection, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush(who)
        if not mask & selectors.EVENT_READ or who not in self._connections:
            return
        try:
            n = who.sock.recv_into(self._scratch)
        except BlockingIOError:
            return
        except OSError:
            n = 0
        if not n:
            self._end(who)
            return
        view = memoryview(self._scratch)[:n]
        try:
            # Mostly one whole frame: nothing of it is copied.
            if (
                who.role
                and not who.buffer
                and n >= 4
                and (wire.LENGTH.unpack_from(view)[0] == n - 4)
            ):
                self._take(who, view[4:])
                return
            who.buffer += view
            while who in self._connections:
                most = wire.MAX_FRAME if who.role else wire.MAX_HELLO
                body = wire.split(who.buffer, most)
                if body is None:
                    return
                self._take(who, body)
        except (ValueError, msgspec.MsgspecError) as error:
            self._failed(f"a frame of process {who.pid}", error)
            self._end(who)

    def _take(self, who: _Connection, body: Any) -> None:
        if not who.role:
            self._greet(who, wire.HELLOS.decode(body))
            return
        ask = wire.REQUESTS.decode(body)
        now = time.monotonic()
        if type(ask) in LOOKS:
            self._send(who, self._look(ask, now))
            return
        if type(ask) is wire.Bye:
            who.said_bye = True
            self._end(who)
            return
        if who.role != "engine" or who.engine is None or self.hall is None:
            raise ValueError(f"a {who.role} asks what only an engine may")
        if type(ask) is wire.Settle:
            self._waiting.append((now + ask.seconds, self.hall.progress, who))
            return
        try:
            answer = DO[type(ask)](self.hall, who.engine, ask, now)
        except ValueError as error:  # what was asked is no question
            self._failed(f"{type(ask).__name__} of process {who.pid}", error)
            answer = wire.Failed(str(error)[:1000])
        except Exception as error:  # noqa: BLE001 a door: the node goes on, the engine computes (I9)
            self._failed(type(ask).__name__, error)
            answer = wire.Failed(f"{type(error).__name__}: {error}"[:1000])
        if type(ask) in ANSWERED:
            self._send(who, answer)
            self._asked_s = time.monotonic()

    def _look(self, ask: Any, now: float) -> Any:
        if type(ask) is wire.Ask and ask.what == "status":
            return wire.Told(self.told(now))
        if self.hall is None:
            return wire.Failed("no engine has attached yet")
        try:
            return look(self.hall.cache, ask)
        except Exception as error:  # noqa: BLE001 a door: as above (I9)
            self._failed(type(ask).__name__, error)
            return wire.Failed(f"{type(error).__name__}: {error}"[:1000])

    def _greet(self, who: _Connection, hello: wire.Hello) -> None:
        try:
            self._check(hello)
            welcome, fds = self._let_in(who, hello)
        except (KVMemError, OSError) as error:
            self.refused += 1
            log.warning("kvmem node: process %d is refused: %s", who.pid, error)
            self._send(who, wire.Welcome(kvmem=_version(), refused=str(error)[:4000]))
            self._end(who)
            return
        who.role = hello.role
        if fds:
            try:
                socket.send_fds(who.sock, [wire.frame(welcome)], fds)
            except OSError:  # it has gone already
                self._end(who)
        else:
            self._send(who, welcome)

    @staticmethod
    def _check(hello: wire.Hello) -> None:
        if hello.magic != wire.MAGIC or hello.version != wire.VERSION:
            raise ConfigError(
                f"this node speaks {wire.MAGIC} {wire.VERSION} (kvmem {_version()}), the client "
                f"{hello.magic} {hello.version} (kvmem {hello.kvmem or '?'})",
                next_step="Give both the same kvmem; restart the older one.",
            )

    def _let_in(self, who: _Connection, hello: wire.Hello) -> tuple[wire.Welcome, list[int]]:
        known = False
        if hello.role == "engine":
            hall = self._hall_for(hello)
            who.engine, known = hall.attach(hello, who.pid)
        elif hello.role == "worker":
            engine = self._engine_of(hello)
            who.pidfd = os.pidfd_open(who.pid)
            who.engine = engine
            engine.writers.add(who)
        elif hello.role == "look":
            self._engine_of(hello)
        elif hello.role != "status":
            raise ConfigError(f"nobody is a {hello.role!r} here")
        hall_ = self.hall
        return wire.Welcome(
            kvmem=_version(),
            token=who.engine.token if who.engine is not None else "",
            known=known,
            n_slots=hall_.arena.header.n_slots if hall_ is not None else 0,
            has_disk=hall_ is not None and hall_.cache.has_disk,
        ), [hall_.arena.fd] if hall_ is not None and hello.role == "worker" else []

    def _engine_of(self, hello: wire.Hello) -> Engine:
        engine = self.hall.engines.get(hello.token) if self.hall is not None else None
        if engine is None or self.hall is None or not self.hall.fits(hello):
            raise ConfigError(
                "this node knows no such engine: its scheduler's half attaches first",
                next_step="It does so by itself.",
            )
        return engine

    def _hall_for(self, hello: wire.Hello) -> Hall:
        if len(hello.namespace) != 32 or not hello.slot_bytes or not hello.groups:
            raise ConfigError("an engine tells its namespace, and its blocks' sizes")
        hall = self.hall
        if hall is not None and hall.fits(hello):
            return hall
        if hall is not None:
            if hall.engines:
                raise ConfigError(
                    f"this node keeps blocks of {hall.hello.label or 'another model'} "
                    f"({hall.namespace.hex()[:12]}), and the engine's are of "
                    f"{hello.label or 'another one'} ({hello.namespace.hex()[:12]})",
                    next_step="Start a node for each model, or end the other engines first.",
                )
            self.hall = None
            hall.close()
        self.hall = Hall(self.settings, hello, self.bus)
        return self.hall

    def _end(self, who: _Connection) -> None:
        """The connection is over: what its engine may have lost by that is looked at."""
        if who not in self._connections:
            return
        self._connections.discard(who)
        self._selector.unregister(who.sock)
        who.sock.close()
        engine, hall = who.engine, self.hall
        if engine is None or hall is None:
            return
        if who.role == "engine":
            hall.detached(engine)
        elif who.said_bye:
            engine.writers.discard(who)
            os.close(who.pidfd)
            hall.reclaim(engine)
        else:  # I3: until the kernel calls its process dead it may write
            self._dying[who.pidfd] = (engine, who)
            self._selector.register(who.pidfd, selectors.EVENT_READ, None)

    def _died(self, pidfd: int) -> None:
        engine, who = self._dying.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        engine.writers.discard(who)
        if self.hall is not None:
            self.hall.reclaim(engine)

    # -- answers -----------------------------------------------------------------------------

    def _send(self, who: _Connection, message: Any) -> None:
        text = wire.frame(message)
        if not who.unsent:
            try:
                n = who.sock.send(text)
            except BlockingIOError:
                n = 0
            except OSError:
                self._end(who)
                return
            if n == len(text):
                return
            text = text[n:]
            self._selector.modify(who.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, who)
        who.unsent += text
        if len(who.unsent) > MOST_UNSENT:
            self._end(who)

    def _flush(self, who: _Connection) -> None:
        try:
            n = who.sock.send(who.unsent)
        except BlockingIOError:
            return
        except OSError:
            self._end(who)
            return
        del who.unsent[:n]
        if not who.unsent:
            self._selector.modify(who.sock, selectors.EVENT_READ, who)

    def _failed(self, where: str, error: Exception) -> None:
        self.failures += 1
        self.last_failure = f"{where}: {type(error).__name__}: {error}"[:400]
        log.warning("kvmem node: %s", self.last_failure)
        self.bus.emit(events.Failure(where=f"node.{where}", error=str(error)[:400]))

    def told(self, now: float) -> dict[str, Any]:
        """What `kvmem node status` shows."""
        return {
            "kvmem": _version(),
            "protocol": wire.VERSION,
            "pid": os.getpid(),
            "path": str(self.settings.path),
            "up_s": time.time() - self._started_s,
            "host_gb": self.settings.host_gb,
            "disk_gb": self.settings.disk_gb,
            "connections": len(self._connections),
            "refused": self.refused,
            "failures": self.failures,
            "last_failure": self.last_failure,
            **(self.hall.told(now) if self.hall is not None else {}),
        }


def _version() -> str:
    return metadata.version("kvmem")
