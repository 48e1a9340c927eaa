"""Mistral's own tokenizers, of the package `mistral-common`: their conversations are ids, no text.

They are numbered. Up to 3 the system prompt and the tools stand in the *last* user message, so
every turn rewrites history: such a one can only be opened without either. From 7 on the system
prompt comes first, the tools still do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from kvmem.context.renderer import BASES, CALL, Message, canonical
from kvmem.errors import PrefixBroken

__all__ = ["MistralRenderer"]

_STAND_IN = "Good day."


class MistralRenderer:
    """A `mistral_common` tokenizer as a renderer: `MistralRenderer.of(folder / "tekken.json")`.

    Args:
        answering: the tokenizer for conversations that end with a user or a tool.
        answered: the same tokenizer for those that end with the model.
        name: what it was made from: bytes of the file, hashed.
    """

    def __init__(self, answering: Any, answered: Any, name: str) -> None:
        self._answering, self._answered, self._digest = answering, answered, name

    @classmethod
    def of(cls, path: Any) -> MistralRenderer:
        """From a `tekken.json` or `tokenizer.model.vN` of a Mistral checkpoint."""
        from pathlib import Path

        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        file = Path(path)
        both = [
            MistralTokenizer.from_file(str(file), mode=mode)
            for mode in (ValidationMode.test, ValidationMode.finetuning)
        ]
        name = f"{file.name}\0".encode() + file.read_bytes()
        return cls(both[0], both[1], hashlib.sha256(name).hexdigest())

    @property
    def digest(self) -> str:
        """See `Renderer`."""
        return self._digest

    def whole(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Ids of a conversation as Mistral's package makes them.

        Raises:
            PrefixBroken: it refuses the conversation.
        """
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        last = messages[-1]["role"] if messages else "user"
        tokenizer = self._answered if last == "assistant" else self._answering
        try:
            asked = ChatCompletionRequest.from_openai(
                [_plain(m) for m in messages], tools=list(tools) or None
            )
            return [int(i) for i in tokenizer.encode_chat_completion(asked).tokens]
        except Exception as error:  # of the package: it has a tree of its own, and pydantic's
            raise PrefixBroken(
                f"Mistral's tokenizer refuses this conversation: {error}",
                next_step="Give messages in the order and with the fields that the model knows.",
            ) from error

    def encode(self, text: str) -> list[int]:
        """See `Renderer`."""
        base = self._answering.instruct_tokenizer.tokenizer
        return [int(i) for i in base.encode(text, bos=False, eos=False)] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """See `Renderer`."""
        return str(self._answering.decode(list(ids)))

    def _added(self, before: list[int], after: list[int], what: str) -> list[int]:
        if after[: len(before)] != before:
            pairs = zip(before, after, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(after))
            raise PrefixBroken(
                f"Mistral's tokenizer rewrites what came before {what}, from token {at} on",
                next_step="Open the ledger without system prompt and tools, or use version 7 on.",
                at=at,
            )
        return after[len(before) :]

    def head(self, system: str | None, tools: Sequence[Any]) -> list[int]:
        """See `Renderer`."""
        first = [] if system is None else [{"role": "system", "content": system}]
        user = BASES["user"][0]
        whole = self.whole([*first, user], tools)
        added = self.suffix("assistant", user)
        if not added or whole[-len(added) :] != added:
            raise PrefixBroken(
                "Mistral's tokenizer puts the system prompt or the tools into a user's message",
                next_step="Open the ledger without them, or use a tokenizer of version 7 on.",
            )
        return whole[: len(whole) - len(added)]

    def suffix(self, last_role: str, message: Message) -> list[int]:
        """See `Renderer`."""
        base = BASES["assistant" if last_role == "system" else last_role]
        what = f"a message of role {message['role']}"
        return self._added(self.whole(base), self.whole([*base, message]), what)

    def generation(self, last_role: str) -> list[int]:
        """See `Renderer`: the end of the user's message asks already."""
        return []

    def close(self) -> list[int]:
        """See `Renderer`."""
        base = BASES["user"]
        said = self.whole([*base, {"role": "assistant", "content": _STAND_IN}])
        return self._added([*self.whole(base), *self.encode(_STAND_IN)], said, "the turn's end")


def _plain(message: Message) -> dict[str, Any]:
    """As the package takes it: a call's arguments are text."""
    plain = dict(message)
    calls = plain.get("tool_calls")
    if calls:
        plain["tool_calls"] = [{**CALL, **call, "function": _function(call)} for call in calls]
    return plain


def _function(call: Any) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = canonical(function.get("arguments")).decode()
    return function
