"""kvmem: a KV-cache context-engineering manager; each token is paid for once.

`import kvmem` is light: the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmem.cache import Cache
    from kvmem.config import Config
    from kvmem.errors import KVMemError
    from kvmem.hashing import BlockHasher
    from kvmem.types import GroupShape

__all__ = ["BlockHasher", "Cache", "Config", "GroupShape", "KVMemError", "__version__"]

__version__ = "0.1.0"

_WHERE = {
    "BlockHasher": "kvmem.hashing",
    "Cache": "kvmem.cache",
    "Config": "kvmem.config",
    "GroupShape": "kvmem.types",
    "KVMemError": "kvmem.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'kvmem' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
