"""Was it the cache, the context or the model? One turn, replayed behind other contexts.

turns = read_run(Path("run.json"), renderer)
verdict = try_turn(turns[-1], renderer, scorer)
print(verdict.explain())          # what was at fault, how sure that is, and what would have helped
"""

from __future__ import annotations

from kvmem.blame.asserting import ContextFault, assert_not_context_fault
from kvmem.blame.judge import Judge, judge_of
from kvmem.blame.runs import read_run
from kvmem.blame.scorer import Sampler, Scorer
from kvmem.blame.trial import Other, try_turn
from kvmem.blame.values import Arm, Epoch, Evidence, Piece, Residency, Turn, Verdict

__all__ = [
    "Arm",
    "ContextFault",
    "Epoch",
    "Evidence",
    "Judge",
    "Other",
    "Piece",
    "Residency",
    "Sampler",
    "Scorer",
    "Turn",
    "Verdict",
    "assert_not_context_fault",
    "judge_of",
    "read_run",
    "try_turn",
]
