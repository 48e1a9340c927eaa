"""From arms and residency to a verdict.

    E right                                   ok
    E wrong, X right                          cache: only the KV differs
    nothing tells of it, or what does adds nothing to N       source: never known
    the evidence alone is enough (O, P)       context: lost, truncated, stale, contradicted, buried
    it is not, and it was there               model
    it is not, and it was not there           both

Thresholds and confidences come from logs of a seed of their own (`python -m benchmarks.bench_blame
--calibrate`), never from those that the figures are of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kvmem.blame.calibration import CONFIDENCE, GAIN, PRIOR, STRONG, UNKNOWN_BELOW
from kvmem.blame.values import Arm, Class, Evidence, Residency, Turn, Verdict

__all__ = ["confidence_of", "decide", "informs", "strength_of"]

Strength = str  # "strong", "fair", "thin"


def decide(
    turn: Turn,
    arms: Mapping[str, Arm],
    evidence: Sequence[Evidence],
    residency: Sequence[Residency],
) -> Verdict:
    """The verdict, as far as the arms that were made allow; its costs are left to the caller."""
    fault, cause = _fault(turn, arms, evidence, residency)
    strength = strength_of(fault, arms)
    confidence = confidence_of(fault, strength)
    # Evidence that only words speak for, and that is enough in one wording and not in another.
    guess = strength == "thin" and not _is_sure(evidence)
    if fault not in ("ok", "unknown") and (guess or confidence < UNKNOWN_BELOW):
        fault, cause, confidence = "unknown", "", 0.0
    blamed = next((r for r in residency if r.cause == cause), None) if cause else None
    if blamed is None:
        blamed = next((r for r in residency if not r.value), None)
    e, x = arms.get("E"), arms.get("X")
    return Verdict(
        turn=turn.name, fault=fault, cause=cause, confidence=confidence,
        why=_why(turn, fault, cause, arms, blamed), fix=_fix(turn, fault, cause, arms, blamed),
        span=blamed.index if blamed is not None and fault in ("context", "both") else None,
        epoch=blamed.epoch if blamed is not None and fault in ("context", "both") else None,
        changed=e is not None and x is not None and e.answer != x.answer,
        arms=tuple(arms.values()), evidence=tuple(evidence), residency=tuple(residency),
    )  # fmt: skip


def _fault(
    turn: Turn,
    arms: Mapping[str, Arm],
    evidence: Sequence[Evidence],
    residency: Sequence[Residency],
) -> tuple[Class, str]:
    if arms["E"].right:
        return "ok", ""
    if arms["X"].right:
        return "cache", ""
    if not evidence:
        return "source", ""
    o, n = arms["O"], arms["N"]
    restated = arms.get("P", o)
    absent = [r for r in residency if not r.value]
    if o.right or restated.right:
        if n.right and not turn.expected:
            return "unknown", ""  # it needs no evidence, and no likelihood says what that added
        worst = absent or [r for r in residency if r.cause]
        return "context", worst[0].cause if worst else "buried"
    said = any(turn.expected in one.values for one in evidence) if turn.expected else True
    if not said and not _is_sure(evidence) and not (informs(o, n) or informs(restated, n)):
        return "source", ""
    return ("both", absent[0].cause) if absent else ("model", "")


def _is_sure(evidence: Sequence[Evidence]) -> bool:
    """Whether all of it was given, or is the result of a call with the question's arguments."""
    return all(e.values and e.why in ("argument", "given") for e in evidence)


def informs(arm: Arm, question: Arm) -> bool:
    """Whether a context makes the right answer likelier than the bare question does: among the
    candidates, so that it does not count that it looks more like one; by itself where there are
    none."""
    if arm.share > 0.0 and question.share > 0.0:
        return math.log(arm.share) - math.log(question.share) >= GAIN
    if arm.logprob is None or question.logprob is None:
        return arm.right and not question.right
    return arm.logprob - question.logprob >= GAIN


def strength_of(fault: Class, arms: Mapping[str, Arm]) -> Strength:
    """How clear the arms are that the verdict stands on, and whether repeated ones agree."""
    e, x, o = arms["E"], arms.get("X"), arms.get("O")
    if fault == "ok":
        deciding = [e]
    elif fault == "cache":
        deciding = [e, *([x] if x is not None else [])]
    else:
        deciding = [a for a in (o, arms.get("P")) if a is not None]
        if len({a.right for a in deciding}) > 1:
            return "thin"
    least = min((abs(a.margin) for a in deciding), default=0.0)
    return "strong" if least >= STRONG else "fair"


def confidence_of(fault: Class, strength: Strength) -> float:
    """The share of right ones among the calibration's verdicts of that kind and strength."""
    return CONFIDENCE.get(f"{fault}/{strength}", PRIOR.get(fault, 0.0))


def _why(
    turn: Turn, fault: Class, cause: str, arms: Mapping[str, Arm], blamed: Residency | None
) -> str:
    where = "" if blamed is None else f"piece {blamed.index} of the history"
    if fault == "ok":
        return "As served it answers right."
    if fault == "cache":
        return "With exact KV the same context is answered right."
    if fault == "source":
        return "Nothing in the full history tells what was asked."
    if fault == "model":
        return "What it needed was in the context, and by itself it is not enough for this model."
    if fault == "both":
        return (
            f"What it needed ({where}) was {_words(cause)}, and by itself it is not enough either."
        )
    if fault == "context":
        return {
            "buried": "What it needs is there and by itself enough: too much else is beside it.",
            "contradicted": f"What {where} says is right and enough; the context says otherwise.",
        }.get(cause, f"By itself, {where} is enough; in the context it was {_words(cause)}.")
    return "The replays do not agree."


def _words(cause: str) -> str:
    return {"lost": "missing", "": "missing"}.get(cause, cause)


def _fix(
    turn: Turn, fault: Class, cause: str, arms: Mapping[str, Arm], blamed: Residency | None
) -> str:
    if fault == "cache":
        return f"Serve this role with exact KV (it had {turn.kv})."
    if fault == "source":
        return "Have a tool fetch it: no context can hold what was never known."
    if fault == "model":
        return "Use a stronger model, or a tool for this step."
    if fault not in ("context", "both"):
        return ""
    full = arms.get("F")
    rest = " It needs a stronger model besides." if fault == "both" else ""
    if cause == "buried":
        fix = "Put the evidence near the question, or take out what it does not need."
    elif cause == "contradicted" and blamed is not None:
        fix = f"Take out what contradicts piece {blamed.index}: {blamed.said[:80]!r}."
    elif blamed is not None and blamed.epoch is not None:
        undo = full is not None and full.right
        fix = f"Undo epoch {blamed.epoch}, or restore piece {blamed.index}."
        if not undo:
            fix = f"Restore piece {blamed.index}, which epoch {blamed.epoch} took out."
    elif blamed is not None:
        fix = f"Restore piece {blamed.index} of the history."
    else:
        fix = "Restore the evidence."
    return fix + rest
