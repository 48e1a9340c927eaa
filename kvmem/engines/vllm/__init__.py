"""vLLM: a `KVConnectorBase_V1` in two halves, the scheduler's and the worker's.

`plugin.register` is the `vllm.general_plugins` entry point; with it one flag is enough:
`--kv-transfer-config '{"kv_connector": "KvmemConnector", "kv_role": "kv_both"}'`.
Nothing here imports vLLM until the engine asks for the connector.
"""
