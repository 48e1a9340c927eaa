"""One turn: what is sent for it, and what its answer means."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from kvmem.agents.asker import Asker
from kvmem.agents.budget import Budget, Reservation
from kvmem.agents.schemas import fault_of, schema_of
from kvmem.agents.tools import Tool, calls_in
from kvmem.agents.values import Reply, Usage, Where
from kvmem.agents.wire import Answer
from kvmem.context import CallFormat, Ledger, mask
from kvmem.errors import ConfigError, EngineError, ResultInvalid

__all__ = ["Asking", "Message", "Turn", "Wish", "as_message", "begin"]

Message = str | Mapping[str, Any]
OURS = ("model", "prompt", "stream", "stream_options", "n", "echo", "return_token_ids")


class Wish(msgspec.Struct, frozen=True):
    """How a turn is asked for; see `Session.step`."""

    schema: Any = None
    allow: str = "*"
    mode: Literal["auto", "required", "none"] = "auto"
    timeout_s: float | None = None
    fields: Mapping[str, Any] = {}


class Asking(Protocol):
    """What a turn reads of its session."""

    tools: dict[str, Tool]
    budget: Budget
    known_tokens: int

    @property
    def where(self) -> Where:
        """The next turn."""
        ...


def as_message(message: Message) -> Mapping[str, Any]:
    """A string is a user's message."""
    return {"role": "user", "content": message} if isinstance(message, str) else message


class Turn:
    """A request that is out: `finish` takes its answer. Nothing of the session is changed by it."""

    def __init__(
        self,
        *,
        where: Where,
        ledger: Ledger,
        body: dict[str, Any],
        prefill: str,
        wish: Wish,
        reservation: Reservation,
        timeout_s: float | None,
        form: CallFormat,
    ) -> None:
        self.where, self.ledger, self.body, self.prefill = where, ledger, body, prefill
        self.reservation, self.timeout_s = reservation, timeout_s
        self.usage = Usage()
        self.began = time.monotonic()
        self._wish, self._form = wish, form

    def note(self, answer: Answer) -> None:
        """What was spent so far, should the rest never come."""
        sampled = len(answer.response["choices"][0]["token_ids"])
        self.usage = Usage.of(answer.response, len(self.body["prompt"]), sampled)

    def finish(
        self, answer: Answer, tools: Mapping[str, Tool], calls_before: int
    ) -> tuple[Reply[Any], int]:
        """The reply, committed to the turn's ledger, and how many of its tokens are computed.

        Raises:
            ResultInvalid: it is not of the schema.
            EngineError: the response has no ids.
            PrefixBroken: the engine was asked something else.
        """
        response, choice = answer.response, answer.response["choices"][0]
        sampled = choice.get("token_ids")
        if sampled is None:
            raise EngineError(
                f"{self.where}: the response has no token ids",
                next_step="Use a vLLM server of 0.29 or later, or look for a proxy that drops "
                "return_token_ids.",
                **self.where.details,
            )
        self.usage = Usage.of(response, len(self.body["prompt"]), len(sampled))
        text = self.prefill + choice["text"]
        value = self._value(text, choice["finish_reason"])
        calls = ()
        if tools and self._wish.schema is None:
            calls = calls_in(text, tools, self._form, first=calls_before)
        content = text.partition(self._form.begin.strip())[0].strip() if calls else text
        message: dict[str, Any] = {"content": content}
        if calls:
            message["tool_calls"] = [call.message for call in calls]
        span = self.ledger.commit({**response, "choices": [{**choice, "message": message}]})
        reply = Reply(
            agent=self.where.agent, turn=self.where.turn, text=text, value=value,
            tool_calls=calls, finish_reason=str(choice["finish_reason"]), usage=self.usage,
            seconds=time.monotonic() - self.began, first_s=answer.first_s,
        )  # fmt: skip
        return reply, span.stop - 1  # the last sampled token has no KV yet

    def _value(self, text: str, finish_reason: str) -> Any:
        schema = self._wish.schema
        if schema is None:
            return None
        try:
            if isinstance(schema, Mapping):
                value = msgspec.json.decode(text)
                fault = fault_of(value, schema_of(schema))
            else:
                value, fault = msgspec.json.decode(text, type=schema), ""
        except msgspec.DecodeError as error:
            value, fault = None, str(error)
        if fault:
            cut = finish_reason == "length"
            raise ResultInvalid(
                f"{self.where}: the answer is not of the schema that was asked for: {fault}; it "
                f"begins {text[:80]!r}" + (" and was cut at max_tokens" if cut else ""),
                next_step="Give more max_tokens, bound the schema's strings and lists; if the "
                "answer is blanks, start the server with `disable_any_whitespace` (docs/agents.md)."
                if cut
                else "Look whether the server has structured outputs; then do the turn again.",
                text=text, **self.where.details,
            )  # fmt: skip
        return value


def begin(
    asker: Asker, ledger: Ledger, messages: Sequence[Message], wish: Wish, session: Asking
) -> Turn:
    """The turn that asks with `messages` after what is committed.

    Raises:
        ConfigError: a field of the body is the runtime's own, or no tool is allowed.
        BudgetExceeded: the session has nothing left to spend.
        PrefixBroken: the template refuses the messages.
    """
    where = session.where
    mine = [name for name in wish.fields if name in OURS]
    if mine:
        raise ConfigError(
            f"{where}: {', '.join(mine)} of the body cannot be set by a turn",
            next_step="Leave it out; the runtime sets it.",
            setting=mine[0],
        )
    fields = {"max_tokens": asker.defaults.max_tokens, **asker.defaults.fields, **wish.fields}
    prefill = ""
    if wish.schema is not None:
        fields["structured_outputs"] = {"json": schema_of(wish.schema)}
    elif session.tools:
        held = mask(
            [tool.schema for tool in session.tools.values()],
            allow=wish.allow, mode=wish.mode, form=asker.form,
        )  # fmt: skip
        fields, prefill = {**fields, **held.fields}, held.prefill
    asked = ledger.fork(ledger.session_id)
    asked.append(*map(as_message, messages))
    body = asked.request("completions", prefill=prefill, model=asker.model, **fields)
    reservation = session.budget.reserve(
        where,
        prompt_tokens=max(0, len(body["prompt"]) - session.known_tokens),
        max_tokens=int(fields["max_tokens"]),
    )
    body["max_tokens"] = reservation.max_tokens
    limits = [wish.timeout_s or asker.defaults.timeout_s, reservation.seconds]
    known = [limit for limit in limits if limit is not None]
    return Turn(
        where=where, ledger=asked, body=body, prefill=prefill, wish=wish, reservation=reservation,
        timeout_s=min(known) if known else None, form=asker.form,
    )  # fmt: skip
