"""What memory this process may still take: the machine's, or less inside a container."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from kvmem.errors import ArenaError, CapacityError

__all__ = ["check_room", "free_memory_bytes", "too_little_shm"]

_SHM = Path("/dev/shm")

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
# Limit, use, the line of memory.stat that counts page cache given back on demand; where it lies.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def check_room(n_bytes: int) -> None:
    """Refuses a host tier that this machine cannot hold at this moment.

    Raises:
        CapacityError: naming the setting 'host_gb', with `asked_bytes` and `free_bytes`.
    """
    if n_bytes > _free_shm_bytes():
        raise too_little_shm(n_bytes)
    free = free_memory_bytes()
    if n_bytes > free:
        raise _too_large(n_bytes, "memory", free, "Lower host_gb.")


def too_little_shm(n_bytes: int) -> CapacityError:
    """The error for a host tier of `n_bytes` for which /dev/shm has no room."""
    next_step = "Lower host_gb, or enlarge /dev/shm (`mount -o remount,size=...`, `--shm-size`)."
    return _too_large(n_bytes, "shared memory in /dev/shm", _free_shm_bytes(), next_step)


def _too_large(n_bytes: int, what: str, free: int, next_step: str) -> CapacityError:
    return CapacityError(
        f"kvmem's setting 'host_gb' asks for {n_bytes / 2**30:.2f} GiB of {what}, "
        f"{free / 2**30:.2f} GiB are free",
        next_step=next_step,
        setting="host_gb",
        asked_bytes=n_bytes,
        free_bytes=free,
    )


def _free_shm_bytes() -> int:
    try:
        space = os.statvfs(_SHM)
    except FileNotFoundError:
        return 0
    return space.f_bavail * space.f_frsize


def free_memory_bytes(*, proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """MemAvailable, or what the tightest cgroup of this process leaves if that is less.

    A page above a cgroup's limit gets no error but the OOM killer, so the limit is asked before.

    Args:
        proc: where proc(5) is mounted.
        cgroup: where the cgroup file system is mounted, either version.

    Raises:
        ArenaError: the kernel tells no MemAvailable (before Linux 3.14).
    """
    free = _mem_available(proc)
    for group, (limit_file, used_file, cache) in _groups(proc, cgroup):
        limit, used = _number(group / limit_file), _number(group / used_file)
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used + _cache_bytes(group, cache)))
    return free


def _mem_available(proc: Path) -> int:
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ArenaError("/proc/meminfo names no MemAvailable", next_step="Use Linux 3.14 or later.")


def _groups(proc: Path, cgroup: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """This process's memory cgroup and all above it, in both versions' trees."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # a kernel without cgroups
        return []
    found = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            root, files = cgroup, _V2
        elif "memory" in controllers.split(","):
            root, files = cgroup / "memory", _V1
        else:
            continue
        # Seen from inside a container the path may be the host's: then only the root is ours.
        path = PurePosixPath(own.lstrip("/"))
        inside = [] if ".." in path.parts else [path, *path.parents]
        found += [(root / p, files) for p in (inside or [PurePosixPath()])]
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:  # not in this tree, or not ours to see
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def _cache_bytes(group: Path, name: str) -> int:
    try:
        text = (group / "memory.stat").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(name + " "):
            return int(line.split()[1])
    return 0
