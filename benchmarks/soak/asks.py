"""What is asked and what is answered; the digest by which the oracle knows a request again."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

__all__ = ["Answer", "Ask", "Call", "body_of"]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request.

    `load` and `store` are its wishes to kvmem. With `give_up_s` the client hangs up after so many
    seconds, with `give_up_tokens` after so many tokens of a stream, whichever is set.
    """

    kind: str
    prompt: tuple[int, ...]
    n_tokens: int
    adapter: str | None = None
    salt: str | None = None
    load: bool = True
    store: bool = True
    stream: bool = False
    give_up_s: float | None = None
    give_up_tokens: int | None = None

    @property
    def gives_up(self) -> bool:
        """Whether the client means to hang up."""
        return self.give_up_s is not None or self.give_up_tokens is not None

    @property
    def digest(self) -> bytes:
        """Of all that decides the answer. Salts and wishes must not, so they are not in it."""
        return hashlib.sha256(
            msgspec.msgpack.encode((self.adapter, self.prompt, self.n_tokens))
        ).digest()

    def patient(self) -> Ask:
        """The same, and the client waits for the end."""
        return msgspec.structs.replace(self, give_up_s=None, give_up_tokens=None)

    def after(self, tokens: list[int]) -> Ask:
        """What an engine would be asked for the rest, had it begun its answer with `tokens`."""
        return Ask(
            kind=self.kind,
            prompt=(*self.prompt, *tokens),
            n_tokens=self.n_tokens - len(tokens),
            adapter=self.adapter,
        )


class Answer(msgspec.Struct, frozen=True):
    """A whole answer: token ids, their logprobs, and at each place the best ones by id."""

    tokens: list[int]
    logprobs: list[float]
    best: list[dict[int, float]]

    def after(self, n_tokens: int) -> Answer:
        """The answer without its first `n_tokens`."""
        return Answer(self.tokens[n_tokens:], self.logprobs[n_tokens:], self.best[n_tokens:])


class Call(msgspec.Struct, frozen=True):
    """A request that was answered whole."""

    ask: Ask
    answer: Answer


def body_of(ask: Ask, model: str) -> dict[str, Any]:
    """The request as vLLM's /v1/completions takes it: greedy, token ids in and out."""
    body: dict[str, Any] = {
        "model": ask.adapter or model,
        "prompt": list(ask.prompt),
        "max_tokens": ask.n_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": 2,  # the token and its rival, which decide whether a difference is a tie
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "stream": ask.stream,
    }
    if ask.salt is not None:
        body["cache_salt"] = ask.salt
    if not (ask.load and ask.store):
        body["kv_transfer_params"] = {"kvmem": {"load": ask.load, "store": ask.store}}
    return body
