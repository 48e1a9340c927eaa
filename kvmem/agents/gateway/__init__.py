"""A gateway before OpenAI-compatible engines: text histories in, token-exact extensions out.

    kvmem gateway --upstream http://127.0.0.1:8000

Any client of OpenAI's chat completions and responses, or of Anthropic's messages, sends its history
as text again every turn. Here the beginning that is known is found and taken from its ledger, in
the ids that the engine sampled; only what is new is rendered (docs/gateway.md).
"""

from __future__ import annotations

from kvmem.agents.gateway.settings import Settings

__all__ = ["Settings"]
