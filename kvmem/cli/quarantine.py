"""`kvmem quarantine`: the blocks that failed a check in running engines, and what is in their slots
now."""

from __future__ import annotations

from datetime import datetime

import msgspec
from rich.console import Console
from rich.table import Table

from kvmem.cli import live, switching
from kvmem.errors import ArenaError
from kvmem.store import Arena
from kvmem.store.inspect import Inspected, inspect
from kvmem.types import Quarantine

__all__ = ["Row", "show"]

KEY_CHARS = 16
TOLD = {
    "gone": "given back",
    "identity": "the slot names another block",
    "bytes": "the bytes differ from those stored",
    "sound": "the bytes are those stored",
}


class Row(msgspec.Struct, frozen=True):
    """A block that failed a check, and its slot as it is now."""

    arena: str
    block: Quarantine
    slot: Inspected


def show(arena: str | None, *, as_json: bool) -> bool:
    """Prints what is in quarantine; False when there is no engine.

    Raises:
        ConfigError: engines run, but none has that arena.
    """
    wanted = {one.path.name for one in switching.engines(arena)}
    pages = [page for page in live.pages() if page.arena in wanted]
    if not wanted:
        return False
    rows = [Row(page.arena, block, _now(page.arena, block)) for page in pages
            for block in page.quarantine]  # fmt: skip
    if as_json:
        print(msgspec.json.encode(rows).decode())
    elif rows:
        Console().print(_table(rows))
    else:
        print("No block has failed a check.")
    return True


def _now(arena: str, block: Quarantine) -> Inspected:
    if not block.kept:
        return Inspected("gone")
    try:
        path = Arena.path_of(switching.plain(arena))
        return inspect(path, block.slot, block.generation, bytes.fromhex(block.key))
    except (ArenaError, FileNotFoundError):  # the engine ended since it was listed
        return Inspected("gone")


def _table(rows: list[Row]) -> Table:
    drawn = Table(title_justify="left")
    for name in ("when", "slot", "key", "group", "why", "blocks", "now", "arena"):
        drawn.add_column(name)
    for row in rows:
        block, slot = row.block, row.slot
        ranks = f" (rank {', '.join(map(str, slot.bad_ranks))})" if slot.bad_ranks else ""
        drawn.add_row(
            datetime.fromtimestamp(block.at_s).astimezone().isoformat(" ", "seconds"),
            str(block.slot),
            block.key[:KEY_CHARS],
            "" if slot.group is None else str(slot.group),
            block.reason,
            f"{block.blocks:,}",
            TOLD[slot.found] + ranks,
            switching.plain(row.arena),
        )
    return drawn
