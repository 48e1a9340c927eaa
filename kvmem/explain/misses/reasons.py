"""The catalogue of reasons: why blocks of a prompt had to be computed, and what to do about it.

docs/explain.md shows it as a table, which a test holds.
"""

from __future__ import annotations

import msgspec

__all__ = ["CHANGED", "NAMES", "REASONS", "Reason", "fix_of"]


class Reason(msgspec.Struct, frozen=True):
    """A reason; `fix` is empty where there is nothing to do."""

    name: str
    what: str
    fix: str = ""


_KEEP = "Send the history as it was sent before; add what is new at its end."

REASONS: tuple[Reason, ...] = (
    Reason("first_time", "nobody had computed these tokens after these"),
    Reason("input_changed", "a message of the history is another one than before", _KEEP),
    Reason("tools_changed", "the tools at the prompt's head are others, or in another order",
           "Send all tools always, sorted, and forbid those not wanted by tool_choice or a mask."),
    Reason("system_changed", "the system prompt is another one",
           "Keep it for the whole session, without clocks and ids; say what is new in a message."),
    Reason("template_rewrote_history",
           "the chat template renders the same messages otherwise than before",
           "Keep thinking in the history (clear_thinking=False), or use a token ledger."),
    Reason("retokenized", "the same text has other token ids than the model chose",
           "Append replies by their token ids, as a ledger does, and not as text."),
    Reason("tool_args_reserialized",
           "the arguments of a tool call are the same JSON, written otherwise",
           "Keep the arguments' text as the model wrote it, or serialise it canonically."),
    Reason("context_compacted", "the history gave way to something shorter",
           "Meant? Then compact at the end of a task, keeping what comes before the cut."),
    Reason("salt_changed", "the session came with another cache_salt before",
           "Keep one cache_salt for a session."),
    Reason("adapter_changed", "the session ran with another LoRA adapter, or other content of it",
           "Keep one adapter for a session; what was computed with another is of no use."),
    Reason("weights_changed", "the model's weights were changed while it ran"),
    Reason("block_floor",
           "shorter than a block, or the prompt's last token, which is always computed",
           "A smaller --block-size, where this is most of the prompt."),
    Reason("evicted", "the block was here and gave way to others",
           "A larger host_gb or disk_gb."),
    Reason("demoted_too_slow", "the block was on its way to or from the disk, and it took too long",
           "A faster disk, or a larger host_gb."),
    Reason("tier_error", "a tier failed: its copy could not be made or read",
           "See last_failure in kvmem stats."),
    Reason("quarantined", "the block failed a check, or hung below one that did",
           "See kvmem quarantine; where it happens again, test the memory and the disk."),
    Reason("disabled_by_request",
           "loads or stores were off: by request, setting, switch or a proof",
           "See `by`: the request's wishes, the settings, or kvmem switch."),
    Reason("pending", "another request was computing or storing the block at that moment",
           "Send one request first, and those that share its prompt when it has begun to answer."),
    Reason("cleared", "a reset took everything out of the cache"),
    Reason("not_stored",
           "it was computed before and no tier remembers it: there was no room, its request was "
           "aborted, or it left long ago",
           "A larger host_gb."),
    Reason("no_boundary", "it is here, but no state or window to resume from at that point"),
)  # fmt: skip

NAMES: tuple[str, ...] = tuple(reason.name for reason in REASONS)
# The ways in which a prompt can be another one than its predecessor.
CHANGED = frozenset(
    {
        "context_compacted",
        "input_changed",
        "retokenized",
        "system_changed",
        "template_rewrote_history",
        "tool_args_reserialized",
        "tools_changed",
    }
)
_FIXES = {reason.name: reason.fix for reason in REASONS}


def fix_of(name: str) -> str:
    """What to do about a reason; empty where there is nothing.

    Raises:
        KeyError: there is no such reason.
    """
    return _FIXES[name]
