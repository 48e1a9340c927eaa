"""For CI: an agent's recorded run fails a test where its context, and not its model, was at fault.

def test_planner_is_given_what_it_needs():
    for turn in read_run(Path("runs/planner.json")):
        assert_not_context_fault(try_turn(turn, renderer, scorer))
"""

from __future__ import annotations

from kvmem.blame.values import INVOLVED, Verdict

__all__ = ["ContextFault", "assert_not_context_fault"]


class ContextFault(AssertionError):
    """A turn failed because of its context or its KV; `verdict` says how."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.explain())
        self.verdict = verdict


def assert_not_context_fault(
    verdict: Verdict, *, confidence: float = 0.8, allow: frozenset[str] = frozenset()
) -> None:
    """Passes where the turn was right, or failed for another reason than context and cache.

    Args:
        verdict: of the turn.
        confidence: verdicts below it pass; UNKNOWN passes.
        allow: classes ("both") and causes ("buried") that pass all the same.

    Raises:
        ContextFault: with the verdict as its message.
    """
    if (
        verdict.fault in INVOLVED
        and verdict.confidence >= confidence
        and not {verdict.fault, verdict.cause} & allow
    ):
        raise ContextFault(verdict)
