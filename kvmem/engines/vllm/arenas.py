"""The names of engines' arenas, so that vLLM's API servers find the one of their own engine.

An engine that was given no name by the setting `arena` takes its connector's engine id and its
pid. vLLM makes that id once, as it reads its flags: all API servers of an engine have the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmem.config import Config
from kvmem.engines.vllm.plugin import CONNECTOR_NAME
from kvmem.store import Arena, list_live

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

__all__ = ["arena_name", "arenas_of"]

ID_CHARACTERS = 40


def arena_name(config: Config, engine_id: str) -> str:
    """The name of the arena that this process makes."""
    return config.arena or f"{_stem(engine_id)}-{os.getpid()}"


def arenas_of(transfer: KVTransferConfig | None) -> list[Path]:
    """The live arenas of the engine that was configured so, inside a MultiConnector too.

    Empty when it runs without kvmem, on another host or as another user, or has ended.
    """
    if transfer is None:
        return []
    live = [one.path for one in list_live()]
    found: list[Path] = []
    for settings, engine_id in _connectors(transfer):
        config = Config.parse(settings)
        if config.arena is not None:
            wanted = Arena.path_of(config.arena)
            found += [path for path in live if path == wanted]
        else:
            name = re.compile(re.escape(Arena.path_of(_stem(engine_id)).name) + r"-[0-9]+")
            found += [path for path in live if name.fullmatch(path.name)]
    return found


def _connectors(transfer: KVTransferConfig) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Settings and engine id of each kvmem connector."""
    engine_id, extra = str(transfer.engine_id), transfer.kv_connector_extra_config
    if transfer.kv_connector == CONNECTOR_NAME:
        yield extra, engine_id
    for inner in extra.get("connectors") or ():
        if inner.get("kv_connector") == CONNECTOR_NAME:
            yield inner.get("kv_connector_extra_config") or {}, inner.get("engine_id", engine_id)


def _stem(engine_id: str) -> str:
    plain = "".join(c for c in engine_id if c.isascii() and c.isalnum())
    return plain[:ID_CHARACTERS] or "engine"
