"""From messages to token ids, a message at a time: only what is new is rendered and encoded.

A chat template is a program over the whole conversation. Most of them make each message's text from
that message alone; then the text of new messages is what they add to *any* conversation that ends
like this one, and a short stand-in serves for the history however long that is.
`kvmem.context.probe` proves it for a model, or says which rule its template breaks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from kvmem.errors import PrefixBroken

__all__ = ["BASES", "CALL", "ChatRenderer", "Message", "Probed", "Renderer", "canonical"]

Message = Mapping[str, Any]
CALL = {
    "id": "call00000",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"key": "value"}},
}
# A short conversation that ends with each role.
BASES: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "Hello."}],
    "assistant": [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Good day."},
    ],
    "tool": [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00000", "name": "look_up", "content": "found"},
    ],
}


def canonical(value: Any) -> bytes:
    """JSON of one form: keys in order, no blanks, UTF-8; equal values are equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str
    ).encode()


class Renderer(Protocol):
    """What a ledger asks of a model's template and tokenizer. Every answer is a list of ids."""

    @property
    def digest(self) -> str:
        """64 hex digits: template and tokenizer. A saved ledger is opened with the same only."""
        ...

    def head(self, system: str | None, tools: Sequence[Any]) -> list[int]:
        """What a conversation begins with, before its first message."""
        ...

    def suffix(self, last_role: str, message: Message) -> list[int]:
        """What a message adds to a conversation that ends with `last_role` ("system": none yet)."""
        ...

    def generation(self, last_role: str) -> list[int]:
        """What asks the model for its turn."""
        ...

    def close(self) -> list[int]:
        """What ends the model's turn."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself, no special tokens added; none for an empty one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text, for people and for comparing messages; never rendered again."""
        ...


@runtime_checkable
class Probed(Renderer, Protocol):
    """A renderer that can say what the whole would be, so that its pieces can be held to it."""

    def whole(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Ids of a whole conversation, as a server makes them from its messages."""
        ...


class ChatRenderer:
    """A Hugging Face tokenizer's own chat template.

    Never changes; the tokenizer is the caller's and must not change either.

    Args:
        tokenizer: with `apply_chat_template`, `encode` or `__call__`, and `decode`.
        system: the stand-in's system message; templates that know none are given none.
        template: extra arguments of the template (`enable_thinking=False`).
    """

    def __init__(self, tokenizer: Any, **template: Any) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._suffixes: dict[tuple[str, bytes], list[int]] = {}
        self._tools: Sequence[Any] = ()
        self._system = self._knows_system()
        parts = [str(tokenizer.chat_template), canonical(template).decode()]
        parts += [str(len(tokenizer)), repr(self._ids("Hello, wörld! 你好 <tool> {}\n\n"))]
        self._digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @classmethod
    def of(cls, tokenizer: Any, **template: Any) -> ChatRenderer:
        """The renderer of a tokenizer; what it cannot do the probe says when a ledger is opened."""
        return cls(tokenizer, **template)

    @property
    def digest(self) -> str:
        """See `Renderer`."""
        return self._digest

    # -- text --------------------------------------------------------------------------------

    def text(
        self, messages: Sequence[Message], *, tools: Sequence[Any] = (), generation: bool = False
    ) -> str:
        """The whole conversation as the template makes it.

        Raises:
            PrefixBroken: the template refuses it.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(m) for m in messages],
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self._template,
                )
            )
        except Exception as error:  # jinja's own errors, and whatever a template raises
            raise PrefixBroken(
                f"The chat template refuses this conversation: {error}",
                next_step="Give messages in the order and with the fields that the model knows.",
            ) from error

    def whole(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """See `Probed`."""
        return self._ids(self.text(messages, tools=tools))

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself, no special tokens added."""
        return self._ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Renderer`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _knows_system(self) -> bool:
        try:
            told = self.text([{"role": "system", "content": "Be brief."}, *BASES["user"]])
        except PrefixBroken:
            return False
        return "Be brief." in told

    # -- pieces ------------------------------------------------------------------------------

    def _base(self, last_role: str) -> list[dict[str, Any]]:
        first = [{"role": "system", "content": "Be brief."}] if self._system else []
        if last_role == "system":
            return first
        if last_role not in BASES:
            raise PrefixBroken(
                f"A message of role {last_role!r} is not known",
                next_step="Use system, user, assistant or tool.",
                role=last_role,
            )
        return [*first, *BASES[last_role]]

    def _added(self, before: str, after: str, what: str) -> str:
        """What `after` has beyond `before`; the template must have left that as it was."""
        if not after.startswith(before):
            at = next(
                (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
                min(len(before), len(after)),
            )
            raise PrefixBroken(
                f"The chat template rewrites what came before {what}, from character {at} on",
                next_step="See kvmem.context.probe for the rule that it breaks.",
                at=at,
            )
        return after[len(before) :]

    def head(self, system: str | None, tools: Sequence[Any]) -> list[int]:
        """See `Renderer`: the text of system and first user message, less what the latter adds."""
        given = [] if system is None else [{"role": "system", "content": system}]
        user = BASES["user"][0]
        whole = self.text([*given, user], tools=tools)
        two = self.text([*given, user, *BASES["assistant"][1:], user], tools=tools)
        one = self.text([*given, user, *BASES["assistant"][1:]], tools=tools)
        added = self._added(one, two, "a user's message")
        if not whole.endswith(added):
            raise PrefixBroken(
                "The chat template makes the first user message otherwise than later ones",
                next_step="Open the ledger with a system message, or another renderer.",
            )
        return self._ids(whole[: len(whole) - len(added)])

    def suffix(self, last_role: str, message: Message) -> list[int]:
        """See `Renderer`. Repeated messages are encoded once."""
        key = (last_role, canonical(message))
        known = self._suffixes.get(key)
        if known is None:
            base = self._base(last_role)
            if last_role == "system":
                # Some templates know no conversation without a user's message.
                base = self._base("assistant")
            before, after = self.text(base), self.text([*base, message])
            known = self._ids(self._added(before, after, f"a message of role {message['role']}"))
            if len(self._suffixes) > 4096:
                self._suffixes.clear()
            self._suffixes[key] = known
        return list(known)

    def generation(self, last_role: str) -> list[int]:
        """See `Renderer`."""
        base = self._base("user" if last_role == "system" else last_role)
        asked = self.text(base, generation=True)
        return self._ids(self._added(self.text(base), asked, "the model's turn"))

    def close(self) -> list[int]:
        """See `Renderer`: what follows the content of an assistant's message."""
        base = self._base("user")
        asked = self.text(base, generation=True)
        said = self.text([*base, {"role": "assistant", "content": "Good day."}])
        rest = self._added(asked + "Good day.", said, "the end of the model's turn")
        return self._ids(rest)
