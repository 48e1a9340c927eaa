"""`kvmem switch`: which engine is meant, what stands there, and a change of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kvmem.cli import live
from kvmem.errors import ArenaError, ConfigError
from kvmem.store import Arena, LiveArena, Switch, list_live, read_switch

__all__ = ["engines", "lines", "only", "plain"]


def engines(name: str | None) -> list[LiveArena]:
    """This user's running engines, or the one that `name` names.

    Args:
        name: as the setting `arena` takes it, or as `kvmem stats` shows it.

    Raises:
        ConfigError: engines run, but none has that name.
    """
    found = list_live()
    if name is None or not found:
        return found
    path = Arena.path_of(plain(name))
    named = [one for one in found if one.path == path]
    if not named:
        raise ConfigError(
            f"No running engine has the arena {name!r}",
            next_step=f"These run: {_names(found)}.",
            arena=name,
        )
    return named


def only(found: list[LiveArena]) -> Path:
    """The arena of the one engine that is meant.

    Raises:
        ConfigError: it could be several.
    """
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} engines are running", next_step=f"Add --arena, one of: {_names(found)}."
        )
    return found[0].path


def lines(found: list[LiveArena]) -> Iterator[str]:
    """A line an engine: what may load and store there, and who forbids it."""
    allowed = {page.arena: page.allowed for page in live.pages()}
    for one in found:
        try:
            now = _told(read_switch(one.path), allowed.get(one.path.name, Switch()))
        except (ArenaError, FileNotFoundError) as error:  # damaged, or ended since it was listed
            now = str(error)
        yield f"{_name(one)}: {now}  (pid {one.header.owner_pid}, {one.header.label})"


def _told(switch: Switch, allowed: Switch) -> str:
    def state(on: bool, setting: str, may: bool) -> str:
        return f"off by the setting '{setting}'" if not may else "on" if on else "off"

    return (
        f"loads {state(switch.loads, 'load', allowed.loads)}, "
        f"stores {state(switch.stores, 'store', allowed.stores)}"
    )


def plain(name: str) -> str:
    """An arena's name without what its file's has in front."""
    return name.removeprefix(f"kvmem-{os.getuid()}-")


def _name(one: LiveArena) -> str:
    return plain(one.path.name)


def _names(found: list[LiveArena]) -> str:
    return ", ".join(_name(one) for one in found)
