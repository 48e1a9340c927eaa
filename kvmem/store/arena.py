"""The host arena: a private file in shared memory that both halves of a connector map.

    /dev/shm/kvmem-<uid>-<name>    mode 0600; layout.py has its bytes

Who is alive is told by locks of open file descriptions, never by a clock or a bare pid:

    byte 0  held exclusively by the owner, the scheduler's half
    byte 1  held shared by everyone who has it mapped

A mapping keeps its file description, so the locks are held until the last mapping is gone, also
when `close` was called before.

A file whose two bytes nobody holds belonged to processes that are gone; nothing can write into it
any more (I3), and the next start reclaims it. (A forked child that keeps the file open counts.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
import struct
import weakref
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec

from kvmem.errors import ArenaError, ArenaInUse, CapacityError, ConfigError
from kvmem.store.capacity import free_memory_bytes
from kvmem.store.layout import DESCRIPTOR_BYTES, HEADER_BYTES, STATS_BYTES, Header, Stats

__all__ = ["Arena", "LiveArena", "list_live", "sweep"]

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_OWNER, _MAPPER = 0, 1
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_RETRIES = 8


class Arena:
    """One mapped arena; made by `create` (the owner) or `open` (a mapper).

    The mapping lives until the last user of `buffer` lets go of it; an owner that ends without
    `close` takes the file with it all the same, unless it is killed.
    """

    def __init__(
        self, path: Path, header: Header, fd: int, mapping: mmap.mmap, *, owner: bool
    ) -> None:
        self.path = path
        self.header = header
        self.buffer = mapping
        self._owner = owner
        self._stats_sequence = 0
        self._end = weakref.finalize(self, _let_go, os.getpid(), fd, path if owner else None)

    # -- where things lie --------------------------------------------------------------------

    @staticmethod
    def path_of(name: str) -> Path:
        """The file of this user's arena `name`.

        Raises:
            ConfigError: the name is no plain word, so it could point elsewhere.
        """
        if _NAME.fullmatch(name) is None:
            raise ConfigError(
                f"kvmem's setting 'arena' cannot be {name!r}",
                next_step="Use up to 64 letters, digits, '_' and '-', a letter or digit first.",
                setting="arena",
            )
        return FOLDER / f"{_prefix()}{name}"

    @property
    def table_offset(self) -> int:
        """Where the slot descriptors begin."""
        return HEADER_BYTES

    @property
    def descriptor_bytes(self) -> int:
        """Bytes of a slot's descriptor."""
        return DESCRIPTOR_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of a block."""
        return self.header.slot_bytes

    def data_of(self, slot: int) -> int:
        """Where a slot's bytes begin."""
        return self.header.data_offset + slot * self.header.slot_stride

    # -- life --------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        *,
        n_slots: int,
        slot_bytes: int,
        namespace: bytes,
        group: int,
        label: str = "",
    ) -> Arena:
        """A new arena of zeros, all of its memory reserved, owned by this process.

        A dead owner's file of that name is reclaimed.

        Args:
            name: see the setting `arena`.
            n_slots: blocks it holds.
            slot_bytes: bytes of a block.
            namespace: 32 bytes; see `kvmem.types.Namespace.digest`.
            group: the KV-cache group's index.
            label: for people: the model's name.

        Raises:
            ConfigError: the name is malformed.
            ValueError: a number or the namespace is out of range.
            CapacityError: there is not as much shared memory, or memory.
            ArenaInUse: a live engine owns this name.
        """
        path = cls.path_of(name)
        header = Header(
            n_slots=n_slots,
            slot_bytes=slot_bytes,
            namespace=namespace,
            group=group,
            uid=os.getuid(),
            owner_pid=os.getpid(),
            owner_start=_start_time(os.getpid()),
            creator=metadata.version("kvmem"),
            label=label,
        )
        with contextlib.suppress(FileNotFoundError):  # it went by itself meanwhile
            _refuse_a_live_one(path)
        _check_room(header.total_bytes)
        _check_shape(header)
        fd = _open_nameless()
        try:
            os.fchmod(fd, 0o600)  # whatever the umask
            _lock(fd, _OWNER, fcntl.F_WRLCK)
            _lock(fd, _MAPPER, fcntl.F_RDLCK)
            _reserve(fd, header.total_bytes)
            os.pwrite(fd, header.encode(), 0)
            mapping = _map(fd, header.total_bytes)
            _link(fd, path)
        except BaseException:
            os.close(fd)
            raise
        arena = cls(path, header, fd, mapping, owner=True)
        _OWNED[path] = arena
        return arena

    @classmethod
    def open(cls, path: Path) -> Arena:
        """A mapping of an arena that a live owner made; in the owner's own process, its mapping.

        Raises:
            ArenaError: the file is not this user's, not private, no arena, of another version,
                damaged, or its owner is gone.
        """
        fd = _open_private(path)
        try:
            header = _read_header(fd, path)
            _lock(fd, _MAPPER, fcntl.F_RDLCK)
            if not _is_held(fd, _OWNER):
                raise ArenaError(
                    f"The owner of {path} is gone",
                    next_step="Start the engine again: the file is reclaimed then.",
                    path=path,
                )
            owned = _OWNED.get(path)
            same = owned is not None and owned.header == header
            mapping = owned.buffer if owned is not None and same else _map(fd, header.total_bytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, header, fd, mapping, owner=False)

    def close(self, *, unlink: bool) -> None:
        """Lets go of the file; with `unlink` (the owner's) it is gone for new mappers.

        Raises:
            ArenaError: a mapper asks to remove it.
        """
        if unlink and not self._owner:
            raise ArenaError("Only its owner removes an arena", path=self.path)
        end = self._end.detach()
        if end is not None:
            _, _, (pid, fd, path), _ = end
            _let_go(pid, fd, path if unlink else None)

    # -- stats -------------------------------------------------------------------------------

    def write_stats(self, payload: bytes) -> None:
        """Puts `payload` where `read_stats` finds it, whole or not at all.

        Raises:
            ArenaError: it is larger than the region, 32 KiB less 24 bytes.
        """
        if len(payload) > Stats.ROOM:
            raise ArenaError(f"{len(payload):,} bytes of stats, there is room for {Stats.ROOM:,}")
        self._stats_sequence += 1
        at, value = Stats.pack(self._stats_sequence, payload)
        at += self.header.stats_offset
        self.buffer[at : at + len(value)] = value

    @staticmethod
    def read_stats(path: Path) -> bytes | None:
        """The last payload that was written whole; None before the first.

        Raises:
            ArenaError: the file is no arena of this user.
        """
        fd = _open_private(path)
        try:
            header = _read_header(fd, path)
            for _ in range(_RETRIES):
                found = Stats.unpack(os.pread(fd, STATS_BYTES, header.stats_offset))
                if found is not None:
                    return found[1]
                if not any(os.pread(fd, 32, header.stats_offset + Stats.BUFFER_BYTES)):
                    return None
            return None
        finally:
            os.close(fd)


class LiveArena(msgspec.Struct, frozen=True):
    """An arena whose owner is alive."""

    path: Path
    header: Header


def list_live() -> list[LiveArena]:
    """This user's arenas whose owners are alive, by name."""
    found = []
    for path in _files():
        with contextlib.suppress(ArenaError, FileNotFoundError):
            fd = _open_private(path)
            try:
                if _is_held(fd, _OWNER):
                    found.append(LiveArena(path, _read_header(fd, path)))
            finally:
                os.close(fd)
    return found


def sweep() -> list[Path]:
    """Removes this user's arenas that nobody holds any more; the answer is which."""
    return [path for path in _files() if _reclaim(path)]


# The arenas that this process made: its worker half uses the same mapping.
_OWNED: weakref.WeakValueDictionary[Path, Arena] = weakref.WeakValueDictionary()


def _let_go(pid: int, fd: int, path: Path | None) -> None:
    if os.getpid() != pid:  # a forked child ends: the arena is its parent's
        return
    if path is not None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(fd)):
                path.unlink()
    os.close(fd)


def _prefix() -> str:
    return f"kvmem-{os.getuid()}-"


def _files() -> Iterator[Path]:
    yield from sorted(FOLDER.glob(f"{_prefix()}*"))


def _reclaim(path: Path) -> bool:
    """Removes a file that nobody holds: no owner, and no mapper that could still write (I3)."""
    try:
        fd = _open_private(path)
    except (FileNotFoundError, ArenaError):
        return False
    try:
        try:
            for byte in (_OWNER, _MAPPER):
                _lock(fd, byte, fcntl.F_WRLCK)
        except BlockingIOError:
            return False
        # Locked, it can't change hands; what is under the name may be another file by now.
        if not os.path.samestat(path.stat(follow_symlinks=False), os.fstat(fd)):
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    finally:
        os.close(fd)
    return True


def _refuse_a_live_one(path: Path) -> None:
    if not os.path.lexists(path) or _reclaim(path):
        return
    fd = _open_private(path)
    try:
        header = _read_header(fd, path)
    finally:
        os.close(fd)
    raise ArenaInUse(
        f"kvmem's arena {path} is in use by the engine of process {header.owner_pid}",
        next_step="Give this engine another name by the setting 'arena', or end the other one.",
        setting="arena",
        path=path,
        owner_pid=header.owner_pid,
    )


def _open_nameless() -> int:
    """A file without a name: nobody can sweep or list it, and no death leaves it behind."""
    try:
        return os.open(FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ArenaError(
            f"{FOLDER} can hold no arena: {error.strerror}",
            next_step="Mount a writable tmpfs there.",
            path=FOLDER,
        ) from error


def _link(fd: int, path: Path) -> None:
    """Gives the whole, locked file its name, unless a live engine has that."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(_RETRIES):
            try:
                # With a folder's descriptor os.link is linkat(AT_SYMLINK_FOLLOW), open(2)'s way
                # to name such a file.
                os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=folder)
            except FileExistsError:
                # One that went between the two looks is no reason to stop.
                with contextlib.suppress(FileNotFoundError):
                    _refuse_a_live_one(path)
            else:
                return
    finally:
        os.close(folder)
    raise ArenaInUse(
        f"Other engines keep taking the arena {path}",
        next_step="Give this engine another name by the setting 'arena'.",
        setting="arena",
        path=path,
    )


def _open_private(path: Path) -> int:
    """A descriptor of a plain file that is this user's alone.

    Raises:
        ArenaError: it is something else.
        FileNotFoundError: it is not there.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArenaError(
            f"{path} can't be opened: {error.strerror}", next_step=_REMOVE, path=path
        ) from error
    found = os.fstat(fd)
    private = found.st_uid == os.getuid() and not found.st_mode & 0o077
    if not stat.S_ISREG(found.st_mode) or not private:
        os.close(fd)
        raise ArenaError(f"{path} is not a private file of yours", next_step=_REMOVE, path=path)
    return fd


_REMOVE = "Remove it, or choose another name by the setting 'arena'."


def _read_header(fd: int, path: Path) -> Header:
    header = Header.decode(os.pread(fd, HEADER_BYTES, 0), file_bytes=os.fstat(fd).st_size)
    if header.uid != os.getuid():
        raise ArenaError(f"{path} was made by user {header.uid}", next_step=_REMOVE, path=path)
    return header


def _lock(fd: int, byte: int, kind: int) -> None:
    """Takes the lock of one byte. Raises BlockingIOError when somebody else has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, "locked") from error
        raise


def _is_held(fd: int, byte: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    return _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK


def _map(fd: int, n_bytes: int) -> mmap.mmap:
    """The whole file, its page tables filled: no load or store waits for a page fault."""
    return mmap.mmap(fd, n_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _reserve(fd: int, n_bytes: int) -> None:
    """Gives the file all its memory now: later, a lack of it would be a SIGBUS."""
    try:
        os.posix_fallocate(fd, 0, n_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise _too_large(n_bytes, "shared memory", _shm_free()) from error
        raise


def _check_shape(header: Header) -> None:
    """What the caller gave: our own code's duty, not a setting's."""
    if not 0 < header.n_slots < 2**31 or not 0 < header.slot_bytes <= 2**46:
        raise ValueError(f"{header.n_slots} slots of {header.slot_bytes} bytes are no arena")
    if len(header.namespace) != 32 or not 0 <= header.group < 2**32:
        raise ValueError("an arena needs a namespace of 32 bytes and a group of 32 bits")


def _check_room(n_bytes: int) -> None:
    for what, free in (("shared memory", _shm_free()), ("memory", free_memory_bytes())):
        if n_bytes > free:
            raise _too_large(n_bytes, what, free)


def _too_large(n_bytes: int, what: str, free: int) -> CapacityError:
    return CapacityError(
        f"kvmem's setting 'host_gb' asks for {n_bytes / 2**30:.2f} GiB of {what}, "
        f"{free / 2**30:.2f} GiB are free",
        next_step="Lower host_gb, or make room in /dev/shm (`mount -o remount,size=...`).",
        setting="host_gb",
        asked_bytes=n_bytes,
        free_bytes=free,
    )


def _shm_free() -> int:
    space = os.statvfs(FOLDER)
    return space.f_bavail * space.f_frsize


def _start_time(pid: int) -> int:
    """Clock ticks after boot at which the process began (/proc/PID/stat, field 22)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
