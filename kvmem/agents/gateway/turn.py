"""One turn: what the engine is sent for a client's messages, and what of it is kept.

The engine gets the client's own body with the prompt's ids beside it; so sampling, tools and
reasoning are the engine's as ever. What it samples is committed by its ids, on a fork of the ledger
that the messages begin with.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvmem.agents.gateway.messages import Conversation, NotLedgered, extend, formed, read
from kvmem.agents.gateway.models import Model
from kvmem.agents.gateway.sessions import Found, Scope, Sessions
from kvmem.context import Ledger
from kvmem.context.renderer import canonical
from kvmem.errors import PrefixBroken

__all__ = ["Receipt", "Turn", "Wish"]


class Wish(msgspec.Struct, frozen=True):
    """What a client wants of its prefix beside the answer.

    Args:
        hold_s: its ledger is not to make room for others so long.
        marked: of the chat request's messages, those that it marked; -1 is the head.
        previous: the answer that it goes on from; the request has only what is new.
    """

    hold_s: float = 0.0
    marked: frozenset[int] = frozenset()
    previous: str = ""


class Receipt(msgspec.Struct):
    """What usage says under `kvmem`.

    Args:
        session: the ledger's, as the engine knows it.
        found_by: "session_id", "prompt_cache_key", "prefix" or "none".
        committed_tokens: of the prompt, those that stood in a ledger already.
        ideal_tokens: the whole blocks of them that the engine had computed.
        miss: "none", or why fewer than all that could be were reused.
        message: of the client's messages, the first that differs.
        fields: of that message.
        detail: for people.
    """

    session: str = ""
    found_by: str = "none"
    committed_tokens: int = 0
    ideal_tokens: int | None = None
    miss: str = "none"
    message: int | None = None
    fields: tuple[str, ...] = ()
    detail: str = ""


class Turn:
    """A request on its way. `prepare` makes one; then `commit` for each choice, if there is one."""

    def __init__(self, body: Mapping[str, Any], model: Model, wish: Wish) -> None:
        self.model = model
        self.receipt = Receipt()
        self.wish = wish
        self.wants_ids = bool(body.get("return_token_ids"))
        given = body.get("stream_options")
        options = given if isinstance(given, dict) else {}
        self.wants_usage = bool(options.get("include_usage"))
        self.body: dict[str, Any] = {**body, "return_token_ids": True}
        self.body.pop("prompt_cache_key", None)
        if body.get("stream"):
            self.body["stream_options"] = {**options, "include_usage": True}
        self.asked: list[int] = []
        self.marked_tokens = 0  # up to the last mark
        self.answer_id = ""  # by which `previous` names it
        self._sessions: Sessions | None = None
        self._scope: Scope | None = None
        self._found: Found | None = None
        self._ledger: Ledger | None = None  # its request is out
        self._base: Ledger  # the same, before it was
        self._committed = False
        self._marks: list[bytes] = []
        self._told: list[dict[str, Any]] = []

    # -- what is sent ------------------------------------------------------------------------

    def hand_on(self, why: NotLedgered) -> None:
        """The request goes as it is."""
        self.receipt.miss, self.receipt.detail = why.reason, str(why)
        self._ledger = None

    def go_on(self, before: Sequence[Mapping[str, Any]]) -> None:
        """Puts messages before the request's own; a system prompt of its own stays first."""
        mine = self.body["messages"]
        first = [m for m in mine[:1] if m.get("role") in {"system", "developer"}]
        self.body["messages"] = [*first, *before, *mine[len(first) :]]

    def begin(self, sessions: Sessions, scope: Scope, name: str, by: str) -> None:
        """Finds the ledger and makes the ids.

        Raises:
            NotLedgered: the request cannot be made of pieces.
        """
        try:
            conversation = read(self.body)
        except (AttributeError, KeyError, TypeError) as error:
            raise NotLedgered("the engine is to say what is wrong", reason="malformed") from error
        self._sessions, self._scope = sessions, scope
        self._told = list(conversation.messages)
        self._marks = scope.marks(conversation)
        found = self._found = scope.find(self._marks, name)
        try:
            ledger = self._ledger_of(scope, conversation, found, name)
            had = ledger.n_tokens
            ends_sampled = ledger.spans[-1].source == "sampled"
            for n in range(found.spans - 1 if found else 0, len(self._told)):
                marked = n + conversation.offset in self.wish.marked
                ledger.append(self._told[n], pin=marked)
            self._base = ledger.fork(ledger.session_id)
            self.asked = ledger.request()["prompt"]
        except PrefixBroken as error:
            raise NotLedgered(str(error), reason="template_refuses") from error
        self._ledger = ledger
        if self.wish.marked:
            last = max(self.wish.marked) - conversation.offset
            self.marked_tokens = ledger.spans[max(last, -1) + 1].stop
        self.receipt.session = ledger.session_id
        self._say(scope, conversation, found, name, by)
        if found is not None:
            sessions.used(found)
            self.receipt.committed_tokens = had
            size = self.model.block_tokens
            if size:
                # A reply's last token has no KV; the prompt's last is always computed.
                computed = min(had - ends_sampled, len(self.asked) - 1)
                self.receipt.ideal_tokens = computed // size * size
        given = dict(self.body.get("kv_transfer_params") or {})
        self.body["kv_transfer_params"] = {**given, "prompt_token_ids": self.asked}
        self.body["session_id"] = ledger.session_id

    def _ledger_of(
        self, scope: Scope, conversation: Conversation, found: Found | None, name: str
    ) -> Ledger:
        if found is None:
            return Ledger.open(
                scope.renderer, system=conversation.system, tools=conversation.tools,
                session_id=name or f"kvmem-{uuid.uuid4().hex}",
                cache_salt=str(self.body.get("cache_salt") or ""), seal=False,
            )  # fmt: skip
        kept = found.kept.ledger
        return kept.fork(name or kept.session_id, at=None if found.whole else found.spans)

    def _say(
        self, scope: Scope, conversation: Conversation, found: Found | None, name: str, by: str
    ) -> None:
        receipt = self.receipt
        mine = scope.named.get(name) if name else None
        if found is not None and (found.spans > 1 or mine is not None):
            same = mine is not None and found.kept is mine
            receipt.found_by = by if same else "prefix"
        if found is not None and (found.whole or found.spans > len(self._told)):
            return  # all of it, or the same as was asked before
        if found is not None and (found.spans > 1 or found.kept is mine):
            at = found.spans - 1
            receipt.miss = "messages_changed"
            receipt.message = at + conversation.offset
            receipt.fields = self._fields(found, at)
            return
        if mine is None:
            receipt.miss = "new_session"
            return
        system, tools = mine.ledger.system, mine.ledger.tools
        if system != conversation.system:
            receipt.miss, receipt.message = "system_changed", 0
        elif canonical(list(tools)) != canonical(list(conversation.tools)):
            receipt.miss = "tools_changed"
        else:
            receipt.miss, receipt.message = "messages_changed", conversation.offset

    def _fields(self, found: Found, at: int) -> tuple[str, ...]:
        ledger = found.kept.ledger
        told = ledger.messages()[(0 if ledger.system is None else 1) :]
        if at >= len(self._told) or at >= len(told):
            return ()
        old, new = formed(told[at]), self._told[at]
        return tuple(sorted(n for n in {*old, *new} if old.get(n) != new.get(n)))

    # -- what is kept ------------------------------------------------------------------------

    def commit(
        self,
        message: Mapping[str, Any],
        sampled: Sequence[int] | None,
        prompt: Sequence[int] | None,
    ) -> None:
        """Keeps an answer. What can't be kept is said in the receipt, and answered all the same."""
        if self._ledger is None or self._scope is None or self._sessions is None:
            return
        if not sampled or not prompt:
            self.receipt.miss, self.receipt.detail = "no_token_ids", "the engine gave no token ids"
            return
        if list(prompt) != self.asked:
            self.model.ignores_ids = True
            self.receipt.miss = "engine_ignores_ids"
            self.receipt.detail = "the engine rendered the messages itself; vLLM 0.32 does not"
            return
        ledger = self._ledger
        if self._committed:  # one more choice: it stands beside the first
            ledger = self._base.fork(ledger.session_id)
            ledger.request()
        self._committed = True
        said = formed({**message, "role": "assistant"})
        if self.answer_id:
            said["answer_id"] = self.answer_id
        answer = {"prompt_token_ids": prompt, "choices": [{"message": said, "token_ids": sampled}]}
        ledger.commit(answer)
        marks = [*self._marks, *extend(self._marks, self._told, [said])]
        self._sessions.keep(
            self._scope,
            self._found,
            ledger,
            marks,
            now=time.time(),
            hold_s=self.wish.hold_s,
            answer_id=self.answer_id,
        )

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The engine's usage, with the receipt in it."""
        receipt = self.receipt
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        ideal = receipt.ideal_tokens
        if receipt.miss == "none" and ideal is not None and cached is not None and cached < ideal:
            receipt.miss = "engine_evicted"
        return {**usage, "kvmem": msgspec.to_builtins(receipt)}
