"""kvmem's disk tier as an L2 adapter of LMCache: bounded, checked at every read, over restarts.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "kvmem.engines.lmcache_l2",
        "class_name": "KvmemL2Adapter",
        "adapter_params": {"path": "/fast/disk", "disk_gb": 100, "object_mb": 2}}'

An object of LMCache is a block that stands by itself, its key the SHA-256 of LMCache's own. One
thread owns the `Cache`: it copies objects into slots of a small arena and out of it, the disk's
threads do the rest. Needs LMCache's environment (docs/far.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from kvmem import events
from kvmem._core import SlotShares, xxh3_64
from kvmem.cache import Cache
from kvmem.errors import ConfigError
from kvmem.store import Arena, Disk
from kvmem.store.layout import slots_within
from kvmem.types import GroupShape

__all__ = ["KvmemL2Adapter"]

GIB, MIB = 1 << 30, 1 << 20
PARAMS = {"path": None, "disk_gb": None, "object_mb": None, "host_gb": 0.25}
TOKENS = 16  # of a block, to the cache; LMCache's objects have none
SETTLE_S = 1.0
TRIES = 60  # of a second each, until a batch is on the disk or from it
LEAST_SLOTS = 8


class KvmemL2Adapter(L2AdapterInterface):
    """See the module.

    Args:
        params: `path` and `disk_gb` as kvmem's settings disk_path and disk_gb; `object_mb`, the
            size of the largest object in MiB; `host_gb` of shared memory to move them through.
        l1_memory_desc: LMCache's own memory, which is not needed.

    Raises:
        ConfigError, CapacityError: naming what can't be.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        self._params = _checked(params)
        super().__init__(max_capacity_bytes=int(self._params["disk_gb"] * GIB))
        self._object_bytes = int(self._params["object_mb"] * MIB)
        n_slots = slots_within(int(self._params["host_gb"] * GIB), self._object_bytes)
        if n_slots < LEAST_SLOTS:
            raise ConfigError(
                f"kvmem's host_gb of {self._params['host_gb']} holds {n_slots} objects of "
                f"{self._object_bytes:,} bytes",
                next_step="Raise host_gb, or lower object_mb to what LMCache's chunks have.",
                setting="host_gb",
            )
        namespace = hashlib.sha256(f"lmcache {self._object_bytes}".encode()).digest()
        self._bus = events.Bus()
        self._arena = Arena.create(
            f"lmcache-{os.getpid()}", n_slots=n_slots, slot_bytes=self._object_bytes,
            namespace=namespace, label="lmcache",
        )  # fmt: skip
        try:
            self._disk = Disk(
                Path(self._params["path"]).expanduser(), int(self._params["disk_gb"] * GIB),
                self._arena, namespace, self._bus,
            )  # fmt: skip
        except BaseException:
            self._arena.close(unlink=True)
            raise
        self._data = np.frombuffer(self._arena.buffer, np.uint8)
        self._shares = SlotShares(self._data)
        self._cache = Cache(n_slots, (GroupShape(TOKENS, 1),), bus=self._bus, mover=self._disk)
        self._store_fd = create_event_notifier()
        self._lookup_fd = create_event_notifier()
        self._load_fd = create_event_notifier()
        self._lock = threading.Lock()
        self._next = 0  # guarded by _lock, as what follows
        self._stored: dict[int, Any] = {}
        self._found: dict[int, Any] = {}
        self._loaded: dict[int, Any] = {}
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="kvmem-lmcache", daemon=True)
        self._thread.start()

    # -- LMCache's interface -----------------------------------------------------------------

    def get_store_event_fd(self) -> int:
        """Readable when a store is over."""
        return int(self._store_fd.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a lookup is over."""
        return int(self._lookup_fd.fileno())

    def get_load_event_fd(self) -> int:
        """Readable when a load is over."""
        return int(self._load_fd.fileno())

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Begins to store objects; see `pop_completed_store_tasks`."""

        def store() -> Any:
            n_bytes = self._store(keys, objects)
            return L2StoreResult(n_bytes is not None, n_bytes or 0)

        return self._begin(store, self._stored, self._store_fd, L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """The results of stores that are over: whether every object of a task is on the disk."""
        with self._lock:
            done, kept = dict(self._stored), self._stored
            kept.clear()
            return done

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Any) -> int:
        """Begins to look objects up. What is found may still be evicted: a load may fail."""

        def look() -> Any:
            found = Bitmap(len(keys))
            for i, key in enumerate(keys):
                if self._cache.fate(0, _key(key)) in ("published", "demoted"):
                    found.set(i)
            return found

        return self._begin(look, self._found, self._lookup_fd, Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """Which of them are there, told once; None before that."""
        with self._lock:
            return self._found.pop(task_id, None)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Nothing is locked."""

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Begins to load objects into the caller's memory; see `query_load_result`."""

        def load() -> Any:
            found = Bitmap(len(keys))
            for i, (key, value) in enumerate(zip(keys, objects, strict=True)):
                if self._load(_key(key), np.frombuffer(value.byte_array, np.uint8), f"{i}"):
                    found.set(i)
            return found

        return self._begin(load, self._loaded, self._load_fd, Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Any:
        """Which of them were loaded whole, told once; None before that."""
        with self._lock:
            return self._loaded.pop(task_id, None)

    def report_status(self) -> dict[str, Any]:
        """Whether the disk works, and its counts."""
        return {"is_healthy": bool(self._disk.on), "type": "kvmem", "path": self._params["path"]}

    def close(self) -> None:
        """Ends what is queued and lets go of the folder."""
        self._jobs.put(None)
        self._thread.join()
        self._disk.close()
        for fd in (self._store_fd, self._lookup_fd, self._load_fd):
            fd.close()
        self._arena.close(unlink=True)

    # -- the thread that owns the cache ------------------------------------------------------

    def _begin(self, do: Callable[[], Any], results: dict[int, Any], fd: Any, failed: Any) -> int:
        with self._lock:
            task = self._next
            self._next += 1

        def job() -> None:
            result = failed
            try:
                result = do()
            finally:
                with self._lock:
                    results[task] = result
                fd.notify()

        self._jobs.put(job)
        return task

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001  LMCache was told of a miss; the thread goes on
                self._bus.emit(events.Failure(where="lmcache", error=repr(error)))

    def _store(self, keys: list[Any], objects: list[Any]) -> int | None:
        """Bytes that are on the disk now, None where not all of them are."""
        wanted = [_key(key) for key in keys]
        n_bytes = 0
        for key, value in zip(wanted, objects, strict=True):
            data = np.frombuffer(value.byte_array, np.uint8)
            n_bytes += len(data)
            if self._cache.fate(0, key) != "demoted" and not self._put(key, data):
                return None
        self._rest()
        kept = all(self._cache.fate(0, key) in ("published", "demoted") for key in wanted)
        return n_bytes if kept and self._disk.on else None

    def _put(self, key: bytes, data: np.ndarray[Any, Any]) -> bool:
        if not 0 < len(data) <= self._object_bytes:
            return False
        for _ in range(TRIES):
            room = self._cache.reserve("store", 0, [key], [0])
            if len(room.slots):
                break
            if not room.refused:  # it is here
                self._cache.demote(0, [key], [0])
                return True
            self._cache.settle(SETTLE_S)
        else:
            return False
        sums = np.array([xxh3_64(data.data)], np.uint64)
        status = self._shares.put(int(room.slots[0]), int(room.generations[0]), 0, key, data, sums)
        if status:
            self._cache.abandon(room.slots, room.generations)
            return False
        self._cache.publish(room.slots, room.generations, sums)
        self._cache.demote(0, [key], [0])
        self._cache.settle()
        return True

    def _rest(self) -> None:
        for _ in range(TRIES):
            if not self._cache.stats()["disk"]["under_way"]:
                return
            self._cache.settle(SETTLE_S)

    def _load(self, key: bytes, out: np.ndarray[Any, Any], who: str) -> bool:
        """Whether `out` has the object, whole (I1, I5)."""
        with contextlib.ExitStack() as after:
            after.callback(self._cache.release, who)
            grant = self._cache.acquire(who, [[key]], start=0, limit=TOKENS)
            while grant.coming:
                self._cache.settle(SETTLE_S)
                grant = self._cache.acquire(who, [[key]], start=0, limit=TOKENS)
            if not grant.parts:
                return False
            slot, generation = int(grant.parts[0].slots[0]), int(grant.parts[0].generations[0])
            status, size, sums = self._shares.look(slot, generation, 0, key)
            if status or size != len(out):
                return False
            at = self._arena.data_of(slot)
            out[:] = self._data[at : at + size]
            if xxh3_64(out.data) != int(sums[0]):
                self._cache.quarantine(slot, generation, key=key, reason="checksum")
                return False
            return True


def _key(key: Any) -> bytes:
    text = f"{key.model_name}@{key.kv_rank}@{key.object_group_id}@{key.chunk_hash.hex()}"
    return hashlib.sha256(f"{text}@{key.cache_salt}".encode()).digest()


def _checked(params: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(params) - set(PARAMS))
    missing = sorted(name for name, value in PARAMS.items() if value is None and name not in params)
    if unknown or missing:
        name = (unknown or missing)[0]
        raise ConfigError(
            f"kvmem's adapter for LMCache {'has no' if unknown else 'needs'} parameter {name!r}",
            next_step=f"Known: {', '.join(PARAMS)}.",
            setting=name,
        )
    for name in ("disk_gb", "object_mb", "host_gb"):
        value = params.get(name, PARAMS[name])
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError(
                f"kvmem's adapter for LMCache can't have {name}={value!r}",
                next_step="Give a number above 0.",
                setting=name,
            )
    return {**{name: value for name, value in PARAMS.items() if value is not None}, **params}
