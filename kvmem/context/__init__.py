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
from kvmem.context.mask import CallFormat, Mask, mask
from kvmem.context.mistral import MistralRenderer
from kvmem.context.offload import BlobStore, Stub
from kvmem.context.probe import Break, probe
from kvmem.context.renderer import ChatRenderer, Renderer
from kvmem.context.seal import Finding, find_volatile, move_to_tail
from kvmem.context.tail import Recital, anthropic_breakpoints, openai_breakpoints, vary

__all__ = [
    "BlobStore",
    "Break",
    "CallFormat",
    "Change",
    "ChatRenderer",
    "Drop",
    "Edit",
    "Finding",
    "Ledger",
    "Mask",
    "MistralRenderer",
    "Quote",
    "Recital",
    "Renderer",
    "Replace",
    "Span",
    "Stub",
    "Undo",
    "anthropic_breakpoints",
    "find_volatile",
    "mask",
    "move_to_tail",
    "openai_breakpoints",
    "probe",
    "vary",
]
