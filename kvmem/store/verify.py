"""Looks through stores that no engine has open: every byte, and every block's parent.

An engine checks each block as it reads it; this is for whoever wants to know before, or moved a
disk. Nothing is changed but by `repair`, which empties the records of what would be a miss anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from kvmem._core import DiskVerifier
from kvmem.errors import ConfigError
from kvmem.store.folders import TABLE, folders

__all__ = ["BadBlock", "Report", "stores_of", "verify"]

AT_A_TIME = 64  # slots, between two calls of `progress`


class BadBlock(msgspec.Struct, frozen=True):
    """A record that answers nothing: `key` is empty where the record itself is damaged.

    `why` is record (its own bytes), units (a later one has its place), parent (what it hangs below
    is bad or gone), unread (it takes libzstd); or of its slot short (cut off), header (none),
    identity (another block's), bytes (damaged), block (decodes to another).
    """

    record: int
    key: str
    why: str


class Report(msgspec.Struct, frozen=True):
    """What a look through one store found."""

    folder: str
    status: Literal["sound", "damaged", "repaired", "busy", "unreadable"]
    namespace: str = ""
    records: int = 0
    blocks: int = 0
    bytes: int = 0
    bad: tuple[BadBlock, ...] = ()
    seconds: float = 0.0
    error: str = ""


def stores_of(path: Path) -> list[Path]:
    """The stores at or under a path.

    Raises:
        ConfigError: there are none.
    """
    found = [path] if (path / TABLE).is_file() else [f.path for f in folders(path)]
    if not found:
        raise ConfigError(
            f"There is no disk store at {str(path)!r}",
            next_step="Give what the setting disk_path was, or a store's own folder.",
            setting="disk_path",
        )
    return found


def verify(
    folder: Path, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Looks through one store, at the speed of its disk.

    Args:
        folder: the store's own.
        repair: empty the records of what is bad, and of what hangs below it.
        progress: told slots looked at so far, and slots in all.
    """
    begin = time.monotonic()
    try:
        store = DiskVerifier(str(folder))
    except OSError as error:
        what, sentence = error.args
        return Report(str(folder), "busy" if what == "busy" else "unreadable", error=sentence)
    try:
        for n_done in _steps(store):
            if progress is not None:
                progress(n_done, store.n_to_do)
        bad = tuple(
            BadBlock(record, key.hex() if any(key) else "", why)
            for record, key, why in store.found(closure=True)
        )
        if bad and repair:
            store.repair()
    except OSError as error:
        return Report(str(folder), "unreadable", error=error.strerror or str(error))
    finally:
        records, n_bytes = store.totals()
        namespace = store.namespace.hex()
        store.close()
    return Report(
        folder=str(folder),
        status=("repaired" if repair else "damaged") if bad else "sound",
        namespace=namespace,
        records=records,
        blocks=records - len(bad),
        bytes=n_bytes,
        bad=bad,
        seconds=time.monotonic() - begin,
    )


def _steps(store: DiskVerifier) -> Iterator[int]:
    n_done, more = 0, True
    while more:
        more = store.step(AT_A_TIME)
        n_done = min(store.n_to_do, n_done + AT_A_TIME)
        yield n_done
