"""Which step of a conversation of several agents led it astray, by what each did to the answer.

After every message the question is asked anew, and the right answer's likelihood looked at: a step
is worth what it added. Each replay is the last one and a message more, so nearly all is cached. It
is one turn's evidence for a whole run's fault, and weak: see bench_whowhen's figures before use.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvmem.blame.scorer import Scorer, render
from kvmem.context import Renderer

__all__ = ["Steps", "steps_of"]


class Steps(msgspec.Struct, frozen=True):
    """What became of the right answer.

    Args:
        worth: by step, nats that it added to the right answer.
        blamed: the step that took most away, the first of several; None where none took any.
        prompt_tokens, cached_tokens, seconds: the cost.
    """

    worth: tuple[float, ...]
    blamed: int | None
    prompt_tokens: int
    cached_tokens: int
    seconds: float


def steps_of(
    messages: Sequence[Mapping[str, Any]],
    question: str,
    expected: str,
    renderer: Renderer,
    scorer: Scorer,
) -> Steps:
    """Scores the right answer before the first step and after each; n + 1 replays of n steps.

    Raises:
        EngineError: the engine did not answer.
    """
    answer = [*renderer.encode(expected), *renderer.close()[:1]]
    asked = {"role": "user", "content": f"{question}\nGive the final answer only."}
    scored = [
        scorer.score(render(renderer, [*messages[:n], asked]), [answer])
        for n in range(len(messages) + 1)
    ]
    values = [one.logprobs[0] for one in scored]
    worth = tuple(after - before for before, after in itertools.pairwise(values))
    least = min(worth, default=0.0)
    return Steps(
        worth=worth, blamed=worth.index(least) if least < 0.0 else None,
        prompt_tokens=sum(one.prompt_tokens for one in scored),
        cached_tokens=sum(one.cached_tokens for one in scored),
        seconds=sum(one.seconds for one in scored),
    )  # fmt: skip
