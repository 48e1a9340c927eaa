"""kvmem's entry points in vLLM: `vllm.general_plugins`, and the name of its endpoint's."""

from __future__ import annotations

__all__ = ["CONNECTOR_MODULE", "CONNECTOR_NAME", "ENDPOINT_NAME", "PAGE_NAME", "register"]

CONNECTOR_NAME = "KvmemConnector"
CONNECTOR_MODULE = "kvmem.engines.vllm.entry"
# Not the connector's: who names that one in VLLM_PLUGINS has not asked for a route.
ENDPOINT_NAME = "kvmem_switch"
PAGE_NAME = "kvmem_dashboard"


def register() -> None:
    """Makes `kv_connector: KvmemConnector` known to vLLM; asked twice, it does nothing more.

    vLLM calls this in the front end, the engine core and every worker.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)
