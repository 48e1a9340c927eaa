"""An L2 adapter of LMCache as a far store: a folder, Valkey, S3, Mooncake Store and others.

LMCache makes the adapter (`create_l2_adapter`); what goes through it has kvmem's own head and
checksums. A value is looked up before it is loaded, as some adapters wait for ever for one that is
not there, and each call has its time. LMCache gives an object's size to whoever loads it, so that
all values are stored with the size of the longest, their own in front. One batch is under way at a
time: the adapters have threads of their own. Needs LMCache's environment (docs/far.md).
"""

from __future__ import annotations

import hashlib
import select
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kvmem.errors import ConfigError
from kvmem.store.far.base import Bytes, Unsupported

__all__ = ["LMCacheStore"]

MODEL = "kvmem"
MARK_BYTES = 4096
ALIGN_BYTES = 4096
# Its native client waits for ever for a value that is not there.
REFUSED = ("resp",)
_SIZE = struct.Struct("<Q")


class LMCacheStore:
    """See `kvmem.store.far.FarStore`.

    Args:
        config: what `--l2-adapter` takes, "type" and the adapter's own fields.
        timeout_s: for each batch.

    Raises:
        ConfigError: LMCache has no such adapter, or refuses its fields.
        OSError: it can't be made: its server is away, its library not installed.
    """

    def __init__(self, config: Mapping[str, Any], *, timeout_s: float = 10.0) -> None:
        from lmcache.v1.distributed.l2_adapters import create_l2_adapter
        from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class

        kind = str(config["type"])
        fields = {name: value for name, value in config.items() if name != "type"}
        try:
            if kind in REFUSED:
                raise ValueError("its client waits for ever for a value that is not there")
            made = get_l2_adapter_config_class(kind).from_dict(fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"kvmem's setting 'far': LMCache's adapter {kind!r} can't be used: {error}",
                next_step="See docs/far.md, or LMCache's page on its L2 adapters.",
                setting="far",
            ) from error
        try:
            self._adapter = create_l2_adapter(made)
        except (RuntimeError, ImportError, ValueError) as error:
            raise OSError(f"LMCache's adapter {kind!r}: {error}") from error
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._value_bytes = 0
        self._stuck = ""  # a call that did not end still has its memory
        self._kept: list[Any] = []
        self._closed = False

    def sized(self, most_bytes: int) -> None:
        """All objects get this size, up to a multiple of a page."""
        self._value_bytes = -(-(most_bytes + _SIZE.size) // ALIGN_BYTES) * ALIGN_BYTES

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        """Whether they are there; what the adapter locks for that is let go of."""
        with self._lock:
            return self._exists([_key(name) for name in names], self._value_bytes)

    def get(self, names: Sequence[bytes], rooms: Sequence[Bytes]) -> list[int]:
        """Looks them up first, and copies what came out of the adapter's memory."""
        with self._lock:
            found = self._load([_key(name) for name in names], self._value_bytes)
        sizes = []
        for value, room in zip(found, rooms, strict=True):
            if value is None:
                sizes.append(-1)
                continue
            (size,) = _SIZE.unpack_from(value.data)
            if size <= min(len(room), len(value) - _SIZE.size):
                room[:size] = value[_SIZE.size :][:size]
            else:
                size = len(room) + 1  # no value of ours
            sizes.append(size)
        return sizes

    def put(self, names: Sequence[bytes], values: Sequence[Sequence[Bytes | bytes]]) -> list[bool]:
        """Replaces what is there. An adapter says of a batch only whether all of it was stored."""
        if not names:
            return []
        with self._lock:
            keys = [_key(name) for name in names]
            # Some adapters keep what they have.
            there = self._exists(keys, self._value_bytes)
            self._adapter.delete(
                [key for key, is_there in zip(keys, there, strict=True) if is_there]
            )
            done = self._store(keys, [_padded(value, self._value_bytes) for value in values])
        return [done] * len(names)

    def mark(self, name: bytes, new: bytes, *, replace: bool) -> bytes:
        """Looked up, stored where it is not there, and read."""
        key = _key(name)
        with self._lock:
            (there,) = self._exists([key], MARK_BYTES)
            if there and replace:
                self._adapter.delete([key])
                (there,) = self._exists([key], MARK_BYTES)
                if there:
                    raise Unsupported("this adapter of LMCache removes nothing")
            if not there:
                self._store([key], [_padded([new], MARK_BYTES)])
            (value,) = self._load([key], MARK_BYTES)
        if value is None:
            raise OSError("the store keeps no mark")
        (size,) = _SIZE.unpack_from(value.data)
        return value[_SIZE.size :][: min(size, 64)].tobytes()

    def drop(self, names: Sequence[bytes]) -> None:
        """What the adapter can remove is removed."""
        with self._lock:
            self._adapter.delete([_key(name) for name in names])

    def close(self) -> None:
        """Ends the adapter, unless a call hangs in it."""
        self._closed = True
        if self._lock.acquire(timeout=self._timeout_s):
            try:
                if not self._stuck:
                    self._adapter.close()
            finally:
                self._lock.release()

    # -- one batch at a time; _lock is held --------------------------------------------------

    def _exists(self, keys: list[Any], n_bytes: int) -> list[bool]:
        if not keys:
            return []
        import torch
        from lmcache.v1.distributed.api import MemoryLayoutDesc

        layout = MemoryLayoutDesc(shapes=[torch.Size([n_bytes])], dtypes=[torch.uint8])
        self._check()
        task = self._adapter.submit_lookup_and_lock_task(keys, {0: layout})
        found = self._wait(
            self._adapter.get_lookup_and_lock_event_fd(),
            lambda: self._adapter.query_lookup_and_lock_result(task),
            keys,
        )
        there = [bool(found.test(i)) for i in range(len(keys))]
        self._adapter.submit_unlock(
            [key for key, is_there in zip(keys, there, strict=True) if is_there]
        )
        return there

    def _load(self, keys: list[Any], n_bytes: int) -> list[Bytes | None]:
        there = self._exists(keys, n_bytes)
        wanted = _chosen(keys, there)
        if not wanted:
            return [None] * len(keys)
        arrays = list(np.zeros((len(wanted), n_bytes), np.uint8))
        objects = [_object(array) for array in arrays]
        self._check()
        task = self._adapter.submit_load_task(wanted, objects)
        found = self._wait(
            self._adapter.get_load_event_fd(),
            lambda: self._adapter.query_load_result(task),
            (arrays, objects),
        )
        came = iter([array if found.test(i) else None for i, array in enumerate(arrays)])
        return [next(came) if is_there else None for is_there in there]

    def _store(self, keys: list[Any], arrays: list[Bytes]) -> bool:
        objects = [_object(array) for array in arrays]
        self._check()
        task = self._adapter.submit_store_task(keys, objects)
        done = self._wait(
            self._adapter.get_store_event_fd(),
            lambda: self._adapter.pop_completed_store_tasks().get(task),
            (arrays, objects),
        )
        return bool(done.is_successful())

    def _check(self) -> None:
        if self._stuck or self._closed:
            raise OSError(self._stuck or "the store is closed")

    def _wait(self, fd: int, ask: Callable[[], Any], memory: Any) -> Any:
        """The call's result; after its time its memory stays the adapter's, and nothing more is
        asked of it."""
        from lmcache.v1.platform import consume_fd

        poll = select.poll()
        poll.register(fd, select.POLLIN)
        until_s = time.monotonic() + self._timeout_s
        while True:
            found = ask()
            if found is not None:
                return found
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                self._kept.append(memory)
                self._stuck = f"LMCache's adapter did not answer in {self._timeout_s:g} s"
                raise TimeoutError(self._stuck)
            if poll.poll(left_s * 1e3):
                consume_fd(fd)


def _key(name: bytes) -> Any:
    from lmcache.v1.distributed.api import ObjectKey

    return ObjectKey(chunk_hash=hashlib.sha256(name).digest(), model_name=MODEL, kv_rank=0)


def _chosen(keys: Sequence[Any], are: Sequence[bool]) -> list[Any]:
    return [key for key, is_so in zip(keys, are, strict=True) if is_so]


def _padded(parts: Sequence[Bytes | bytes], n_bytes: int) -> Bytes:
    size = sum(len(part) for part in parts)
    if size > n_bytes - _SIZE.size:
        raise OSError(f"a value of {size:,} bytes is longer than {n_bytes:,}")
    value = np.zeros(n_bytes, np.uint8)
    value[: _SIZE.size] = np.frombuffer(_SIZE.pack(size), np.uint8)
    at = _SIZE.size
    for part in parts:
        value[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    return value


def _object(array: Bytes) -> Any:
    import torch
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    metadata = MemoryObjMetadata(
        shape=torch.Size([len(array)]), dtype=torch.uint8, address=0, phy_size=len(array),
        fmt=MemoryFormat.KV_2LTD, ref_count=1,
    )  # fmt: skip
    return TensorMemoryObj(
        raw_data=torch.from_numpy(array), metadata=metadata, parent_allocator=None
    )
