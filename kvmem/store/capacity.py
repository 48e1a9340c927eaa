"""What memory this process may still take: the machine's, or less inside a container."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from kvmem.errors import ArenaError

__all__ = ["free_memory_bytes"]

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
# Limit, use, the line of memory.stat that counts page cache given back on demand; where it lies.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


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
