"""Events as lines of JSON, in a private file: one object a line, its time first.

    {"at":"2026-11-27T11:30:00.250Z","event":"evicted","blocks":3,"tier":"host",...}

The file is turned over when it has `MOST_BYTES`; one former file is kept beside it, so that the two
have a bound (I7). Events carry numbers, names and digests, never text of a prompt (I11).
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from kvmem import events
from kvmem.errors import ConfigError
from kvmem.telemetry.pump import Pump

__all__ = ["EventLog"]

MOST_BYTES = 64 << 20


class EventLog:
    """Writes a bus's events to a file, from `follow` on; see the module. `close` writes what waits.

    Raises:
        ConfigError: the file can't be written, naming the setting.
    """

    def __init__(self, path: Path, *, most_bytes: int = MOST_BYTES) -> None:
        self.path = path
        self._most_bytes = most_bytes
        self._pump: Pump | None = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = _open(path)
        except OSError as error:
            raise ConfigError(
                f"kvmem's setting 'event_log' can't be {str(path)!r}: {error.strerror}",
                next_step="Give a file in a folder that you may write to.",
                setting="event_log",
            ) from error

    def follow(self, bus: events.Bus, *, most_waiting: int = 4096) -> None:
        """Begins to write, on a thread of its own."""
        self._pump = Pump(
            bus, self._write, name="kvmem-event-log", clock=time.time, most=most_waiting
        )

    @property
    def dropped(self) -> int:
        """Events that it was too slow for."""
        return self._pump.dropped if self._pump is not None else 0

    def flush(self) -> None:
        """Writes what waits."""
        if self._pump is not None:
            self._pump.flush()

    def close(self) -> None:
        """Writes what waits and lets go of the file."""
        if self._pump is not None:
            self._pump.close()
            self._pump = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, told: list[tuple[float, events.Event]], dropped: int) -> None:
        lines = [_line(at, msgspec.to_builtins(event)) for at, event in told]
        if dropped:
            lines.append(_line(time.time(), {"event": "dropped", "events": dropped}))
        os.write(self._fd, b"".join(lines))
        if os.fstat(self._fd).st_size >= self._most_bytes:
            with contextlib.suppress(FileNotFoundError):  # somebody else has put it away
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
            # First the new one: a number that is closed may be another file's by the next write.
            opened = _open(self.path)
            full, self._fd = self._fd, opened
            os.close(full)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def _line(at_s: float, fields: dict[str, object]) -> bytes:
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_s))
    at = f"{day}.{int(at_s * 1000) % 1000:03d}Z"
    return msgspec.json.encode({"at": at, **fields}) + b"\n"
