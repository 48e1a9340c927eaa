"""The host arena: private shared memory that both halves of a connector map.

    /dev/shm/kvmem-<uid>-<name>  ->  /proc/<pid>/fd/<fd>

The bytes (layout.py) lie in a file without a name, mode 0600, that its owner, the scheduler's
half, keeps open. The name is a link to that open file, so it leads somewhere exactly as long as
the owner lives: the kernel ends both however a process ends, SIGKILL included, and gives the
memory back when the last mapping is gone. What a killed owner leaves is a link of no bytes to
nowhere, which the next start removes. Nobody asks a clock or a lock who is alive.

Removing a name frees no memory and moves none, so it can harm no mapping (I3).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import weakref
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec

from kvmem.errors import ArenaError, ArenaInUse, ConfigError
from kvmem.store.capacity import check_room, too_little_shm
from kvmem.store.layout import DESCRIPTOR_BYTES, HEADER_BYTES, STATS_BYTES, Header, Stats, Switch

__all__ = ["Arena", "LiveArena", "list_live", "open_file", "sweep"]

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TARGET = re.compile(r"/proc/([1-9][0-9]*)/fd/([0-9]+)")
_RETRIES = 8


class Arena:
    """One mapped arena; made by `create` (the owner) or `open` (a mapper).

    The mapping lives until the last user of `buffer` lets go of it. An owner that ends takes name
    and memory with it, `close` or not.
    """

    def __init__(
        self, path: Path, header: Header, fd: int, mapping: mmap.mmap, *, owner: bool
    ) -> None:
        self.path = path
        self.header = header
        self.buffer = mapping
        self._owner = owner
        self._fd = fd
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
        """Bytes of a rank's share of a block."""
        return self.header.slot_bytes

    def data_of(self, slot: int, rank: int = 0) -> int:
        """Where the bytes of a rank's share of a slot begin."""
        share = slot * self.header.ranks + rank
        return self.header.data_offset + share * self.header.slot_stride

    # -- life --------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        *,
        n_slots: int,
        slot_bytes: int,
        namespace: bytes,
        ranks: int = 1,
        label: str = "",
        linked: bool = True,
    ) -> Arena:
        """A new arena of zeros, all of its memory reserved, owned by this process.

        A dead owner's link of that name is removed.

        Args:
            name: see the setting `arena`.
            n_slots: blocks it holds.
            slot_bytes: bytes of a rank's share of a block.
            namespace: 32 bytes; see `kvmem.types.Namespace.digest`.
            ranks: workers that each keep a share of every block.
            label: for people: the model's name.
            linked: whether others find it by its name; else `fd` is handed to whoever maps it.

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
            ranks=ranks,
            uid=os.getuid(),
            owner_pid=os.getpid(),
            owner_start=_start_time(os.getpid()),
            creator=metadata.version("kvmem"),
            label=label,
        )
        if linked:
            _refuse_a_live_one(path)
        check_room(header.total_bytes)
        _check_shape(header)
        fd = _open_nameless()
        try:
            os.fchmod(fd, 0o600)  # whatever the umask
            _reserve(fd, header.total_bytes)
            os.pwrite(fd, header.encode(), 0)
            os.pwrite(fd, Switch().encode(0).to_bytes(8, "little"), header.switch_offset)
            mapping = _map(fd, header.total_bytes)
            if linked:
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
        fd, header = open_file(path)
        try:
            owned = _OWNED.get(path)
            same = owned is not None and owned.header == header
            mapping = owned.buffer if owned is not None and same else _map(fd, header.total_bytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, header, fd, mapping, owner=False)

    @classmethod
    def received(cls, fd: int) -> Arena:
        """A mapping of an arena that its owner handed over; `fd` is this arena's from now on.

        Raises:
            ArenaError: it is no private arena of this user, of another version, or damaged.
        """
        try:
            path = Path(f"/proc/self/fd/{fd}")
            header = _read_header(fd, path)
            mapping = _map(fd, header.total_bytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, header, fd, mapping, owner=False)

    @property
    def fd(self) -> int:
        """The file, open as long as this arena is."""
        return self._fd

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
            ArenaError: the file is no arena of this user, or its owner is gone.
            FileNotFoundError: there is no such arena.
        """
        fd, header = open_file(path)
        try:
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
    for path in _links():
        with contextlib.suppress(ArenaError, FileNotFoundError):
            live = _open_live(path)
            if live is not None:
                os.close(live[0])
                found.append(LiveArena(path, live[1]))
    return found


def sweep() -> list[Path]:
    """Removes this user's links whose owners are gone; the answer is which."""
    return [path for path in _links() if _remove_dead(path)]


# The arenas that this process made: its worker half uses the same mapping.
_OWNED: weakref.WeakValueDictionary[Path, Arena] = weakref.WeakValueDictionary()


def _let_go(pid: int, fd: int, path: Path | None) -> None:
    if os.getpid() != pid:  # a forked child ends: the arena is its parent's
        return
    if path is not None:
        with contextlib.suppress(OSError):  # not there, or no link: then it is not ours
            if path.readlink() == _target(fd):
                path.unlink()
    os.close(fd)


def _target(fd: int) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{fd}")


def _prefix() -> str:
    return f"kvmem-{os.getuid()}-"


def _links() -> Iterator[Path]:
    yield from sorted(FOLDER.glob(f"{_prefix()}*"))


def _open_live(path: Path) -> tuple[int, Header] | None:
    """A descriptor of the arena behind a link and its header; None when the owner is gone.

    Raises:
        ArenaError: the link, or what it leads to, is no private arena of this user.
        FileNotFoundError: there is no link.
    """
    found = path.lstat()
    target = _TARGET.fullmatch(str(path.readlink())) if stat.S_ISLNK(found.st_mode) else None
    if target is None or found.st_uid != os.getuid():
        raise ArenaError(f"{path} is not a private arena of yours", next_step=_REMOVE, path=path)
    try:
        # The pid may be another process's by now, and anything its descriptor: only a file of
        # this folder that has no name is opened.
        if not str(Path(target[0]).readlink()).startswith(f"{FOLDER}/#"):
            return None
        fd = os.open(target[0], os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise ArenaError(
            f"{path} can't be opened: {error.strerror}", next_step=_REMOVE, path=path
        ) from error
    try:
        header = _read_header(fd, path)
        pid = int(target[1])
        if (header.owner_pid, header.owner_start) == (pid, _start_time(pid)):
            return fd, header
    except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def open_file(path: Path) -> tuple[int, Header]:
    """A descriptor of a live arena, the caller's to close, and its header.

    Raises:
        ArenaError: the file is no arena of this user, or its owner is gone.
        FileNotFoundError: there is no such arena.
    """
    found = _open_live(path)
    if found is None:
        raise ArenaError(
            f"The owner of {path} is gone",
            next_step="Start the engine again; the memory is free already.",
            path=path,
        )
    return found


def _remove_dead(path: Path) -> bool:
    """Removes a link whose owner is gone, and no other, also when it changes hands meanwhile."""
    try:
        dead = path.readlink()
        if _open_and_close(path):
            return False
        aside = path.with_name(f"{path.name}.gone-{os.getpid()}")
        path.rename(aside)
    except (OSError, ArenaError):  # gone, or not ours
        return False
    same = aside.readlink() == dead
    if not same:  # another start was quicker: this is its link, back to its place
        with contextlib.suppress(FileExistsError):
            os.link(aside, path, follow_symlinks=False)
    aside.unlink()
    return same


def _open_and_close(path: Path) -> bool:
    """Whether the link leads to a living owner's arena."""
    live = _open_live(path)
    if live is not None:
        os.close(live[0])
    return live is not None


def _refuse_a_live_one(path: Path) -> None:
    try:
        live = _open_live(path)
    except FileNotFoundError:
        return
    if live is None:
        _remove_dead(path)
        return
    fd, header = live
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
    """Gives the whole file its name, unless a live engine has that."""
    for _ in range(_RETRIES):
        try:
            path.symlink_to(_target(fd))
        except FileExistsError:
            _refuse_a_live_one(path)
        else:
            return
    raise ArenaInUse(
        f"Other engines keep taking the arena {path}",
        next_step="Give this engine another name by the setting 'arena'.",
        setting="arena",
        path=path,
    )


_REMOVE = "Remove it, or choose another name by the setting 'arena'."


def _read_header(fd: int, path: Path) -> Header:
    found = os.fstat(fd)
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not stat.S_ISREG(found.st_mode):
        raise ArenaError(f"{path} is not a private file of yours", next_step=_REMOVE, path=path)
    header = Header.decode(os.pread(fd, HEADER_BYTES, 0), file_bytes=found.st_size)
    if header.uid != os.getuid():
        raise ArenaError(f"{path} was made by user {header.uid}", next_step=_REMOVE, path=path)
    return header


def _map(fd: int, n_bytes: int) -> mmap.mmap:
    """The whole file, its page tables filled: no load or store waits for a page fault."""
    return mmap.mmap(fd, n_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _reserve(fd: int, n_bytes: int) -> None:
    """Gives the file all its memory now: later, a lack of it would be a SIGBUS."""
    try:
        os.posix_fallocate(fd, 0, n_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise too_little_shm(n_bytes) from error
        raise


def _check_shape(header: Header) -> None:
    """What the caller gave: our own code's duty, not a setting's."""
    if not 0 < header.n_slots < 2**31 or not 0 < header.slot_bytes <= 2**46:
        raise ValueError(f"{header.n_slots} slots of {header.slot_bytes} bytes are no arena")
    if len(header.namespace) != 32 or not 1 <= header.ranks <= 1024:
        raise ValueError("an arena needs a namespace of 32 bytes and 1 to 1,024 ranks")


def _start_time(pid: int) -> int:
    """Clock ticks after boot at which the process began (/proc/PID/stat, field 22)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
