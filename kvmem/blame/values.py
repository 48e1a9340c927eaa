"""What a turn that went wrong is, and what is said of it. Every value goes through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

__all__ = [
    "ARMS",
    "CAUSES",
    "CLASSES",
    "INVOLVED",
    "Arm",
    "Class",
    "Epoch",
    "Evidence",
    "Piece",
    "Residency",
    "Turn",
    "Verdict",
]

Class = Literal["ok", "context", "model", "both", "source", "cache", "unknown"]
CLASSES: tuple[Class, ...] = ("ok", "context", "model", "both", "source", "cache", "unknown")
# Faults that other context engineering, or an exact cache, would have prevented.
INVOLVED = frozenset({"context", "both", "cache"})
# What was wrong with a context. "buried": it was there, among too much else.
CAUSES = ("lost", "truncated", "stale", "contradicted", "buried")
ARMS = {
    "E": "as served, with the same KV",
    "X": "the same context, exact KV",
    "F": "the full history: every epoch undone, every offloaded span restored",
    "O": "the evidence alone",
    "P": "the evidence alone, put another way",
    "N": "the question without evidence",
    "R": "as served, sampled again",
    "M": "as served, to another model",
}


class Piece(msgspec.Struct, frozen=True):
    """One message of a history or of a served context.

    Args:
        index: its place there, from 0 behind the system prompt.
        message: as an OpenAI client sends it.
        text: what of it a reader sees: content and the arguments of its own calls.
        call: name and arguments of the call that a tool's message answers, as text.
        arguments: the values of those arguments.
    """

    index: int
    message: Mapping[str, Any]
    text: str
    call: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """Its message's."""
        return str(self.message.get("role", ""))


class Epoch(msgspec.Struct, frozen=True):
    """A rewriting of history: which pieces of the full history it took out, and what it put in."""

    number: int
    removed: tuple[int, ...]
    what: str = ""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn: what the model was asked, what it could have been asked, what was right.

    Args:
        name: of the run, and the turn in it.
        system, tools: of the head.
        full: the history with every epoch undone, without the question.
        served: the context as it was served, without the question.
        question: the message that the turn answers; the last of a prompt.
        served_ids, full_ids: the prompts' token ids where they are known (from ledgers), up to
            where the model begins; rendered from the messages where not.
        answered: what the model said.
        expected: the right answer, as a text that it would begin with; "" where only a judge knows.
        candidates: answers to compare, `expected` among them.
        kv: what KV the prompt was served with: "exact" by its label (I10), "approximate", or the
            codec that the transformers engine is to serve it with again ("int8", "int4", "int2").
        salt: the cache salt that it was served under.
        evidence: pieces of `full` that are known to hold what the answer depends on.
        epochs: what was done to the history.
    """

    name: str
    question: Mapping[str, Any]
    full: tuple[Piece, ...]
    served: tuple[Piece, ...]
    system: str | None = None
    tools: tuple[Any, ...] = ()
    served_ids: tuple[int, ...] = ()
    full_ids: tuple[int, ...] = ()
    answered: str = ""
    expected: str = ""
    candidates: tuple[str, ...] = ()
    kv: str = "exact"
    salt: str = ""
    evidence: tuple[int, ...] = ()
    epochs: tuple[Epoch, ...] = ()

    @property
    def asked(self) -> str:
        """The question's text."""
        content = self.question.get("content")
        return content if isinstance(content, str) else str(content or "")


class Evidence(msgspec.Struct, frozen=True):
    """A piece of the full history that the answer depends on.

    Args:
        index: of the piece.
        why: how it was found: "given", "argument", "lexical", "value", "attribution".
        coverage: the share of the question's terms that it has, by their rarity; 0..1.
        values: what it says of what was asked.
        older: what earlier pieces said of the same.
        line: the part that says it.
        group: the fact it is of; the latest piece of a group holds.
    """

    index: int
    why: str
    coverage: float
    values: tuple[str, ...]
    older: tuple[str, ...] = ()
    line: str = ""
    group: str = ""


class Residency(msgspec.Struct, frozen=True):
    """Whether what a piece of evidence says was in the served context.

    Args:
        index: of the piece.
        block: the very message is there, unchanged.
        value: what it says is there, in any words.
        where: the served piece that says it, or that stands in its place; None for none.
        cause: of CAUSES, why it could not be used; "" where nothing speaks against it.
        said: what the served context says of it instead, or besides.
        epoch: the epoch that took it out.
    """

    index: int
    block: bool
    value: bool
    where: int | None = None
    cause: str = ""
    said: str = ""
    epoch: int | None = None


class Arm(msgspec.Struct, frozen=True):
    """One replay.

    Args:
        name: of ARMS.
        right: whether its answer is.
        answer: the likeliest candidate, or what was sampled.
        logprob: of `expected`, in nats; None where there is none.
        margin: of the best right candidate over the best wrong one, in nats; with a judge 1 or -1,
            or of several samples between.
        share: the right ones of its samples, or their probability among the candidates.
        prompt_tokens, cached_tokens, seconds: its cost.
        note: where it is not a replay of its own.
    """

    name: str
    right: bool
    answer: str
    logprob: float | None
    margin: float
    share: float
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    note: str = ""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of a turn.

    Args:
        turn: its name.
        fault: of CLASSES.
        cause: of CAUSES, where the context is at fault.
        confidence: the share of such verdicts that are right, on the calibration's logs.
        why: in a sentence.
        fix: what would have helped.
        span: the piece of the full history to blame; None where none is.
        epoch: the epoch to blame.
        changed: whether the served KV gave another answer than exact KV.
        arms: the replays.
        evidence, residency: what the answer depends on, and whether it was there.
        influence: by piece of the full history, in nats; empty where it was not measured.
        prompt_tokens, cached_tokens, seconds: what all replays cost.
    """

    turn: str
    fault: Class
    cause: str = ""
    confidence: float = 0.0
    why: str = ""
    fix: str = ""
    span: int | None = None
    epoch: int | None = None
    changed: bool = False
    arms: tuple[Arm, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    residency: tuple[Residency, ...] = ()
    influence: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0

    def arm(self, name: str) -> Arm | None:
        """The replay of that name, where it was made."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def explain(self) -> str:
        """A few lines for people."""
        cause = f" ({self.cause})" if self.cause else ""
        sure = min(self.confidence, 0.99)
        lines = [f"{self.turn}: {self.fault}{cause}, confidence {sure:.0%}. {self.why}"]
        lines += [
            f"  {arm.name}  {'right' if arm.right else 'wrong'}  {arm.margin:+7.2f} nats  "
            f"{arm.answer[:60]!r}"
            for arm in self.arms
        ]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        lines.append(
            f"  {self.prompt_tokens:,} tokens replayed, {self.cached_tokens:,} of them cached, "
            f"in {self.seconds:.2f} s"
        )
        return "\n".join(lines)
