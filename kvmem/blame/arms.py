"""The replays of one turn: the same question behind other contexts, and what each answers.

All but the first token of most of them is cached: E and F were served once, X is E with exact KV,
and O, P and N are short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from kvmem.blame.judge import Judge
from kvmem.blame.scorer import FRESH, SERVED, Sampler, Scorer, render
from kvmem.blame.values import Arm, Evidence, Piece, Turn
from kvmem.context import Renderer
from kvmem.errors import ConfigError, PrefixBroken
from kvmem.types import Sampled, Scored

__all__ = ["Replays"]

KNOWN_KV = ("exact", "approximate")


class Replays:
    """The arms of one turn on one engine; each is made when it is asked for, and once.

    Args:
        turn: what is replayed.
        renderer: of the engine's model.
        scorer: the engine; a `Sampler` where there is a judge.
        judge: decides instead of candidates.
        max_tokens: of an answer that is sampled.
        n_samples: of arm R, where there is a judge.
        verify_kv: whether X is computed anew though E's KV is exact by its label.

    Raises:
        ConfigError: there is neither a judge nor an expected answer with others beside it.
    """

    def __init__(
        self,
        turn: Turn,
        renderer: Renderer,
        scorer: Scorer,
        *,
        judge: Judge | None = None,
        max_tokens: int = 64,
        n_samples: int = 8,
        verify_kv: bool = False,
    ) -> None:
        self.turn, self._renderer, self._scorer = turn, renderer, scorer
        self._judge, self._max_tokens, self._n_samples = judge, max_tokens, n_samples
        self._verify_kv = verify_kv
        self._answers = tuple(dict.fromkeys((turn.expected, *turn.candidates)))
        if judge is None and (not turn.expected or len(self._answers) < 2):
            raise ConfigError(
                f"{turn.name} has no judge, and no expected answer with others to compare",
                next_step="Give `expected` and `candidates` in the run, or a judge.",
            )
        end = renderer.close()[:1]  # so that no answer is the beginning of another
        self._candidates = [[*renderer.encode(a), *end] for a in self._answers if a]
        # Only what was served with exact KV by its label may be asked again as it was (I10).
        self._rest = FRESH if turn.kv == "approximate" else SERVED
        self.arms: dict[str, Arm] = {}

    # -- the arms ----------------------------------------------------------------------------

    def as_served(self) -> Arm:
        """E."""
        kv = SERVED if self.turn.kv in KNOWN_KV else self.turn.kv
        return self._made("E", lambda: self._run("E", self._served(), kv))

    def exact(self) -> Arm:
        """X; E again where its KV was exact and nobody wants to see it computed."""
        if self.turn.kv == "exact" and not self._verify_kv:
            return self._made("X", lambda: _again(self.as_served(), "X", "its KV is exact (I10)"))
        fresh = self._verify_kv or self.turn.kv == "approximate"
        return self._made("X", lambda: self._run("X", self._served(), FRESH if fresh else SERVED))

    def full(self) -> Arm:
        """F."""
        ids = list(self.turn.full_ids) or self._of([p.message for p in self.turn.full])
        return self._made("F", lambda: self._run("F", ids, self._rest))

    def evidence(self, found: Sequence[Evidence]) -> Arm:
        """O: the pieces as they were said, each with the call that it answers."""
        return self._made("O", lambda: self._run("O", self._of_evidence(found), self._rest))

    def restated(self, found: Sequence[Evidence]) -> Arm:
        """P: only the lines that tell, as notes before the question."""
        notes = [f"- {_note(self.turn.full[one.index], one)}" for one in found]
        text = "\n".join(["Known facts:", *notes, "", self.turn.asked])
        asked = {**self.turn.question, "content": text}
        return self._made("P", lambda: self._run("P", self._prompt([asked]), self._rest))

    def question(self) -> Arm:
        """N."""
        return self._made("N", lambda: self._run("N", self._of([]), self._rest))

    def resampled(self) -> Arm:
        """R: of candidates what their probabilities say; of a judge so many samples."""
        if self._judge is None:
            return self._made("R", lambda: _resampled(self.as_served()))
        kv = SERVED if self.turn.kv in KNOWN_KV else self.turn.kv
        return self._made("R", lambda: self._sampled("R", self._served(), kv, self._n_samples))

    def without(self, index: int) -> float | None:
        """ln P(expected) behind the full history less one piece; None without an expected one."""
        kept = [p.message for p in self.turn.full if p.index != index]
        return self._run("F", self._of(kept), self._rest).logprob

    def other(self, replays: Replays) -> Arm:
        """M: E's messages to the model of other replays."""
        ids = replays._of([p.message for p in self.turn.served])
        return self._made("M", lambda: replays._run("M", ids, SERVED))

    # -- prompts -----------------------------------------------------------------------------

    def _served(self) -> list[int]:
        return list(self.turn.served_ids) or self._of([p.message for p in self.turn.served])

    def _of(self, messages: Sequence[Any]) -> list[int]:
        return self._prompt([*messages, self.turn.question])

    def _prompt(self, messages: Sequence[Any]) -> list[int]:
        return render(
            self._renderer, messages, system=self.turn.system, tools=self.turn.tools
        )  # fmt: skip

    def _of_evidence(self, found: Sequence[Evidence]) -> list[int]:
        kept: dict[int, Any] = {}
        for one in sorted(found, key=lambda e: e.index):
            piece = self.turn.full[one.index]
            asking = self.turn.full[one.index - 1] if one.index else None
            if piece.role == "tool" and asking is not None and asking.message.get("tool_calls"):
                kept[asking.index] = asking.message
            kept[piece.index] = piece.message
        try:
            return self._of([kept[i] for i in sorted(kept)])
        except PrefixBroken:  # a template that wants its roles in turn
            said = [f"{self.turn.full[one.index].text}" for one in found]
            return self._of([{"role": "user", "content": "\n".join(said)}])

    # -- answers -----------------------------------------------------------------------------

    def _made(self, name: str, make: Callable[[], Arm]) -> Arm:
        if name not in self.arms:
            self.arms[name] = make()
        return self.arms[name]

    def _run(self, name: str, ids: Sequence[int], kv: str) -> Arm:
        if self._judge is not None:
            return self._sampled(name, ids, kv, 1)
        scored = self._scorer.score(ids, self._candidates, kv=kv, salt=self.turn.salt)
        return self._compared(name, scored)

    def _compared(self, name: str, scored: Scored) -> Arm:
        answers = [a for a in self._answers if a]
        right = scored.logprobs[0]
        wrong = max(scored.logprobs[1:])
        top = max(scored.logprobs)
        weights = [math.exp(value - top) for value in scored.logprobs]
        return Arm(
            name=name, right=right > wrong, answer=answers[scored.logprobs.index(top)],
            logprob=right, margin=right - wrong, share=weights[0] / sum(weights),
            prompt_tokens=scored.prompt_tokens, cached_tokens=scored.cached_tokens,
            seconds=scored.seconds,
        )  # fmt: skip

    def _sampled(self, name: str, ids: Sequence[int], kv: str, n: int) -> Arm:
        assert self._judge is not None
        if not hasattr(self._scorer, "sample"):
            raise ConfigError(
                f"{type(self._scorer).__name__} cannot sample, and a judge needs answers",
                next_step="Give candidates instead of a judge, or another engine.",
            )
        sampler = cast("Sampler", self._scorer)
        out: list[Sampled] = []
        for seed in range(n):
            out.append(
                sampler.sample(
                    ids, max_tokens=self._max_tokens, temperature=1.0 if n > 1 else 0.0,
                    seed=seed, kv=kv, salt=self.turn.salt,
                )
            )  # fmt: skip
        texts = [self._renderer.decode(one.ids).strip() for one in out]
        share = sum(map(self._judge, texts)) / n
        logprob, more = None, ()
        if self._candidates and self.turn.expected:
            scored = self._scorer.score(ids, self._candidates[:1], kv=kv, salt=self.turn.salt)
            logprob, more = scored.logprobs[0], (scored,)
        costs: list[Sampled | Scored] = [*out, *more]
        return Arm(
            name=name, right=share > 0.5, answer=texts[0], logprob=logprob,
            margin=2.0 * share - 1.0, share=share,
            prompt_tokens=sum(one.prompt_tokens for one in costs),
            cached_tokens=sum(one.cached_tokens for one in costs),
            seconds=sum(one.seconds for one in costs),
        )  # fmt: skip


def _again(arm: Arm, name: str, note: str) -> Arm:
    return Arm(
        name=name, right=arm.right, answer=arm.answer, logprob=arm.logprob, margin=arm.margin,
        share=arm.share, prompt_tokens=0, cached_tokens=0, seconds=0.0, note=note,
    )  # fmt: skip


def _resampled(arm: Arm) -> Arm:
    return Arm(
        name="R", right=arm.share > 0.5, answer=arm.answer, logprob=arm.logprob, margin=arm.margin,
        share=arm.share, prompt_tokens=0, cached_tokens=0, seconds=0.0,
        note="from the candidates' probabilities in E",
    )  # fmt: skip


def _note(piece: Piece, one: Evidence) -> str:
    return f"{piece.call}: {one.line or piece.text}" if piece.call else one.line or piece.text
