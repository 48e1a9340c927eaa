"""In production: of some turns, whether the KV that they were served with changed the answer.

Off until a share is given. A turn that is looked at is answered twice more, greedily: with the KV
that the engine has for it (E), and with KV computed anew (X). Two runs of the same numbers in other
shapes differ in the last digit, so a token counts as changed where exact KV prefers its own by
`least_nats`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from kvmem import events
from kvmem.blame.scorer import FRESH, SERVED, Sampler
from kvmem.errors import ConfigError, KVMemError

__all__ = ["Guard", "Looked"]

_WHOLE = 2**64


class Looked(msgspec.Struct, frozen=True):
    """Of one turn: whether its answer changed, from which token on, and how surely.

    `nats`: how much exact KV prefers its own token there; 0 where the answers are the same.
    """

    changed: bool
    at: int | None
    nats: float


class Guard:
    """Looks at a share of the turns. One thread uses it.

    Args:
        sampler: the engine; `kvmem.blame.served.ServedScorer`.
        bus: is told of a changed answer (`AnswerChanged`), and of a failure to look.
        share: of the turns that are looked at, 0 to 1; each costs a cold prefill.
        max_tokens: of an answer that are compared.
        least_nats: see the module.
        seed: chooses the turns, by session and number: the same ones every time.

    Raises:
        ConfigError: the share is no share, or there is nothing to compare.
    """

    def __init__(
        self,
        sampler: Sampler,
        bus: events.Bus,
        *,
        share: float = 0.0,
        max_tokens: int = 16,
        least_nats: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not 0.0 <= share <= 1.0 or max_tokens < 1:
            raise ConfigError(
                f"A guard cannot look at a share of {share} and {max_tokens} tokens",
                next_step="Give a share from 0 to 1 and at least one token.",
                setting="share",
            )
        self._sampler, self._bus = sampler, bus
        self._share, self._max_tokens, self._seed = share, max_tokens, seed
        self._least = least_nats

    def wants(self, session: str, turn: int) -> bool:
        """Whether it looks at that turn."""
        digest = hashlib.sha256(f"{self._seed}/{session}/{turn}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._share * _WHOLE

    def look(
        self,
        prompt_ids: Sequence[int],
        *,
        session: str,
        turn: int,
        salt: str = "",
        kv: str = SERVED,
    ) -> Looked | None:
        """Compares, where it is that turn's lot; None where it is not, or the engine failed (I9).

        Args:
            prompt_ids: the prompt as it was served.
            session, turn: whose it is; the event names them.
            salt: that it was served under.
            kv: how it was served, where the engine serves codecs.
        """
        if not self.wants(session, turn):
            return None
        try:
            found = self._compared(prompt_ids, salt, kv)
        except KVMemError as error:
            self._bus.emit(events.Failure(where="guard", error=str(error)))
            return None
        if found.changed:
            self._bus.emit(
                events.AnswerChanged(session=session, turn=turn, at=found.at or 0, nats=found.nats)
            )
        return found

    def _compared(self, prompt_ids: Sequence[int], salt: str, kv: str) -> Looked:
        n = self._max_tokens
        served = self._sampler.sample(prompt_ids, max_tokens=n, kv=kv, salt=salt).ids
        exact = self._sampler.sample(prompt_ids, max_tokens=n, kv=FRESH, salt=salt).ids
        pairs = zip(served, exact, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            if len(served) == len(exact):
                return Looked(False, None, 0.0)
            return Looked(True, min(len(served), len(exact)), 0.0)  # one of them ended
        before = [*prompt_ids, *exact[:at]]
        told = self._sampler.score(before, [[exact[at]], [served[at]]], kv=FRESH, salt=salt)
        nats = told.logprobs[0] - told.logprobs[1]
        return Looked(nats >= self._least, at, nats)
