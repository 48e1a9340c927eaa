"""Redis or Valkey as a far store, one server or a cluster, through redis-py.

Values go as they are, nothing is pickled. Calls are pipelined in chunks, so that neither side holds
more than a chunk in its buffers. Nothing is tried again here: a store that fails costs its hits
until it works again, and the tier decides when (I9).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import RedisError
from redis.retry import Retry

from kvmem.store.far.base import Bytes
from kvmem.store.far.redis_wire import Refusal, Wire

__all__ = ["RedisStore"]

CHUNK_BYTES = 8 << 20
CHUNK_NAMES = 512
MARK_BYTES = 64
Answer = TypeVar("Answer")
Command = Sequence[Any]


class RedisStore:
    """See `kvmem.store.far.FarStore`.

    Args:
        url: redis://, rediss:// or unix://, as redis-py takes it.
        cluster: the server is a node of a cluster.
        password: overrides the URL's.
        ttl_s: seconds that a value stays after it was written or found again; 0 for always.
        timeout_s: for a connection, and for each step of an answer.
    """

    def __init__(
        self, url: str, *, cluster: bool = False, password: str | None = None, ttl_s: int = 0,
        timeout_s: float = 2.0,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        if password is not None:
            options["password"] = password
        self._url, self._cluster, self._options = url, cluster, options
        self._ttl = b"%d" % ttl_s if ttl_s else b""
        self._lock = threading.Lock()
        self._made: Any = None  # guarded by _lock
        self._wires: dict[Any, list[tuple[Any, Wire]]] = {}  # idle ones by node; guarded by _lock
        self._closed = False

    def sized(self, most_bytes: int) -> None:
        """A server takes values of any size."""

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        """Which names hold bytes. One that holds something else counts as none; one that is found
        stays for another `ttl_s`."""
        commands: list[list[Command]] = []
        for name in names:
            own: list[Command] = [[b"STRLEN", name]]
            if self._ttl:
                own.append([b"EXPIRE", name, self._ttl])
            commands.append(own)

        def answer(wire: Wire, i: int) -> bool:
            size = _or_strange(wire.integer)
            if self._ttl:
                wire.integer()
            return size is not None and size > 0

        return self._all(names, commands, answer, [0] * len(names))

    def get(self, names: Sequence[bytes], rooms: Sequence[Bytes]) -> list[int]:
        """The values' bytes; a value of another type has none."""
        commands = [
            [[b"GETRANGE", name, b"0", b"%d" % len(room)]]
            for name, room in zip(names, rooms, strict=True)
        ]

        def answer(wire: Wire, i: int) -> int:
            size = _or_strange(lambda: wire.into(rooms[i]))
            # GETRANGE answers no bytes for no value; ours are never empty.
            return 0 if size is None else (size or -1)

        return self._all(names, commands, answer, [len(room) for room in rooms])

    def put(self, names: Sequence[bytes], values: Sequence[Sequence[Bytes | bytes]]) -> list[bool]:
        """SET, which replaces what is there whole; False where the server's memory is full."""
        ttl = [b"EX", self._ttl] if self._ttl else []
        commands = [
            [[b"SET", name, value, *ttl]] for name, value in zip(names, values, strict=True)
        ]

        def answer(wire: Wire, i: int) -> bool:
            try:
                return wire.done()
            except Refusal as refusal:
                if str(refusal).startswith("OOM"):
                    return False
                raise OSError(f"the server refuses to store: {refusal}") from refusal

        sizes = [sum(len(part) for part in value) for value in values]
        return self._all(names, commands, answer, sizes)

    def mark(self, name: bytes, new: bytes, *, replace: bool) -> bytes:
        """SET, with NX where it must not replace, and what is there then."""
        room = _room(MARK_BYTES)
        commands = [
            [[b"SET", name, new, *([] if replace else [b"NX"])],
             [b"GETRANGE", name, b"0", b"%d" % (MARK_BYTES - 1)]]
        ]  # fmt: skip

        def answer(wire: Wire, i: int) -> int:
            refused: Refusal | None = None
            try:
                wire.done()
            except Refusal as refusal:
                refused = refusal
            size = wire.into(room)
            if size <= 0 or (replace and refused is not None):
                raise OSError(f"the server keeps no mark: {refused}")
            return size

        (size,) = self._all([name], commands, answer, [0])
        return room[:size].tobytes()

    def drop(self, names: Sequence[bytes]) -> None:
        """UNLINK: the server frees them beside its other work."""
        commands = [[[b"UNLINK", name]] for name in names]
        self._all(names, commands, lambda wire, i: wire.integer(), [0] * len(names))

    def close(self) -> None:
        """Drops the connections; those in use end with their answer or their time."""
        with self._lock:
            self._closed = True
            idle = [pair for pairs in self._wires.values() for pair in pairs]
            self._wires.clear()
            made, self._made = self._made, None
        for connection, _ in idle:
            connection.disconnect()
        if made is not None:
            with _as_oserror():
                made.close()

    # -- connections -------------------------------------------------------------------------

    def _client(self) -> Any:
        with self._lock, _as_oserror():
            if self._closed:
                raise OSError("the store is closed")
            if self._made is None:
                make = RedisCluster.from_url if self._cluster else redis.Redis.from_url
                self._made = make(self._url, **self._options)  # a cluster's layout is asked for
            return self._made

    def _forget_layout(self) -> None:
        """After a failure a cluster is asked anew who has what; and redis-py counts the connections
        that a pool made, up to a bound, also those that are gone."""
        with self._lock:
            made, self._made = self._made, None
            idle = [pair for pairs in self._wires.values() for pair in pairs]
            self._wires.clear()
        for connection, _ in idle:
            connection.disconnect()
        if made is not None:
            with contextlib.suppress(RedisError, OSError):  # it failed already
                made.close()

    def _all(
        self,
        names: Sequence[bytes],
        commands: Sequence[Sequence[Command]],
        answer: Callable[[Wire, int], Answer],
        sizes: Sequence[int],
    ) -> list[Answer]:
        """The answer to each name's commands, asked of the node that has it, in chunks."""
        found: dict[int, Answer] = {}
        by_node: dict[Any, list[int]] = {}
        client = self._client()
        try:
            with _as_oserror():
                for i, name in enumerate(names):
                    node = client.get_node_from_key(name) if self._cluster else None
                    by_node.setdefault(node, []).append(i)
                for node, own in by_node.items():
                    pool = (node.redis_connection or client.get_redis_connection(node)) if (
                        node is not None
                    ) else client  # fmt: skip
                    with self._wire(pool.connection_pool, node and node.name) as wire:
                        for chunk in _chunks(own, sizes):
                            wire.send([one for i in chunk for one in commands[i]])
                            for i in chunk:
                                found[i] = answer(wire, i)
        except OSError:
            self._forget_layout()
            raise
        return [found[i] for i in range(len(names))]

    @contextlib.contextmanager
    def _wire(self, pool: Any, node: Any) -> Iterator[Wire]:
        with self._lock:
            idle = self._wires.setdefault(node, [])
            pair = idle.pop() if idle else None
        if pair is None:
            connection = pool.make_connection()
            connection.connect()
            pair = (connection, Wire(connection))
        try:
            yield pair[1]
        except BaseException:
            pair[0].disconnect()  # answers may be left in it
            raise
        with self._lock:
            if not self._closed:
                self._wires.setdefault(node, []).append(pair)
                return
        pair[0].disconnect()


def _room(n_bytes: int) -> Bytes:
    return np.empty(n_bytes, np.uint8)


def _or_strange(read: Callable[[], Answer]) -> Answer | None:
    """An answer, None where the name holds something else than bytes.

    Raises:
        OSError: any other error: the server is loading, read-only, wants a password.
    """
    try:
        return read()
    except Refusal as refusal:
        if str(refusal).startswith("WRONGTYPE"):
            return None
        raise OSError(str(refusal)) from refusal


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    """redis-py's errors as the tier knows them; its text names no password."""
    try:
        yield
    except redis.TimeoutError as error:
        raise TimeoutError(f"no answer in time: {error}") from error
    except RedisError as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    except Refusal as refusal:
        raise OSError(str(refusal)) from refusal


def _chunks(numbers: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Which of them go in one pipeline."""
    chunk: list[int] = []
    n_bytes = 0
    for i in numbers:
        if chunk and (n_bytes + sizes[i] > CHUNK_BYTES or len(chunk) >= CHUNK_NAMES):
            yield chunk
            chunk, n_bytes = [], 0
        chunk.append(i)
        n_bytes += sizes[i]
    if chunk:
        yield chunk
