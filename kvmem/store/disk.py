"""The disk tier's bytes: moves that the native store makes and checks, and when there is no disk.

A failing disk costs its hits and nothing else (I9): after a failed operation the tier is off, with
one event, and is tried again ever more rarely until the disk works. What may take long, or for ever
on a disk that hangs, is done on a thread of its own: the caller is the engine's scheduler.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvmem import events
from kvmem._core import DiskStore
from kvmem.errors import CapacityError, ConfigError
from kvmem.store.arena import Arena
from kvmem.store.disk_proof import prove
from kvmem.store.folders import TABLE, claim, start_anew, trim
from kvmem.types import Move, Moved, Recovered

__all__ = ["Disk"]

FAULTS = ("", "source", "record", "io", "room")  # by the native store's status
RETRY_S = 5.0
RETRY_MOST_S = 300.0
# Other models' stores are looked at each time so much was written.
TRIM_BYTES = 256 << 20
PROBE = "probe"
# Writes that wait hold the host's slots: at most a quarter of them, where there are many.
QUEUE_LEAST, QUEUE_PART = 256, 4
TRIES = 16  # of engines that start at the same moment, each is there before us once at most


class Disk:
    """One engine's store, in a folder of its own under `root`; `close` ends it.

    Args:
        root: the setting disk_path.
        disk_bytes: the setting disk_gb (I7).
        arena: whose slots the blocks come from and go to.
        namespace: 32 bytes; blocks are valid inside it only.
        bus: where it is told that the disk failed, or works again.
        codec: the setting disk_codec: blocks are stored shorter where that pays.
        clock: seconds, for when a disk that failed is tried again.
        faults, proof_faults: for tests, see csrc/disk/disk_io.h.

    Raises:
        ConfigError, CapacityError: the folder or the budget can't be used.
    """

    def __init__(
        self,
        root: Path,
        disk_bytes: int,
        arena: Arena,
        namespace: bytes,
        bus: events.Bus,
        *,
        codec: bool = True,
        clock: Callable[[], float] = time.monotonic,
        faults: str = "",
        proof_faults: str = "",
    ) -> None:
        self._like = arena.header
        self._proof_faults = proof_faults
        self._bytes = disk_bytes
        self._codec = codec
        self._queue = max(QUEUE_LEAST, arena.header.n_slots // QUEUE_PART)
        self._bus = bus
        self._clock = clock
        self._state = threading.RLock()  # held while it goes off, or is tried again
        self._off_since_s: float | None = None
        self._retry_s = RETRY_S
        self._retry_at_s = 0.0
        self._written_bytes = 0
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="kvmem-disk")
        self._trial: Future[bool] | None = None
        self._trimmed: Future[int] | None = None
        buffer = np.frombuffer(arena.buffer, np.uint8)
        self.folder, self._store = self._open(root, buffer, namespace, faults)
        trim(self.folder, disk_bytes, soon_bytes=2 * TRIM_BYTES)
        if error := self._prove():
            self._failed(error)

    def _open(
        self, root: Path, buffer: np.ndarray, namespace: bytes, faults: str
    ) -> tuple[Path, DiskStore]:
        for _ in range(TRIES):
            folder = claim(root, namespace)
            try:
                store = DiskStore(
                    str(folder), buffer, self._bytes, namespace, queue=self._queue,
                    codec=self._codec, faults=faults,
                )  # fmt: skip
            except OSError as error:
                what, sentence = error.args
            else:
                return folder, store
            if what in ("other", "damaged"):
                # Another version or layout: what is there can't be used, and nothing else can use
                # it. A damaged header has lost which records are whose.
                start_anew(folder)
            elif what != "busy" and folder.is_dir():
                break  # else another engine, starting or trimming, was there between the two steps
        if what == "no_room":
            raise CapacityError(
                f"kvmem's setting 'disk_gb' is too small: {sentence}",
                next_step="Raise disk_gb, or set it to 0.",
                setting="disk_gb",
            )
        raise ConfigError(
            f"kvmem's setting 'disk_path' cannot be used: {sentence}",
            next_step="Give a folder on a local disk that this user may write to.",
            setting="disk_path",
        )

    # -- the mover of kvmem.cache ------------------------------------------------------------

    @property
    def n_records(self) -> int:
        """Blocks that the disk holds at most."""
        return int(self._store.n_records)

    @property
    def room(self) -> int:
        """Blocks as they are that there is room for, beyond those that are queued."""
        return int(self._store.room)

    @property
    def used_bytes(self) -> int:
        """Bytes of the disk that blocks have, of those in `disk_bytes`."""
        return int(self._store.used_bytes)

    @property
    def disk_bytes(self) -> int:
        """The budget."""
        return self._bytes

    @property
    def on(self) -> bool:
        """Whether the disk works, as far as is known; it is tried when it is time for that."""
        if self._off_since_s is None:
            return True
        with self._state:  # who looks at an engine asks too, from a thread of its own
            return self._tried()

    def _tried(self) -> bool:
        if self._off_since_s is None:
            return True
        now = self._clock()
        if self._trial is None:
            if now >= self._retry_at_s:
                self._trial = self._aside.submit(self._works)
            return False
        if not self._trial.done():
            return False
        works, self._trial = self._trial.result(), None
        if not works:
            self._retry_s = min(RETRY_MOST_S, 2 * self._retry_s)
            self._retry_at_s = now + self._retry_s
            return False
        self._bus.emit(events.TierOn(tier="disk", seconds=now - self._off_since_s))
        self._off_since_s, self._retry_s = None, RETRY_S
        return True

    def recovered(self) -> Recovered | None:
        """What an earlier run left, least recently written first."""
        try:
            return Recovered(*self._store.recovered())
        except OSError as error:
            self._failed(error.strerror or str(error))
            return None

    def write(self, move: Move) -> bool:
        """Begins a copy to the disk; False where the queue is full."""
        return self._begin(move, write=True)

    def read(self, move: Move) -> bool:
        """Begins a copy from the disk; False where the queue is full."""
        return self._begin(move, write=False)

    def _begin(self, move: Move, *, write: bool) -> bool:
        return self._store.begin(
            write,
            move.ticket,
            move.slot,
            move.slot_generation,
            move.record,
            move.record_generation,
            move.group,
            move.key,
            move.parent,
            move.depth,
            move.codec,
        )

    def drop(self, record: int) -> None:
        """The record holds nothing any more."""
        self._expect(self._store.drop(record))

    def clear(self) -> None:
        """No record holds anything any more."""
        self._expect(self._store.clear())

    def poll(self) -> list[Moved]:
        """Moves that are over."""
        found = []
        for ticket, status, error, checksum, n_bytes, queued_s, io_s, check_s in self._store.poll():
            self._expect(error)
            if ticket == 0:  # a flush
                continue
            found.append(Moved(ticket, FAULTS[status], checksum, n_bytes, queued_s, io_s, check_s))
            self._written_bytes += n_bytes
        self._trim()
        return found

    def _trim(self) -> None:
        """Has room made in the path, among stores that nobody has open (I7)."""
        if self._trimmed is not None and self._trimmed.done():
            error, self._trimmed = self._trimmed.exception(), None
            if error is not None:
                self._failed(str(error))
        if self._written_bytes >= TRIM_BYTES and self._trimmed is None:
            self._written_bytes = 0
            self._trimmed = self._aside.submit(
                trim, self.folder, self._bytes, soon_bytes=2 * TRIM_BYTES
            )

    def too_slow(self, seconds: float) -> None:
        """A read took so long: the disk hangs, or has more to do than it can."""
        self._failed(f"no answer in {seconds:.1f} s")

    def wait(self, seconds: float, n: int = 1) -> None:
        """Returns when n moves are over that `poll` has not told, or after so long."""
        self._store.wait(seconds, n)

    def close(self) -> None:
        """Ends what is queued and lets go of the folder."""
        self._aside.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    # -- a disk that fails -------------------------------------------------------------------

    def _expect(self, error: int) -> None:
        if error:
            self._failed(os.strerror(error))

    def _failed(self, error: str) -> None:
        """From now on there is no disk, until it is tried again."""
        with self._state:
            now = self._clock()
            self._retry_at_s = now + self._retry_s
            if self._off_since_s is None:
                self._off_since_s = now
                self._bus.emit(events.TierOff(tier="disk", error=error))

    def _prove(self) -> str:
        """Whether blocks come back as they were; empty, or what went wrong."""
        error = prove(self.folder, self._like, codec=self._codec, faults=self._proof_faults)
        self._bus.emit(events.Proof(tier="disk", error=error))
        return error and f"its proof failed: {error}"

    def _works(self) -> bool:
        """Whether a file can be written, synced and read in the store's folder, and blocks too."""
        return self._probe() and not self._prove()

    def _probe(self) -> bool:
        path = self.folder / PROBE
        text = os.urandom(4096)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.pwrite(fd, text, 0)
                os.fdatasync(fd)
                return os.pread(fd, len(text), 0) == text and (self.folder / TABLE).exists()
            finally:
                os.close(fd)
                path.unlink()
        except OSError:
            return False
