"""The catalogue of rules: what broke a prompt's prefix, and what to do about it.

docs/lint.md shows it as a table, which a test holds.
"""

from __future__ import annotations

import msgspec

__all__ = ["RULES", "Rule", "rule"]


class Rule(msgspec.Struct, frozen=True):
    """A way to break a prefix. `fixable`: `--fix` may put the earlier form back, where that says
    the same to a model.
    """

    id: str
    name: str
    what: str
    fix: str
    fixable: bool = False


def _rules() -> tuple[Rule, ...]:
    tail = "Move it to the end of the prompt, or write it once and keep it."
    keep = "Send the history as it was sent before; add what is new at its end."
    return (
        Rule("KV101", "volatile-time", "a date, a clock or a time stamp that moves", tail),
        Rule("KV102", "volatile-id", "a UUID or a random id, another in every request", tail),
        Rule("KV103", "volatile-counter", "a number in the system prompt or a tool that moves",
             tail),
        Rule("KV104", "volatile-path", "the path of a temporary file or folder",
             "Use a fixed path, or name the folder at the end of the prompt."),
        Rule("KV105", "system-changed", "the system prompt, in another way",
             "Keep the system prompt for the whole session; say what is new in a message."),
        Rule("KV106", "model-changed", "the model: another model's cache holds nothing of this",
             "Keep one model in a session, or give the other model a session of its own."),
        Rule("KV201", "tools-reordered", "the same tools in another order",
             "Sort the tools by name once.", fixable=True),
        Rule("KV202", "tools-changed", "tools added, taken away or described anew",
             "Send all tools always, and forbid the ones not wanted by tool_choice or by mask."),
        Rule("KV203", "json-reserialised",
             "the same JSON values with their keys in another order or spaced otherwise",
             "Keep the text of tool calls and schemas as it was, or serialise it canonically.",
             fixable=True),
        Rule("KV301", "history-edited", "a message of the history has another text", keep),
        Rule("KV302", "thinking-stripped", "the thinking of an earlier reply is gone",
             "Keep thinking in the history (clear_thinking=False, preserve_thinking)."),
        Rule("KV303", "whitespace-changed", "blanks or line ends trimmed or added",
             "Send the text as it was, without strip().", fixable=True),
        Rule("KV304", "history-truncated", "the oldest messages are gone",
             "Cut rarely and much, not a message a turn; or compact at a price known beforehand."),
        Rule("KV305", "history-compacted", "much of the history gave way to something shorter",
             "Meant? Then compact at the end of a task, keeping what comes before the cut."),
        Rule("KV306", "tool-result-cleared", "the result of a tool was shortened or replaced",
             "Leave a stub before the result is first sent, not afterwards."),
        Rule("KV307", "message-removed", "messages in the middle of the history are gone", keep),
        Rule("KV308", "message-inserted", "messages were put into the history", keep),
        Rule("KV309", "messages-reordered", "the same messages in another order", keep),
        Rule("KV310", "turn-undone", "the last messages were taken back",
             "Meant? Then fork here, so that the old branch's blocks are let go first."),
        Rule("KV311", "reply-rewritten", "a reply came back otherwise than the model gave it",
             "Append the reply as it was received, or by its token ids."),
        Rule("KV401", "ids-rewound", "only ids are known: the last ones were taken back",
             "Meant? Then fork here, so that the old branch's blocks are let go first."),
        Rule("KV402", "ids-compacted", "only ids are known: under a fifth of them are kept",
             "Meant? Then compact at the end of a task, keeping what comes before the cut."),
        Rule("KV403", "ids-edited", "only ids are known: they differ before their end", keep),
    )  # fmt: skip


RULES: tuple[Rule, ...] = _rules()
_BY_NAME = {rule.name: rule for rule in RULES}


def rule(name: str) -> Rule:
    """The rule of a name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]
