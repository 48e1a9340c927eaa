"""What belongs at the end of a prompt: the plan said again, the clock, and where caches may cut.

recital = Recital(budget_chars=2000)
text = recital.next(plan)   # None where the plan is what was last said
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from kvmem.errors import CapacityError

__all__ = [
    "ANTHROPIC_MOST",
    "OPENAI_MOST",
    "Recital",
    "anthropic_breakpoints",
    "openai_breakpoints",
    "vary",
]

ANTHROPIC_MOST = 4  # cache_control marks in a request
# A request of theirs writes four prefixes, one of which they choose themselves.
OPENAI_MOST = 3


class Recital:
    """Says a plan again at the tail, so that it is near; unchanged text is not said twice.

    Args:
        budget_chars: of all that is ever said; beyond it nothing is.
    """

    def __init__(self, *, budget_chars: int) -> None:
        self._left = budget_chars
        self._last = ""

    def next(self, text: str) -> str | None:
        """What to append now: the text, or None where it was said already.

        Raises:
            CapacityError: the budget is used up; the plan stands where it was last said.
        """
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest == self._last:
            return None
        if len(text) > self._left:
            raise CapacityError(
                f"The recital has {self._left:,} characters left, the text has {len(text):,}",
                next_step="Say less, or give it a larger budget_chars.",
                setting="budget_chars",
            )
        self._left -= len(text)
        self._last = digest
        return text


def vary(choices: Sequence[str], *, seed: str, turn: int) -> str:
    """One of several wordings, the same for a seed and turn: chosen before it is committed, so that
    nothing that was sent ever changes, and the model does not copy its own last answers."""
    return random.Random(f"{seed}/{turn}").choice(list(choices))


def anthropic_breakpoints(
    messages: Sequence[Mapping[str, Any]], *, stable: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The messages in Anthropic's form with `cache_control` where prefixes are likely to be asked
    for again: at `stable` messages, and at the last two, so that the next turn finds this one.

    At most four marks, the latest that are wanted (Anthropic's documentation, prompt caching).
    """
    marked = _latest(range(len(messages)), stable, ANTHROPIC_MOST)
    return [
        _marked(message, "cache_control", {"type": "ephemeral"}) if index in marked else message
        for index, message in enumerate(map(_in_blocks, messages))
    ]


def openai_breakpoints(
    messages: Sequence[Mapping[str, Any]], *, stable: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """As `anthropic_breakpoints`, for OpenAI's chat completions: `prompt_cache_breakpoint` on the
    last part of a message's content.

    At most three marks. What the model said can carry none: there the mark is on the message before
    it. (OpenAI's guide to prompt caching; models from gpt-5.6 on, others refuse it.)
    """
    can = [index for index, message in enumerate(messages) if message.get("role") != "assistant"]
    before = [max((i for i in can if i <= index), default=-1) for index in stable]
    marked = _latest(can, before, OPENAI_MOST)
    return [
        _marked(_in_blocks(message), "prompt_cache_breakpoint", {"mode": "explicit"})
        if index in marked
        else dict(message)
        for index, message in enumerate(messages)
    ]


def _latest(can: Sequence[int], stable: Sequence[int], most: int) -> set[int]:
    return set(sorted({*(i for i in stable if i in can), *can[-2:]})[-most:])


def _in_blocks(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    blocks: list[dict[str, Any]] = (
        [{"type": "text", "text": content}]
        if isinstance(content, str)
        else [dict(block) for block in content]
    )
    return {**message, "content": blocks}


def _marked(message: dict[str, Any], name: str, mark: dict[str, str]) -> dict[str, Any]:
    blocks = message["content"]
    if blocks:
        blocks[-1] = {**blocks[-1], name: mark}
    return message
