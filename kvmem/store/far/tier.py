"""The far tier's bytes: blocks between the arena's slots and a store that many hosts share.

Threads of its own ask the store, check what comes and put it into slots; the caller, the engine's
scheduler, waits for none of them. Their queues are bounded (I7). A store that fails or does not
answer costs its hits and nothing else (I9): the tier is off then, with one event, what is queued
fails at once, and the store is tried again ever more rarely until blocks come back as they were.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np

from kvmem import events
from kvmem._core import SlotShares
from kvmem.store.arena import Arena
from kvmem.store.far.base import Bytes, FarStore, Unsupported
from kvmem.store.far.value import Head, head_bytes, name_of, prefix_of, read_head
from kvmem.types import Move, Moved, Probed

__all__ = ["Far"]

THREADS = 3
RETRY_S = 5.0
RETRY_MOST_S = 300.0
# Writes that wait hold the host's slots: at most a quarter of them, where there are many.
QUEUE_LEAST, QUEUE_PART = 256, 4
QUEUED_PROBES = 64
BATCH_BYTES = 8 << 20
# How old the mark may be under which blocks are looked for: so long after another engine has
# forgotten a namespace its blocks may still answer here.
MARK_S = 1.0
TELL_S = 2.0  # at the end, for a store that is to be told what to forget
# A store without room is not written to for so long.
FULL_S = 5.0
SLOW_SHARE = 0.2  # of the newest measurement in what is remembered

SOURCE, RECORD, IO, ROOM, GONE = "source", "record", "io", "room", "gone"
_PUT_FAULTS = {0: "", 1: SOURCE, 2: SOURCE, 3: RECORD, 4: RECORD}


class _Probe(msgspec.Struct, frozen=True):
    ticket: int
    group: int
    keys: list[bytes]


class _Batch(msgspec.Struct, frozen=True):
    """Moves that go together: to the store or, where not `down`, from it."""

    moves: list[Move]
    down: bool
    forgets: int  # how often all had been forgotten when they were begun


class _Tell(msgspec.Struct, frozen=True):
    """The store is told that all is forgotten."""


_Job = _Probe | _Batch | _Tell


class Far:
    """See the module; `close` ends it.

    Args:
        make_store: connects; called in a thread of the tier, again after a failure.
        arena: whose slots the blocks come from and go to.
        namespace: 32 bytes; blocks are valid inside it only.
        bus: where it is told that the store failed, or works again.
        label: the store's name for people.
        clock: seconds, for when a store that failed is tried again.
        n_threads: how many batches are under way at most.
    """

    def __init__(
        self,
        make_store: Callable[[], FarStore],
        arena: Arena,
        namespace: bytes,
        bus: events.Bus,
        *,
        label: str = "",
        clock: Callable[[], float] = time.monotonic,
        n_threads: int = THREADS,
    ) -> None:
        self.label = label
        self._make_store = make_store
        self._store: FarStore | None = None
        self._namespace = namespace
        self._bus = bus
        self._clock = clock
        self._ranks = arena.header.ranks
        self._share_bytes = arena.header.slot_bytes
        self._most = head_bytes(self._ranks) + self._ranks * self._share_bytes
        self._batch = max(1, BATCH_BYTES // self._most)
        self._queue = max(QUEUE_LEAST, arena.header.n_slots // QUEUE_PART)
        self._arena = arena
        self._data = np.frombuffer(arena.buffer, np.uint8)
        self._shares = SlotShares(self._data)
        self._own = threading.local()
        # Guarded by _lock, which is never held while the store is asked.
        self._lock = threading.Condition()
        self._probes: deque[_Probe] = deque()
        self._reads: deque[Move] = deque()
        self._writes: deque[Move] = deque()
        self._forced: set[bytes] = set()  # stored anew, whatever is there
        self._over: list[Moved | Probed] = []
        self._error = ""  # what failed since `poll`
        self._writing = 0
        self._telling = False
        self._closed = False
        self._mark = b""
        self._marked_s = float("-inf")
        self._forget = False
        self._forgets = 0
        self._version = 0  # rises when what was known of the store is void
        self._is_on = False
        self._full_until_s = float("-inf")
        self._rtt_s: float | None = None
        self._bytes_s: float | None = None
        # The scheduler's thread only.
        self._off_since_s: float | None = None
        self._retry_s = RETRY_S
        self._retry_at_s = float("-inf")
        self._never = False
        self._trying = threading.Lock()  # held while it is tried whether it works
        self._trial: Future[str] | None = None
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="kvmem-far-trial")
        self._threads = [
            threading.Thread(target=self._run, name=f"kvmem-far-{i}", daemon=True)
            for i in range(max(2, n_threads))
        ]
        for thread in self._threads:
            thread.start()
        self.on  # noqa: B018  the first trial begins now

    # -- what kvmem.cache asks ---------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Bytes of a value, at most."""
        return self._most

    @property
    def version(self) -> int:
        """Rises when what was answered of the store is void: it was emptied by somebody."""
        return self._version

    @property
    def on(self) -> bool:
        """Whether the store works, as far as is known; it is tried when it is time for that."""
        if not self._error and (self._is_on or self._never or self._closed):
            return self._is_on
        if not self._trying.acquire(blocking=False):
            return False  # who looks at an engine asks too, from a thread of its own
        try:
            return self._tried()
        finally:
            self._trying.release()

    def _tried(self) -> bool:
        if self._error:
            self._notice()
        if self._is_on or self._never or self._closed:
            return self._is_on
        now = self._clock()
        if self._trial is None:
            if now >= self._retry_at_s:
                self._trial = self._aside.submit(self._try)
            return False
        if not self._trial.done():
            return False
        error, self._trial = self._trial.result(), None
        if error:
            self._failed(error)
            self._retry_s = min(RETRY_MOST_S, 2 * self._retry_s)
            return False
        self._bus.emit(events.Proof(tier="far", error=""))
        if self._off_since_s is not None:
            self._bus.emit(events.TierOn(tier="far", seconds=now - self._off_since_s))
        self._off_since_s, self._retry_s = None, RETRY_S
        with self._lock:
            self._is_on = True
        return True

    def seconds_for(self, n_bytes: int) -> float | None:
        """How long so many bytes take from asking for them until they are here, as measured."""
        if self._rtt_s is None or self._bytes_s is None:
            return None
        return self._rtt_s + n_bytes / self._bytes_s

    def probe(self, ticket: int, group: int, keys: Sequence[bytes]) -> bool:
        """Begins to ask which of these blocks are there; False where the queue is full."""
        return self._begin(
            self._probes, _Probe(ticket, group, [bytes(key) for key in keys]), QUEUED_PROBES
        )

    def read(self, move: Move) -> bool:
        """Begins a copy into a slot; False where the queue is full."""
        return self._begin(self._reads, move, self._queue)

    def write(self, move: Move, *, force: bool = False) -> bool:
        """Begins a copy of a slot to the store, where it has none yet or with `force` always."""
        with self._lock:
            if self._clock() < self._full_until_s:
                return False
            if force and len(self._forced) < self._queue:
                self._forced.add(move.key)
        return self._begin(self._writes, move, self._queue)

    def _begin(self, queue: deque[Any], job: _Probe | Move, most: int) -> bool:
        with self._lock:
            if self._closed or not self._is_on or len(queue) >= most:
                return False
            queue.append(job)
            self._lock.notify()
            return True

    def poll(self) -> list[Moved | Probed]:
        """What is over."""
        self._notice()
        with self._lock:
            over, self._over = self._over, []
        return over

    def wait(self, seconds: float, n: int = 1) -> None:
        """Returns when n of them are over that `poll` has not told, or after so long."""
        with self._lock:
            self._lock.wait_for(lambda: len(self._over) >= n, seconds)

    def too_slow(self, seconds: float) -> None:
        """A read took so long: the store hangs, or has more to do than it can."""
        self._failed(f"no answer in {seconds:.1f} s")

    def forget(self) -> None:
        """Nothing that the namespace has in the store answers any more, for any host.

        From now on here, for others within a second of the store being told, which a thread does at
        once where the tier is on. Until it was told nothing is asked of it.
        """
        with self._lock:
            self._forget = True
            self._forgets += 1
            self._version += 1
            self._marked_s = float("-inf")
            # What was to be stored is what is to be forgotten.
            self._over += [Moved(move.ticket, GONE) for move in (*self._reads, *self._writes)]
            self._reads.clear()
            self._writes.clear()
            self._forced.clear()
            self._lock.notify_all()

    def close(self) -> None:
        """Ends what is under way; what is queued is lost, but for what is to be forgotten: the
        store is told, or a failure is, since other hosts go on finding it."""
        with self._lock:
            self._lock.wait_for(lambda: not (self._forget and self._is_on), TELL_S)
            untold = self._forget
            self._closed, self._is_on = True, False
            self._lock.notify_all()
            store = self._store
        if untold:
            error = "the store was not told what to forget: reset another engine when it is back"
            self._bus.emit(events.Failure(where="far.forget", error=error))
        self._aside.shutdown(wait=False, cancel_futures=True)
        if store is not None:
            try:
                store.close()
            except OSError as error:
                self._bus.emit(events.Failure(where="far.close", error=str(error)))
        for thread in self._threads:
            thread.join(timeout=5.0)

    # -- a store that fails ------------------------------------------------------------------

    def _notice(self) -> None:
        """Takes in what failed in the threads."""
        with self._lock:
            error, self._error = self._error, ""
        if error:
            self._failed(error)

    def _failed(self, error: str) -> None:
        """From now on there is no far tier, until it is tried again."""
        now = self._clock()
        self._retry_at_s = now + self._retry_s
        with self._lock:
            self._is_on = False
            self._version += 1
            self._lock.notify_all()  # what is queued fails at once
        if self._off_since_s is None:
            self._off_since_s = now
            self._bus.emit(events.TierOff(tier="far", error=error))

    def _try(self) -> str:
        """Whether a value as large as a block comes back as it was; empty, or what went wrong."""
        try:
            store = self._connected()
            self._look_at_mark(store)
            name = name_of(self._namespace, b"proof", 0, os.urandom(32))
            value = np.frombuffer(os.urandom(min(self._most, BATCH_BYTES)), np.uint8)
            begun = time.monotonic()
            if store.exists([name]) != [False]:
                return "its proof failed: a value that nobody stored is there"
            rtt_s = time.monotonic() - begun
            if store.put([name], [[value]]) != [True]:
                self._full_until_s = self._clock() + FULL_S
                return ""  # full: what it has can be read
            room = np.zeros(len(value), np.uint8)
            begun = time.monotonic()
            found = store.get([name], [room])
            get_s = time.monotonic() - begun
            store.drop([name])
        except OSError as error:
            return str(error) or type(error).__name__
        except Exception as error:  # noqa: BLE001  a client's own bug must not end the tier's trials (I9)
            self._bus.emit(events.Failure(where="far.try", error=repr(error)))
            return repr(error)
        if found != [len(value)] or room.tobytes() != value.tobytes():
            return "its proof failed: a value came back changed"
        self._rtt_s = rtt_s
        self._bytes_s = len(value) / max(get_s - rtt_s, get_s / 2, 1e-9)
        return ""

    def _connected(self) -> FarStore:
        if self._store is None:
            made = self._make_store()
            made.sized(self._most)
            with self._lock:
                self._store = made
        return self._store

    def _look_at_mark(self, store: FarStore) -> tuple[bytes, int]:
        """Under which mark the namespace's blocks are now, a new one where all was forgotten; and
        how often it was."""
        with self._lock:
            now = self._clock()
            if self._mark and now - self._marked_s < MARK_S:
                return self._mark, self._forgets
            forget, forgets = self._forget, self._forgets
        name = b"kvmem:1:%b:mark" % self._namespace.hex().encode()
        try:
            mark = store.mark(name, os.urandom(8), replace=forget)
        except Unsupported as error:
            # It can't be told what to forget: nothing of it may answer (I5).
            self._never = True
            raise OSError(f"it can't forget, so it is off until the next start: {error}") from error
        with self._lock:
            if self._forgets != forgets:
                return mark, forgets  # of before all was forgotten: what waits for it is dropped
            if forget:
                self._forget = False
            if mark != self._mark:
                self._mark = mark
                self._version += 1
            if not self._forget:
                self._marked_s = now
            return mark, forgets

    # -- the threads -------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(self._has_job)
                if self._closed:
                    return
                job = self._take()
            try:
                over = self._do(job)
                error = ""
            except OSError as failure:
                over, error = _all_failed(job), str(failure) or type(failure).__name__
            except Exception as failure:  # noqa: BLE001  a thread that ends would leave requests waiting (I9)
                over, error = _all_failed(job), repr(failure)
                self._bus.emit(events.Failure(where="far", error=repr(failure)))
            with self._lock:
                if isinstance(job, _Batch) and job.down:
                    self._writing -= 1
                if isinstance(job, _Tell):
                    self._telling = False
                self._over += over
                self._error = self._error or error
                if error:
                    self._is_on = False
                self._lock.notify_all()

    def _has_job(self) -> bool:
        # One thread at most writes, so that a read never waits for all of them.
        writes = self._writes and (self._writing < len(self._threads) - 1 or not self._is_on)
        return bool(self._closed or self._tells() or self._probes or self._reads or writes)

    def _tells(self) -> bool:
        """Whether the store is to be told to forget, and no thread does it."""
        return self._forget and self._is_on and not self._telling

    def _take(self) -> _Job:
        if self._tells():
            self._telling = True
            return _Tell()
        if self._probes:
            return self._probes.popleft()
        down = not self._reads
        queue = self._writes if down else self._reads
        self._writing += down
        # The queue's share of each thread, so that they end together.
        n = min(self._batch, max(1, -(-len(queue) // len(self._threads))))
        return _Batch([queue.popleft() for _ in range(n)], down, self._forgets)

    def _do(self, job: _Job) -> list[Moved | Probed]:
        if not self._is_on:
            return _all_failed(job)
        store = self._connected()
        version = self._version
        mark, forgets = self._look_at_mark(store)
        if isinstance(job, _Tell):
            return []
        prefix = prefix_of(self._namespace, mark)
        if isinstance(job, _Probe):
            names = [b"%b%d:%b" % (prefix, job.group, key.hex().encode()) for key in job.keys]
            begun = time.monotonic()
            found = store.exists(names)
            self._rtt_s = _newer(self._rtt_s, time.monotonic() - begun)
            return [Probed(job.ticket, tuple(found), version)]
        if forgets != job.forgets:  # blocks from before must not be stored under the new mark
            return [Moved(move.ticket, GONE) for move in job.moves]
        names = [b"%b%d:%b" % (prefix, one.group, one.key.hex().encode()) for one in job.moves]
        if job.down:
            return self._store_all(store, job.moves, names)
        return self._fetch_all(store, job.moves, names)

    def _fetch_all(
        self, store: FarStore, moves: list[Move], names: list[bytes]
    ) -> list[Moved | Probed]:
        rooms = list(self._room(len(moves)))
        begun = time.monotonic()
        sizes = store.get(names, rooms)
        io_s = time.monotonic() - begun
        over: list[Moved | Probed] = []
        n_bytes = 0
        for move, room, size in zip(moves, rooms, sizes, strict=True):
            n_bytes += max(0, size)
            if size < 0:
                fault, checksum = GONE, 0
            elif size > len(room):  # I7
                fault, checksum = RECORD, 0
            else:
                fault, checksum = self._check_in(move, room[:size])
            right = 0 if fault else size
            over.append(Moved(move.ticket, fault, checksum, right, io_s=io_s / len(moves)))
        rest_s = io_s - (self._rtt_s or 0.0)
        if n_bytes and rest_s > 0:
            self._bytes_s = _newer(self._bytes_s, n_bytes / max(rest_s, io_s / 2))
        return over

    def _check_in(self, move: Move, value: Bytes) -> tuple[str, int]:
        """Puts a value into its slot, where it is the block that was asked for (I1, I5, I10)."""
        head = read_head(
            value,
            move,
            namespace=self._namespace,
            ranks=self._ranks,
            most=self._share_bytes,
        )
        if isinstance(head, str) or head.approximate:
            return RECORD, 0
        sums = np.array(head.sums, np.uint64)
        status = self._shares.put(
            move.slot, move.slot_generation, move.group, move.key,
            value[head_bytes(self._ranks) :], sums,
        )  # fmt: skip
        return _PUT_FAULTS[status], int(np.bitwise_xor.reduce(sums))

    def _store_all(
        self, store: FarStore, moves: list[Move], names: list[bytes]
    ) -> list[Moved | Probed]:
        with self._lock:
            forced = {move.key for move in moves} & self._forced
            self._forced -= forced
        asked = [name for move, name in zip(moves, names, strict=True) if move.key not in forced]
        there = dict(zip(asked, store.exists(asked) if asked else (), strict=True))
        over: dict[int, Moved] = {}
        chosen: list[tuple[Move, bytes, list[Bytes | bytes]]] = []
        for move, name in zip(moves, names, strict=True):
            if there.get(name):
                over[move.ticket] = Moved(move.ticket, "")
                continue
            fault, value = self._look(move)
            if fault:
                over[move.ticket] = Moved(move.ticket, fault)
            else:
                chosen.append((move, name, value))
        begun = time.monotonic()
        done = store.put([name for _, name, _ in chosen], [value for _, _, value in chosen])
        io_s = time.monotonic() - begun
        for (move, _, value), is_done in zip(chosen, done, strict=True):
            fault = "" if is_done else ROOM
            if is_done and self._look(move)[0]:  # A2: it moved on while it was sent
                fault = SOURCE
            over[move.ticket] = Moved(
                move.ticket, fault, bytes=0 if fault else sum(len(part) for part in value),
                io_s=io_s / len(chosen),
            )  # fmt: skip
        if not all(done):
            self._full_until_s = self._clock() + FULL_S
        return [over[move.ticket] for move in moves]

    def _room(self, n: int) -> Bytes:
        """This thread's own, for n values side by side."""
        rows: Bytes | None = getattr(self._own, "rows", None)
        if rows is None or len(rows) < n:
            rows = self._own.rows = np.empty((n, self._most), np.uint8)
        return rows[:n]

    def _look(self, move: Move) -> tuple[str, list[Bytes | bytes]]:
        """The value of a slot's block, where it lies: its bytes are sent with the checksums that
        they were stored with, and compared by who fetches them (I5)."""
        status, share_bytes, sums = self._shares.look(
            move.slot, move.slot_generation, move.group, move.key
        )
        if status:
            return SOURCE, []
        head = Head(
            namespace=self._namespace,
            key=move.key,
            parent=move.parent,
            group=move.group,
            share_bytes=share_bytes,
            sums=tuple(sums.tolist()),
        )
        starts = [self._arena.data_of(move.slot, rank) for rank in range(self._ranks)]
        return "", [head.encode(), *(self._data[at : at + share_bytes] for at in starts)]


def _all_failed(job: _Job) -> list[Moved | Probed]:
    if isinstance(job, _Tell):
        return []
    if isinstance(job, _Probe):
        return [Probed(job.ticket, (False,) * len(job.keys), -1)]
    return [Moved(move.ticket, IO) for move in job.moves]


def _newer(known: float | None, now: float) -> float:
    return now if known is None else (1 - SLOW_SHARE) * known + SLOW_SHARE * now
