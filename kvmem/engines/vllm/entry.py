"""What vLLM's configuration names: `KvmemConnector`, as this environment's vLLM can have it.

Where that lacks something kvmem needs, it is a stand-in that does nothing (`inert`), so that the
engine runs as if kvmem were not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmem.engines.vllm import interface

if TYPE_CHECKING or interface.why_off() is None:
    from kvmem.engines.vllm.connector import KvmemConnector
else:
    from kvmem.engines.vllm.inert import InertConnector as KvmemConnector

__all__ = ["KvmemConnector"]
