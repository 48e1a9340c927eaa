"""Hugging Face transformers with a KV cache that outlives a call: an engine without a server.

store = PrefixStore(model, host_gb=2)
out = store.generate(input_ids, max_new_tokens=64)
print(out.tokens, out.report)

with store.open(input_ids) as cache:  # the same in steps
    tokens = model.generate(input_ids, past_key_values=cache, max_new_tokens=64)
    cache.keep()
"""

from __future__ import annotations

from kvmem.engines.transformers.blocks import BlockCache
from kvmem.engines.transformers.store import Generated, PrefixStore, Restored

__all__ = ["BlockCache", "Generated", "PrefixStore", "Restored"]
