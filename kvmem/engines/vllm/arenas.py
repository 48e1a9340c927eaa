"""An engine's arena and the disk below it; the arena's name, by which vLLM's API servers find it.

An engine that was given no name by the setting `arena` takes its connector's engine id and its
pid. vLLM makes that id once, as it reads its flags: all API servers of an engine have the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmem import events
from kvmem.cache import Cache
from kvmem.config import Config
from kvmem.engines.vllm.geometry import Geometry
from kvmem.engines.vllm.plugin import CONNECTOR_NAME
from kvmem.errors import CapacityError, ConfigError
from kvmem.node.attaching import hello_of
from kvmem.node.client import NodeCache
from kvmem.store import Arena, Disk, list_live
from kvmem.store.far import Far, open_far
from kvmem.store.layout import slots_within
from kvmem.types import Namespace

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

__all__ = ["arena_name", "arenas_of", "check_node", "make_arena", "open_cache", "open_tiers"]

ID_CHARACTERS = 40


def arena_name(config: Config, engine_id: str) -> str:
    """The name of the arena that this process makes."""
    return config.arena or f"{_stem(engine_id)}-{os.getpid()}"


def make_arena(
    config: Config, vllm_config: VllmConfig, geometry: Geometry, namespace: Namespace
) -> Arena:
    """This engine's arena, of as many slots as host_gb holds; with a node, whose arena the blocks
    lie in, of one: for its switch, and what tools read.

    Raises:
        CapacityError, ConfigError, ArenaInUse: naming the setting.
    """
    slot_bytes = geometry.slot_bytes
    ranks = vllm_config.parallel_config.tensor_parallel_size
    whole = config.node is None
    n_slots = slots_within(config.host_bytes, slot_bytes, ranks=ranks) if whole else 1
    if n_slots < 1:
        raise CapacityError(
            f"kvmem's host_gb of {config.host_gb} holds no block of "
            f"{slot_bytes * ranks:,} bytes ({geometry.block_tokens} tokens)",
            next_step=f"Set host_gb to at least {slot_bytes * ranks / 2**30:.3f}, "
            "or a smaller --block-size.",
            setting="host_gb",
        )
    transfer = vllm_config.kv_transfer_config
    return Arena.create(
        arena_name(config, str(transfer and transfer.engine_id)),
        n_slots=n_slots,
        slot_bytes=slot_bytes,
        namespace=namespace.digest,
        ranks=ranks,
        label=str(vllm_config.model_config.model),
    )


def open_tiers(
    config: Config, arena: Arena, namespace: Namespace, bus: events.Bus
) -> tuple[Disk | None, Far | None]:
    """The tiers below the arena that disk_gb and far ask for; where one can't be, all go.

    Raises:
        CapacityError, ConfigError: naming the setting.
    """
    disk = None
    try:
        if config.disk_bytes:
            root, codec = Path(config.disk_path).expanduser(), config.disk_codec == "auto"
            disk = Disk(root, config.disk_bytes, arena, namespace.digest, bus, codec=codec)
        if config.far is None:
            return disk, None
        return disk, open_far(config.far, arena, namespace.digest, bus, os.environ)
    except BaseException:
        if disk is not None:
            disk.close()
        arena.close(unlink=True)
        raise


def open_cache(
    config: Config,
    arena: Arena,
    geometry: Geometry,
    bus: events.Bus,
    tiers: tuple[Disk | None, Far | None],
    node: dict[str, Any],
) -> Cache | NodeCache:
    """The cache of this engine, or the client of the node that the setting names.

    `node`: what `NodeCache` wants to know beside that.
    """
    header = arena.header
    if config.node is None:
        return Cache(
            header.n_slots,
            geometry.shapes,
            eviction=config.eviction,
            bus=bus,
            mover=tiers[0],
            carrier=tiers[1],
        )
    hello = hello_of(
        namespace=header.namespace,
        slot_bytes=header.slot_bytes,
        ranks=header.ranks,
        groups=geometry.shapes,
        label=header.label,
    )
    return NodeCache(Path(config.node).expanduser(), hello, bus=bus, **node)


def check_node(config: Config) -> None:
    """Refuses settings that are the node's where there is one.

    Raises:
        ConfigError: naming the setting.
    """
    if config.node is not None and config.eviction == "agents":
        raise ConfigError(
            "kvmem's setting 'eviction' cannot be 'agents' where 'node' is set",
            next_step="Leave out one of them: a node's own orders are s3fifo and lru.",
            setting="eviction",
        )
    for name in ("disk_gb", "far") if config.node is not None else ():
        if getattr(config, name):
            raise ConfigError(
                f"kvmem's setting {name!r} is the node's where 'node' is set",
                next_step=f"Give it to `kvmem node`, and leave out {name} or node here.",
                setting=name,
            )


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
