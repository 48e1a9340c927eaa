"""What bench_blame makes of the turns that it tried: figures, baselines, and the calibration."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._blame_logs import Case
from kvmem.blame.values import CLASSES, INVOLVED, Verdict

__all__ = ["Tried", "again", "calibrate", "long_turn", "result", "table"]

CALIBRATION = Path(__file__).resolve().parent.parent / "kvmem" / "blame" / "calibration.py"
FEW = 5.0  # verdicts that a class's own share counts as, where a kind had few
BINS = 10


class Tried(msgspec.Struct, frozen=True):
    """A case: `state` is "counts", "base" (the label does not hold) or "passes"."""

    injected: str
    seed: int
    label: str
    state: str
    verdict: Verdict | None


def again(one: Tried) -> Tried:
    """The same with the verdict's confidence as it is calibrated now; its class stays."""
    from kvmem.blame.verdict import confidence_of, strength_of

    if one.verdict is None:
        return one
    arms = {arm.name: arm for arm in one.verdict.arms}
    confidence = confidence_of(one.verdict.fault, strength_of(one.verdict.fault, arms))
    changed = msgspec.structs.replace(one.verdict, confidence=confidence)
    return msgspec.structs.replace(one, verdict=changed)


def naive(verdict: Verdict) -> str:
    """E against F: the context where the full history is answered right, else the model."""
    full = verdict.arm("F")
    return "context" if full is not None and full.right else "model"


def by_blocks(verdict: Verdict) -> str:
    """Whether the evidence's own blocks are there, and nothing else."""
    if not verdict.evidence:
        return "source"
    return "model" if all(r.block for r in verdict.residency) else "context"


def by_o(verdict: Verdict) -> str:
    """The evidence alone: the context where it is enough, else the model."""
    o = verdict.arm("O")
    if o is None:
        return "source"
    return "context" if o.right else "model"


METHODS = {
    "blame": lambda v: v.fault, "naive E vs F": naive, "blocks only": by_blocks, "O-test": by_o,
}  # fmt: skip


def _counted(done: Sequence[Tried]) -> list[tuple[Tried, Verdict]]:
    return [(t, t.verdict) for t in done if t.state == "counts" and t.verdict is not None]


def _accuracy(counted: Sequence[tuple[Tried, Verdict]], method: Any) -> tuple[float, float]:
    n = len(counted)
    right = sum(method(v) == t.label for t, v in counted)
    involved = sum((method(v) in INVOLVED) == (t.label in INVOLVED) for t, v in counted)
    return right / n, involved / n


def calibration_error(counted: Sequence[tuple[Tried, Verdict]]) -> float:
    """Expected calibration error over BINS equal bins (Guo et al. 2017, section 2)."""
    bins: dict[int, list[tuple[float, bool]]] = collections.defaultdict(list)
    for t, v in counted:
        bins[min(BINS - 1, int(v.confidence * BINS))].append((v.confidence, v.fault == t.label))
    return sum(
        abs(sum(c for c, _ in inside) - sum(r for _, r in inside)) for inside in bins.values()
    ) / len(counted)


def table(done: Sequence[Tried]) -> str:
    """Per injection: turns that count, what blame and the others said right, and wrongly of it."""
    lines = [f"{'injected':22} {'label':8} counts  left out  " + "  ".join(METHODS)]
    counted = _counted(done)
    for injected in dict.fromkeys(t.injected for t in done):
        mine = [(t, v) for t, v in counted if t.injected == injected]
        out = sum(t.injected == injected and t.state != "counts" for t in done)
        if not mine:
            lines.append(f"{injected:22} {'':8} {0:6}  {out:8}")
            continue
        shares = [
            f"{sum(m(v) == t.label for t, v in mine) / len(mine):{max(4, len(name))}.2f}"
            for name, m in METHODS.items()
        ]
        wrong = collections.Counter(
            f"{v.fault}/{v.cause}" for t, v in mine if v.fault != t.label
        ).most_common(3)
        lines.append(
            f"{injected:22} {mine[0][0].label:8} {len(mine):6}  {out:8}  " + "  ".join(shares)
            + (f"   wrong: {dict(wrong)}" if wrong else "")
        )  # fmt: skip
    return "\n".join(lines)


def result(done: Sequence[Tried]) -> dict[str, Any]:
    """The closing JSON."""
    counted = _counted(done)
    told = {name: _accuracy(counted, method) for name, method in METHODS.items()}
    said = [v for t, v in counted if t.injected == "paraphrased"]
    return {
        "class_accuracy": told["blame"][0],
        "involved_accuracy": told["blame"][1],
        "calibration_error": calibration_error(counted),
        "class_accuracy_naive": told["naive E vs F"][0],
        "involved_accuracy_naive": told["naive E vs F"][1],
        "class_accuracy_blocks": told["blocks only"][0],
        "involved_accuracy_blocks": told["blocks only"][1],
        "class_accuracy_o": told["O-test"][0],
        "involved_accuracy_o": told["O-test"][1],
        "turns": len(counted),
        "left_out": sum(t.state != "counts" for t in done),
        "by_seed": {
            str(seed): _accuracy([p for p in counted if p[0].seed == seed], METHODS["blame"])[0]
            for seed in sorted({t.seed for t, _ in counted})
        },
        "paraphrases_called_lost": sum(v.cause == "lost" for v in said),
        "tokens_replayed": sum(v.prompt_tokens for _, v in counted) / len(counted),
        "tokens_cached": sum(v.cached_tokens for _, v in counted) / len(counted),
    }


def calibrate(done: Sequence[Tried], to: Path = CALIBRATION) -> None:
    """Writes the shares of right verdicts into kvmem/blame/calibration.py."""
    from kvmem.blame.verdict import strength_of

    counted = _counted(done)
    right = sum(v.fault == t.label for t, v in counted)
    whole = (right + 1) / (len(counted) + 2)  # Laplace: all right of a few is not certain
    kinds: dict[str, list[bool]] = collections.defaultdict(list)
    classes: dict[str, list[bool]] = collections.defaultdict(list)
    for t, v in counted:
        arms = {arm.name: arm for arm in v.arms}
        kinds[f"{v.fault}/{strength_of(v.fault, arms)}"].append(v.fault == t.label)
        classes[v.fault].append(v.fault == t.label)
    known = {name: classes.get(name, []) for name in CLASSES if name != "unknown"}
    prior = {c: (sum(r) + FEW * whole) / (len(r) + FEW) for c, r in known.items()}
    share = {
        k: (sum(r) + FEW * prior[k.split("/")[0]]) / (len(r) + FEW)
        for k, r in sorted(kinds.items())
    }
    text = to.read_text(encoding="utf-8")
    for name, found in (("PRIOR", prior), ("CONFIDENCE", share)):
        head = f"{name}: dict[str, float] = {{"
        before, _, rest = text.partition(head)
        after = rest.partition("}")[2]
        rows = "".join(f'\n    "{key}": {value:.3f},' for key, value in found.items())
        text = f"{before}{head}{rows}\n}}{after}"
    to.write_text(text, encoding="utf-8")
    print(f"{len(counted)} turns, {right} right: {to}")


def long_turn(case: Case, renderer: Any, n_tokens: int) -> Any:
    """The case's turn behind so much more of a log that it has about `n_tokens` tokens."""
    from kvmem.blame.runs import turn_of
    from kvmem.blame.scorer import render

    turn = case.turn
    full = [p.message for p in turn.full]
    served = [p.message for p in turn.served]
    notes: list[dict[str, Any]] = []
    while True:
        number = len(notes)
        notes.append(
            {"role": "user", "content": "\n".join(
                f"record {number}.{i}: checked at step {7 * i + number}, nothing to report"
                for i in range(20))}
        )  # fmt: skip
        ids = render(renderer, [*notes, *served, turn.question], system=turn.system)
        if len(ids) >= n_tokens:
            break
    return turn_of(
        "long", turn.question, [*notes, *full], [*notes, *served], system=turn.system,
        expected=turn.expected, candidates=turn.candidates,
    )  # fmt: skip
