"""Which folder of the disk tier's path is this engine's, and how much of the budget is left for it.

    <disk_path>/
      3f1c...a9-0/      one store: 32 hex digits of the namespace, and a number, since engines that
      3f1c...a9-1/      run side by side have a store each
      77b0...12-0/      of a model that ran here before

Stores that nobody has open count towards the budget and go, least recently used first, when this
engine needs their room (I7); stores of other engines that run are theirs. Nothing else in the path
is touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvmem.errors import ConfigError

__all__ = ["LOCK", "TABLE", "Folder", "claim", "folders", "start_anew", "trim"]

_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{1,3})")
_SIDE_BY_SIDE = 100
_GONE = ".gone"
LOCK = "lock"
TABLE = "table.kvd"
_FILES = "*.kvd*"


class Folder(msgspec.Struct, frozen=True):
    """One store's folder; `used_s` is when it was last opened, `free` that nobody has it open."""

    path: Path
    namespace: str
    n_bytes: int
    used_s: float
    free: bool


def folders(root: Path) -> list[Folder]:
    """The stores under `root`, least recently used first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        name = _NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError):  # it goes while we look
            sizes = [file.stat().st_blocks * 512 for file in path.iterdir()]
            used_s = path.stat().st_mtime
            found.append(Folder(path, name[1], sum(sizes), used_s, _is_free(path)))
    return sorted(found, key=lambda folder: folder.used_s)


def claim(root: Path, namespace: bytes) -> Path:
    """The folder for a store of this namespace: one that is there and free, or a new one.

    Raises:
        ConfigError: the path can't be used, naming 'disk_path'.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = namespace.hex()[:32]
        there = folders(root)
        own = next((f.path for f in there if f.namespace == mine and f.free), None)
        if own is None:
            taken = {f.path.name for f in there}
            names = (f"{mine}-{n}" for n in range(_SIDE_BY_SIDE))
            own = root / next(name for name in names if name not in taken)
            own.mkdir(mode=0o700, exist_ok=True)  # two that start at once: one opens it
        os.utime(own)
    except (OSError, StopIteration) as error:
        why = error.strerror if isinstance(error, OSError) else "a hundred stores are in use"
        raise ConfigError(
            f"kvmem's setting 'disk_path' cannot be {str(root)!r}: {why}",
            next_step="Give a folder on a local disk that this user may write to.",
            setting="disk_path",
        ) from error
    return own


def trim(own: Path, n_bytes: int, *, soon_bytes: int = 0) -> int:
    """Removes stores that nobody has open, least recently used first, until they, `own` and what
    it will take `soon` are within `n_bytes` (I7); the answer is how many went."""
    for path in own.parent.glob(f"*{_GONE}"):  # of one that was killed here
        if _NAME.fullmatch(path.name.removesuffix(_GONE)) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # another engine may be at it too
    there = folders(own.parent)
    idle = [folder for folder in there if folder.free and folder.path != own]
    used = soon_bytes + sum(f.n_bytes for f in there if f.path == own or f in idle)
    gone = 0
    for folder in idle:
        if used <= n_bytes:
            break
        with _locked(folder.path) as held:
            if held:
                # Out of the way first: who opens it from now on finds nothing there.
                gone_path = folder.path.with_name(folder.path.name + _GONE)
                folder.path.rename(gone_path)
                shutil.rmtree(gone_path)
                used -= folder.n_bytes
                gone += 1
    return gone


def start_anew(own: Path) -> None:
    """Removes a store's files, if nobody has it open."""
    with _locked(own) as held:
        if held:
            for path in own.glob(_FILES):
                path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def _is_free(path: Path) -> bool:
    with _locked(path) as held:
        return held
