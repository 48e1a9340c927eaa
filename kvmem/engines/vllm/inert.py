"""The connector of an engine that kvmem does not know: every hook answers that nothing is here.

It stands on as little of vLLM as can be: the hooks that vLLM asks of every connector, and the
base class's own answers for the others, which are neutral.
"""

from __future__ import annotations

import abc
import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base

from kvmem.engines.vllm import interface

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["InertConnector"]

log = logging.getLogger("kvmem")


class _NoOrders(base.KVConnectorMetadata):
    """A step's orders, of which there are none; the engine wants an object."""


# Without this mark vLLM would give a hybrid model another cache than it has without kvmem.
_ALL_GROUPS: Any = getattr(base, "SupportsHMA", object)


class InertConnector(base.KVConnectorBase_V1, _ALL_GROUPS):
    """Does nothing, after one line in the log of the engine's core that says why."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: base.KVConnectorRole,
        kv_cache_config: Any = None,
        *more: Any,
        **named: Any,
    ) -> None:
        # An engine of before 0.27 gives two arguments, and takes no more.
        given = () if kv_cache_config is None else (kv_cache_config, *more)
        super().__init__(vllm_config, role, *given, **named)
        if role == base.KVConnectorRole.SCHEDULER:  # there may be many workers
            log.warning("kvmem: %s", interface.why_off())

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is delivered."""
        return False

    def get_num_new_matched_tokens(self, *_: Any, **__: Any) -> tuple[int, bool]:
        """None."""
        return 0, False

    def build_connector_meta(self, *_: Any, **__: Any) -> base.KVConnectorMetadata:
        """No orders."""
        return _NoOrders()

    def request_finished(self, *_: Any, **__: Any) -> tuple[bool, None]:
        """The blocks are the engine's to free; there is no receipt."""
        return False, None

    def request_finished_all_groups(self, *_: Any, **__: Any) -> tuple[bool, None]:
        """The same, where there are several KV-cache groups."""
        return False, None

    def reset_cache(self) -> bool:
        """There is nothing to forget."""
        return True


def _nothing(self: InertConnector, *_: Any, **__: Any) -> None:
    """An answer to a hook that an engine calls and wants no answer of."""


for _name in InertConnector.__abstractmethods__:
    setattr(InertConnector, _name, _nothing)
abc.update_abstractmethods(InertConnector)
