"""The `vllm.general_plugins` entry point."""

from __future__ import annotations

__all__ = ["CONNECTOR_MODULE", "CONNECTOR_NAME", "register"]

CONNECTOR_NAME = "KvmemConnector"
CONNECTOR_MODULE = "kvmem.engines.vllm.entry"


def register() -> None:
    """Makes `kv_connector: KvmemConnector` known to vLLM; asked twice, it does nothing more.

    vLLM calls this in the front end, the engine core and every worker.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)
