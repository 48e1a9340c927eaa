"""The switch: kvmem's loads and stores, off and on in a running engine.

    whoever runs the engine:  set_switch(path, loads=False)   any process of the arena's user
    the scheduler's half:     SwitchReader(arena).read()      at every request

Both look at one word in the arena's page (layout.py), so the engine's part is a read of memory: no
call, no lock, no clock. Writers take a lock of the file, so that of two changes at once neither
undoes the other; the kernel ends it with its holder.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmem.errors import ArenaError
from kvmem.store.arena import Arena, open_file
from kvmem.store.layout import Switch

__all__ = ["Switch", "SwitchReader", "read_switch", "set_switch"]

WORD_BYTES = 8

log = logging.getLogger("kvmem")


def read_switch(path: Path) -> Switch:
    """What was asked of the engine that owns the arena at `path`.

    Raises:
        ArenaError: the file is no arena of this user, its owner is gone, or the record is damaged.
        FileNotFoundError: there is no such arena.
    """
    with _word(path) as word:
        return _decoded(word[0], path)[1]


def set_switch(path: Path, *, loads: bool | None = None, stores: bool | None = None) -> Switch:
    """Switches what is given, and tells what stands then; the engine sees it at its next request.

    The last one to switch wins. What is not given stays as it is.

    Raises:
        ArenaError: as `read_switch`; a damaged record is written anew when both are given.
        FileNotFoundError: there is no such arena.
    """
    with _word(path, write=True) as word:
        if loads is None or stores is None:
            sequence, now = _decoded(word[0], path)
        else:
            sequence, now = Switch.decode(word[0]) or (0, Switch())
        wanted = Switch(
            loads=now.loads if loads is None else loads,
            stores=now.stores if stores is None else stores,
        )
        word[0] = wanted.encode(sequence + 1)  # one store of 8 aligned bytes: never half of it
        return wanted


class SwitchReader:
    """The switch as the arena's own engine sees it; a damaged record keeps the last good one.

    Thread safety: one thread.

    Args:
        arena: the engine's own mapping.
        on_damage: is told once of each damaged record, with a message.
        on_change: is told of each change.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        on_damage: Callable[[str], None],
        on_change: Callable[[Switch], None] = lambda switch: None,
    ) -> None:
        at = arena.header.switch_offset
        self._word = memoryview(arena.buffer)[at : at + WORD_BYTES].cast("Q")
        self._last = -1  # no word: the first read takes what is there
        self._now = Switch()
        self._on_damage = on_damage
        self._on_change = on_change

    def read(self) -> Switch:
        """What holds now. Cost: a tenth of a microsecond while nothing changes."""
        word = self._word[0]
        if word != self._last:
            self._last = word
            self._take(word)
        return self._now

    def peek(self) -> Switch:
        """What the record says now, or the last good one; nobody is told. Any thread may look."""
        found = Switch.decode(self._word[0])
        return found[1] if found is not None else self._now

    def _take(self, word: int) -> None:
        found = Switch.decode(word)
        if found is None:
            message = f"the switch's record {word:#018x} is damaged; {self._now} still holds"
            log.error("kvmem: %s", message)
            self._on_damage(message)
        elif found[1] != self._now:
            self._now = found[1]
            log.warning("kvmem: from now on %s", self._now)
            self._on_change(self._now)


@contextmanager
def _word(path: Path, *, write: bool = False) -> Iterator[memoryview]:
    """The record of a live arena, one word; `write` keeps other writers out meanwhile.

    Only its page is mapped: all of an arena's would cost a walk over its gigabytes.
    """
    fd, header = open_file(path)
    try:
        if write:
            fcntl.flock(fd, fcntl.LOCK_EX)  # this descriptor's own; its end is the lock's
        start = header.switch_offset - header.switch_offset % mmap.ALLOCATIONGRANULARITY
        at = header.switch_offset - start
        with (
            mmap.mmap(fd, at + WORD_BYTES, offset=start) as page,
            memoryview(page) as view,
            view[at : at + WORD_BYTES] as record,
            record.cast("Q") as word,
        ):
            yield word
    finally:
        os.close(fd)


def _decoded(word: int, path: Path) -> tuple[int, Switch]:
    found = Switch.decode(word)
    if found is None:
        raise ArenaError(
            f"The switch in {path} is damaged: {word:#018x}",
            next_step="Set both loads and stores: that writes it anew.",
            path=path,
        )
    return found
