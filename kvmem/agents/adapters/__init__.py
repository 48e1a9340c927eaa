"""Agent frameworks on kvmem: each in a module of its own, which imports its framework.

An adapter names the session, so that `kvmem gateway` finds its ledger; it announces when tools
start and end; and it says so when the framework sends a history that no longer begins with what was
sent before. It changes nothing of what the model reads (docs/frameworks.md).
"""

from __future__ import annotations

from kvmem.agents.adapters.gaps import Conversation, Conversations
from kvmem.agents.adapters.telling import EngineAnnouncer

__all__ = ["Conversation", "Conversations", "EngineAnnouncer"]
