"""Redis or Valkey as a far store, one server or a cluster, through redis-py.

Values go as they are, nothing is pickled. Calls are pipelined in chunks, so that neither side holds
more than a chunk in its buffers. Nothing is tried again here: a store that fails costs its hits
until it works again, and the tier decides when (I9).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.retry import Retry

from kvmem.store.far.base import Bytes

__all__ = ["RedisStore"]

CHUNK_BYTES = 8 << 20
CHUNK_NAMES = 512


class RedisStore:
    """See `kvmem.store.far.FarStore`.

    Args:
        url: redis://, rediss:// or unix://, as redis-py takes it.
        cluster: the server is a node of a cluster.
        password: overrides the URL's.
        ttl_s: seconds that a value stays after it was written or found again; 0 for always.
        timeout_s: for a connection, and for each answer of the server.
    """

    def __init__(
        self, url: str, *, cluster: bool = False, password: str | None = None, ttl_s: int = 0,
        timeout_s: float = 2.0,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
        }
        if password is not None:
            options["password"] = password
        self._url, self._cluster, self._options = url, cluster, options
        self._ttl_s = ttl_s
        self._made: Any = None
        if not cluster:  # this connects to nobody yet
            self._made = redis.Redis.from_url(url, **options)

    @property
    def _client(self) -> Any:
        if self._made is None:  # a cluster's layout is asked for at once
            with _as_oserror():
                self._made = RedisCluster.from_url(self._url, **self._options)
        return self._made

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        """Which names hold bytes. One that holds something else counts as none; one that is found
        stays for another `ttl_s`."""
        found: list[bool] = []
        for chunk in _chunks(names, [0] * len(names)):
            pipe = self._client.pipeline(transaction=False)
            for i in chunk:
                pipe.strlen(names[i])
                if self._ttl_s:
                    pipe.expire(names[i], self._ttl_s)
            answers = self._run(pipe)[:: 2 if self._ttl_s else 1]
            found += [not _is_strange(one) and one > 0 for one in answers]
        return found

    def get(self, names: Sequence[bytes], most_bytes: int) -> list[bytes | memoryview | None]:
        """The values' bytes; a value of another type comes as no bytes."""
        found: list[bytes | memoryview | None] = []
        for chunk in _chunks(names, [most_bytes] * len(names)):
            pipe = self._client.pipeline(transaction=False)
            for i in chunk:
                pipe.getrange(names[i], 0, most_bytes)
            for one in self._run(pipe):
                # GETRANGE answers no bytes for no value; ours are never empty.
                found.append(b"" if _is_strange(one) else one or None)
        return found

    def put(self, names: Sequence[bytes], values: Sequence[Bytes]) -> list[bool]:
        """SET, which replaces what is there whole; False where the server's memory is full."""
        done: list[bool] = []
        for chunk in _chunks(names, [value.nbytes for value in values]):
            pipe = self._client.pipeline(transaction=False)
            for i in chunk:
                pipe.set(names[i], values[i].data, ex=self._ttl_s or None)
            for one in self._run(pipe):
                if isinstance(one, RedisError) and not isinstance(one, OutOfMemoryError):
                    raise OSError(f"the server refuses to store: {one}")
                done.append(one is True)
        return done

    def mark(self, name: bytes, new: bytes, *, replace: bool) -> bytes:
        """SET or SETNX, and what is there then."""
        pipe = self._client.pipeline(transaction=False)
        pipe.set(name, new, nx=not replace)
        pipe.getrange(name, 0, 64)
        wrote, found = self._run(pipe)
        if isinstance(found, bytes) and found:
            return found
        raise OSError(f"the server keeps no mark: {wrote}")

    def drop(self, names: Sequence[bytes]) -> None:
        """UNLINK: the server frees them beside its other work."""
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.unlink(name)
        self._run(pipe)

    def close(self) -> None:
        """Drops the connections."""
        if self._made is None:
            return
        with _as_oserror():
            if self._cluster:
                self._made.close()
            else:
                self._made.connection_pool.disconnect()

    def _run(self, pipe: Any) -> list[Any]:
        with _as_oserror():
            return list(pipe.execute(raise_on_error=False))


def _is_strange(answer: Any) -> bool:
    """Whether the name holds something else than bytes.

    Raises:
        OSError: any other error: the server is loading, read-only, wants a password.
    """
    if not isinstance(answer, RedisError):
        return False
    if isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
        return True
    raise OSError(f"{type(answer).__name__}: {answer}")


class _as_oserror:  # noqa: N801  a context manager, named as it reads
    """redis-py's errors as the tier knows them; its text names no password."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, redis.TimeoutError):
            raise TimeoutError(f"no answer in time: {error}") from error
        if isinstance(error, RedisError):
            raise OSError(f"{type(error).__name__}: {error}") from error


def _chunks(names: Sequence[bytes], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Which of them go in one pipeline."""
    chunk: list[int] = []
    n_bytes = 0
    for i in range(len(names)):
        if chunk and (n_bytes + sizes[i] > CHUNK_BYTES or len(chunk) >= CHUNK_NAMES):
            yield chunk
            chunk, n_bytes = [], 0
        chunk.append(i)
        n_bytes += sizes[i]
    if chunk:
        yield chunk
