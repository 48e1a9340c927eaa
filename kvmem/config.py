"""The settings: about ten, each with a unit, a default, a reason and a cost.

They arrive as the engine's `kv_connector_extra_config` (or `kvmem serve --kvmem-SETTING`). An
unknown one stops the start. docs/operations.md prints the table that `describe()` returns.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvmem.errors import ConfigError

__all__ = ["Config", "Setting", "describe"]

Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a user may set; see `describe()` for units, reasons and costs."""

    host_gb: Annotated[float, Meta(gt=0.0, le=1048576.0)] = 4.0
    disk_gb: Annotated[float, Meta(ge=0.0, le=1048576.0)] = 0.0
    disk_path: Annotated[str, Meta(min_length=1)] = "~/.cache/kvmem/blocks"
    disk_codec: Literal["auto", "none"] = "auto"
    approximate_salt: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    far: Annotated[str, Meta(min_length=1, max_length=4000)] | None = None
    node: Annotated[str, Meta(min_length=1, max_length=4000)] | None = None
    arena: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] | None = None
    eviction: Literal["agents", "s3fifo", "lru"] = "s3fifo"
    load: bool = True
    store: bool = True
    verify_share: Share = 1.0
    scrub_mb_s: Annotated[float, Meta(ge=0.0, le=1e6)] = 64.0
    shadow_share: Share = 0.001
    copy_threads: Annotated[int, Meta(ge=0, le=64)] = 0
    weights_digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")] | None = None
    event_log: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    throttle_gb_s: Annotated[float, Meta(ge=0.0)] = 0.0

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Config:
        """The settings checked, or one error that names the setting.

        Raises:
            ConfigError: an unknown setting, a wrong type or a value out of range.
        """
        known = {s.name for s in describe()}
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
                )
                raise ConfigError(f"kvmem has no setting {name!r}", next_step=hint, setting=name)
        for name, value in settings.items():
            try:
                msgspec.convert({name: value}, cls)
            except msgspec.ValidationError as error:
                raise ConfigError(
                    f"kvmem's setting {name!r} cannot be {value!r}: {error}",
                    next_step=f"Give it as docs/operations.md says ({_DOC[name].unit}).",
                    setting=name,
                    value=value,
                ) from error
        return msgspec.convert(dict(settings), cls)

    @property
    def host_bytes(self) -> int:
        """The host tier's budget in bytes (1 GB here is 2**30 bytes)."""
        return int(self.host_gb * 2**30)

    @property
    def disk_bytes(self) -> int:
        """The disk tier's budget in bytes; 0 is no disk tier."""
        return int(self.disk_gb * 2**30)


class Setting(msgspec.Struct, frozen=True):
    """One row of the settings table."""

    name: str
    unit: str
    default: Any
    reason: str
    cost: str


_DOC: dict[str, Setting] = {}


def describe() -> tuple[Setting, ...]:
    """Every setting with its unit, default, reason and cost, in the order of `Config`."""
    return tuple(_DOC.values())


def _document(name: str, unit: str, reason: str, cost: str) -> None:
    field = next(f for f in msgspec.structs.fields(Config) if f.name == name)
    _DOC[name] = Setting(name, unit, field.default, reason, cost)


_document(
    "host_gb",
    "GiB of shared memory",
    "How much KV the host tier keeps; the one dial that matters.",
    "Reserved in /dev/shm at start, in full.",
)
_document(
    "disk_gb",
    "GiB of disk, 0 for none",
    "How much KV is kept on disk, over restarts; blocks are copied there when they are stored.",
    "Disk space and its bandwidth; nothing of the engine waits for a write.",
)
_document(
    "disk_path",
    "folder",
    "Where the disk tier lies: a local, fast disk. Engines of other models may share it.",
    "What is in it counts towards disk_gb.",
)
_document(
    "disk_codec",
    "auto or none",
    "auto stores blocks shorter, and exact, where measuring the first of them shows that it pays.",
    "zstd on the disk's own threads, at a write and at a read.",
)
_document(
    "approximate_salt",
    "prefix of cache_salt, or unset for none",
    "Requests whose cache_salt begins so may be answered from int8: half the disk, approximately.",
    "They share no block with requests of other salts; bench_codec has how near they are.",
)
_document(
    "far",
    "URL such as redis://host:6379, or unset for none",
    "A store that hosts share: what one of them has computed the others find (docs/far.md).",
    "Blocks are copied there when they are stored; a prompt that is new waits for one round trip.",
)
_document(
    "node",
    "folder, or unset for a cache of its own",
    "The --path of a kvmem node on this host, whose blocks all its engines share (docs/node.md).",
    "What the node is started with holds, not host_gb, disk_gb, far, eviction and scrub_mb_s here.",
)
_document(
    "arena",
    "name, or unset for one per engine",
    "A fixed name lets tools find this engine's arena.",
    "A second engine with the same name is refused.",
)
_document(
    "eviction",
    "agents, s3fifo or lru",
    "Which blocks leave first; s3fifo is not emptied by a scan of one-off prompts, agents learns "
    "when each conversation comes back and takes hints (docs/policy.md).",
    "lru loses an agent's prompt to a burst of prompts used once.",
)
_document("load", "true or false", "Answer prompts from kvmem.", "false: every block is computed.")
_document("store", "true or false", "Keep what was computed.", "false: nothing new can be reused.")
_document(
    "verify_share",
    "share of loaded blocks, 0 to 1",
    "Loaded bytes are compared with the checksum taken when they were written.",
    "Bytes are hashed as they are moved; bench_copy shows loads with it and without.",
)
_document(
    "scrub_mb_s",
    "MB/s, 0 for none",
    "Blocks that nobody asks for are compared with their checksums: 4 GB take a minute.",
    "So much of the memory's bandwidth, in bursts of 4 MiB; 64 MB/s took 1.3 % of a core.",
)
_document(
    "shadow_share",
    "share of hits, 0 to 1",
    "So many prompts that could be loaded are computed all the same, and compared.",
    "They take as long as without kvmem.",
)
_document(
    "copy_threads",
    "threads, 0 for the machine's cores up to 4",
    "Copies between device and host.",
    "Cores that the model's forward pass could use.",
)
_document(
    "weights_digest",
    "64 hex digits, or unset",
    "Names the weights when they have no files (dummy or remote weights).",
    "A wrong one serves KV of other weights: set it only if you must.",
)
_document(
    "event_log",
    "file, or unset for none",
    "What kvmem does, one line of JSON an event, for a log collector; private to its user.",
    "Up to 128 MiB of disk, in two files; a thread that writes four times a second.",
)
_document(
    "throttle_gb_s",
    "GB/s, 0 for none",
    "Benchmarks only: makes this machine's tiers as slow, for its model, as a GPU's.",
    "Loads wait.",
)
