"""Prompts as append-only ledgers of token ids: what was sent once is never sent in other tokens.

renderer = ChatRenderer.of(tokenizer)
ledger = Ledger.open(renderer, system="You are a planner.", tools=tools, session_id="planner")
ledger.append({"role": "user", "content": "..."})
body = ledger.request("chat", model=...)      # exact token ids
ledger.commit(response)                       # the sampled ids, never the text
"""

from __future__ import annotations

from kvmem.context.epochs import Drop, Edit, Quote, Replace, Undo
from kvmem.context.ledger import Change, Ledger, Span
from kvmem.context.probe import Break, probe
from kvmem.context.renderer import ChatRenderer, Renderer
from kvmem.context.seal import Finding, find_volatile

__all__ = [
    "Break",
    "Change",
    "ChatRenderer",
    "Drop",
    "Edit",
    "Finding",
    "Ledger",
    "Quote",
    "Renderer",
    "Replace",
    "Span",
    "Undo",
    "find_volatile",
    "probe",
]
