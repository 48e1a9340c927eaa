"""One turn's trial: its arms in the order that decides soonest, and the verdict.

verdict = try_turn(turn, renderer, scorer)
print(verdict.explain())
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from kvmem.blame.arms import Replays
from kvmem.blame.evidence import find
from kvmem.blame.judge import Judge
from kvmem.blame.residency import residencies
from kvmem.blame.scorer import Scorer
from kvmem.blame.values import Arm, Evidence, Turn, Verdict
from kvmem.blame.verdict import decide, informs
from kvmem.context import Renderer

__all__ = ["Other", "attribution", "try_turn"]

MOST_LEFT_OUT = 24  # pieces that attribution leaves out, one replay each
INFLUENCES = 1.0  # nats that a piece must be worth to be evidence


class Other(msgspec.Struct, frozen=True):
    """Another model, for arm M: its renderer and its engine."""

    renderer: Renderer
    scorer: Scorer


def try_turn(
    turn: Turn,
    renderer: Renderer,
    scorer: Scorer,
    *,
    judge: Judge | None = None,
    other: Other | None = None,
    verify_kv: bool = False,
    influence: bool = False,
    always: bool = False,
    max_tokens: int = 64,
    n_samples: int = 8,
    tell: Callable[[str], None] = lambda arm: None,
) -> Verdict:
    """Replays a turn and says what was at fault.

    Args:
        turn: see `Turn`; `kvmem.blame.runs` reads them.
        renderer, scorer: the model's and its engine; see `kvmem.blame.scorer`.
        judge: decides where there are no candidates.
        other: another model for arm M.
        verify_kv: compute X anew though the turn's KV is exact by its label.
        influence: measure what each piece of the history is worth, a replay each.
        always: make every arm though E is right.
        max_tokens, n_samples: of answers for a judge, and of arm R.
        tell: is called with the name of each arm as it begins.

    Raises:
        ConfigError: there is nothing to compare; see `Replays`.
        EngineError: the engine did not answer.
    """
    begin = time.perf_counter()
    replays = Replays(
        turn, renderer, scorer, judge=judge, max_tokens=max_tokens, n_samples=n_samples,
        verify_kv=verify_kv,
    )  # fmt: skip

    def made(name: str, make: Callable[[], Arm]) -> Arm:
        tell(name)
        return make()

    found: list[Evidence] = []
    influences: list[float] = []
    served = made("E", replays.as_served)
    made("X", replays.exact)
    if not served.right or always:
        found = find(turn)
        made("N", replays.question)
        made("F", replays.full)
        made("R", replays.resampled)
        # Where all of it tells nothing of the answer, no part of it does.
        if influence or (not found and informs(replays.full(), replays.question())):
            tell("influence")
            influences = attribution(replays)
            found = found or _of_influence(turn, influences)
        if found:
            made("O", lambda: replays.evidence(found))
            made("P", lambda: replays.restated(found))
        if other is not None:
            theirs = Replays(
                turn, other.renderer, other.scorer, judge=judge, max_tokens=max_tokens,
                n_samples=n_samples,
            )  # fmt: skip
            made("M", lambda: replays.other(theirs))
    verdict = decide(turn, replays.arms, found, residencies(turn, found))
    return msgspec.structs.replace(
        verdict,
        influence=tuple(influences),
        prompt_tokens=sum(arm.prompt_tokens for arm in replays.arms.values()),
        cached_tokens=sum(arm.cached_tokens for arm in replays.arms.values()),
        seconds=time.perf_counter() - begin,
    )


def attribution(replays: Replays) -> list[float]:
    """What the right answer loses, in nats, where a piece of the full history is left out; of the
    last MOST_LEFT_OUT pieces, the others 0. Empty where no right answer is known."""
    whole = replays.full().logprob
    if whole is None:
        return []
    pieces = replays.turn.full
    first = max(0, len(pieces) - MOST_LEFT_OUT)
    found = [0.0] * len(pieces)
    for index in range(first, len(pieces)):
        without = replays.without(index)
        found[index] = whole - without if without is not None else 0.0
    return found


def _of_influence(turn: Turn, influences: list[float]) -> list[Evidence]:
    from kvmem.blame.words import values

    found = []
    for index, worth in enumerate(influences):
        if worth < INFLUENCES:
            continue
        text = turn.full[index].text
        found.append(
            Evidence(
                index=index, why="attribution", coverage=0.0,
                values=values(text, but=[turn.asked]), line=text[:200],
            )
        )  # fmt: skip
    return found
