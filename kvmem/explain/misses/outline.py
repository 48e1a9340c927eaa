"""What a prompt is made of, span by span, small enough to be sent with it and kept.

A ledger knows which message each token comes from; the engine does not. An outline tells it: for
each span its role, its end, whether a model sampled it, and two digests of its message. `said` is
over what the message says, with JSON in its canonical form, `form` over how it is written. So two
outlines tell apart another message, the same one written otherwise, and the same one rendered or
tokenised otherwise, and hold no text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

__all__ = ["MOST_SPANS", "Outline", "OutlineSpan", "Verdict", "compare", "digests_of"]

_SPAN = struct.Struct("<BI4s4s")
_HEAD = struct.Struct("<BI4s4s")  # version, epoch, digest of the system prompt, of the tools
_VERSION = 1
MOST_SPANS = 2048  # the last of them are told; a longer history's first ones count as the head
ROLES = ("head", "system", "user", "assistant", "tool", "other")
_SAMPLED = 0x80


class OutlineSpan(msgspec.Struct, frozen=True):
    """Tokens up to `stop` come from one message of `role`."""

    role: str
    stop: int
    said: bytes
    form: bytes
    sampled: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """Why a prompt differs from an earlier one; `message` counts from 0 behind the head."""

    reason: str
    role: str = ""
    message: int | None = None
    epoch: int | None = None


class Outline(msgspec.Struct, frozen=True):
    """See the module. `packed` is what is kept and sent: 14 bytes a span."""

    packed: bytes

    @classmethod
    def make(
        cls, *, epoch: int, system: str | None, tools: Sequence[Any], spans: Iterable[OutlineSpan]
    ) -> Outline:
        """The outline of a prompt; the first span is the head."""
        told = list(spans)
        if len(told) > MOST_SPANS:
            told = [told[0], *told[1 - MOST_SPANS :]]
        parts = [_HEAD.pack(_VERSION, epoch, _short(system), _short(list(tools)))]
        for span in told:
            role = ROLES.index(span.role) if span.role in ROLES else len(ROLES) - 1
            parts.append(
                _SPAN.pack(role | (_SAMPLED if span.sampled else 0), span.stop, span.said[:4],
                           span.form[:4])
            )  # fmt: skip
        return cls(b"".join(parts))

    @classmethod
    def read(cls, text: str) -> Outline:
        """What `text` made.

        Raises:
            ValueError: it is no outline.
        """
        try:
            packed = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"outline is no base64: {error}") from None
        n, rest = divmod(len(packed) - _HEAD.size, _SPAN.size)
        if rest or not 1 <= n <= MOST_SPANS or packed[0] != _VERSION:
            raise ValueError(f"outline has {len(packed)} bytes that are none of version {_VERSION}")
        return cls(packed)

    def text(self) -> str:
        """As it is sent: base64."""
        return base64.b64encode(self.packed).decode()

    @property
    def epoch(self) -> int:
        """Of the ledger."""
        return int(_HEAD.unpack_from(self.packed)[1])

    @property
    def system(self) -> bytes:
        """Four bytes over the system prompt."""
        return bytes(_HEAD.unpack_from(self.packed)[2])

    @property
    def tools(self) -> bytes:
        """Four bytes over the tools."""
        return bytes(_HEAD.unpack_from(self.packed)[3])

    def spans(self) -> list[OutlineSpan]:
        """All spans, the head first."""
        return [
            OutlineSpan(ROLES[min(role & 0x7F, len(ROLES) - 1)], stop, said, form,
                        bool(role & _SAMPLED))
            for role, stop, said, form in _SPAN.iter_unpack(self.packed[_HEAD.size :])
        ]  # fmt: skip


def compare(old: Outline, new: Outline, token: int) -> Verdict | None:
    """Why a prompt that had `old` and has `new` differs first at `token`; None: in the reply to the
    former, of which an outline says nothing."""
    now, before = new.spans(), old.spans()
    at = next((i for i, span in enumerate(now) if span.stop > token), len(now) - 1)
    role, message = now[at].role, at - 1 if at else None
    if new.epoch > old.epoch:
        return Verdict("context_compacted", role, message, new.epoch)
    if at == 0:
        if old.tools != new.tools:
            return Verdict("tools_changed", "tools")
        if old.system != new.system:
            return Verdict("system_changed", "system")
        return Verdict("template_rewrote_history", "head")
    if at >= len(before):
        return None
    if before[at].said != now[at].said or before[at].role != role:
        return Verdict("input_changed", role, message)
    if before[at].form != now[at].form:
        return Verdict("tool_args_reserialized", role, message)
    if before[at].sampled and not now[at].sampled:
        return Verdict("retokenized", role, message)
    return Verdict("template_rewrote_history", role, message)


def digests_of(message: bytes) -> tuple[bytes, bytes]:
    """`said` and `form` of a message's JSON."""
    form = hashlib.sha256(message).digest()[:4]
    if not message:
        return form, form
    value = msgspec.json.decode(message)
    return _short(_canonical(value)), form


def _canonical(value: Any) -> Any:
    """The message with its tool calls' arguments as values, whatever text they came in."""
    if isinstance(value, dict):
        return {name: _parsed(one) if name == "arguments" else _canonical(one)
                for name, one in value.items()}  # fmt: skip
    return [_canonical(one) for one in value] if isinstance(value, list) else value


def _parsed(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            return msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError):
            return arguments
    return arguments


def _short(value: Any) -> bytes:
    encoded = msgspec.json.encode(value, order="deterministic")
    return hashlib.sha256(b"kvmem.outline\0" + encoded).digest()[:4]
