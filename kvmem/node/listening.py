"""A node's folder: private, locked as long as the node lives, with its socket in it."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from kvmem.errors import ConfigError
from kvmem.node import wire

__all__ = ["listen"]


def listen(folder: Path) -> tuple[int, socket.socket]:
    """The folder's lock, held as long as the node lives, and the socket in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"--path {folder} can't be used: {error.strerror}",
            next_step="Give a folder that this user may write to.",
            setting="path",
        ) from error
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"--path {folder} is not a private folder of yours",
            next_step=f"chmod 700 {folder}, or give another one.",
            setting="path",
        )
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ConfigError(
            f"A node serves at {folder} already",
            next_step="Give this one another --path.",
            setting="path",
        ) from error
    name = folder / wire.SOCKET
    name.unlink(missing_ok=True)  # a dead node's: the lock says that there is no other
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Nobody else can reach into the folder, so it is private before its mode says so.
        listener.bind(f"/proc/self/fd/{fd}/{wire.SOCKET}")
        name.chmod(0o600)
        listener.listen(256)
        listener.setblocking(False)
    except OSError as error:
        os.close(lock)
        listener.close()
        raise ConfigError(
            f"--path {folder} can't be listened at: {error.strerror}",
            next_step="Give a folder on a local file system.",
            setting="path",
        ) from error
    finally:
        os.close(fd)
    return lock, listener
