"""Which pieces of the history an answer depends on.

A tool's result is found by its call: every argument stands in the question. Others are found by
their lines, by the share of the question's terms that a line has, rare ones counting more. A
question may need several facts; each is a group of pieces that tell of the same, and the latest of
a group holds. Where neither finds anything, `attribution` (leaving one out) is left to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from kvmem.blame.values import Evidence, Piece, Turn
from kvmem.blame.words import Rarity, holds, lines, terms, values

__all__ = ["Fact", "Question", "facts_of", "find", "told"]

# A line that has so much of what a fact is about tells of it.
TELLS = 0.8
# A line is a fact of its own where it adds so much of the question to those that were found.
ADDS = 0.25
# The best line must have so much of the question, or nothing was found.
LEAST = 0.6
# With so much of it, a line that says the expected answer counts.
WITH_VALUE = 0.4
MOST_FACTS = 6


class Question:
    """The terms of a question that tell, and how much each does.

    Args:
        turn: whose history says what is rare.
    """

    def __init__(self, turn: Turn) -> None:
        self.text = turn.asked
        self.rarity = Rarity([f"{piece.call} {piece.text}" for piece in turn.full])
        own = terms(self.text)
        named = {t for word in self.text.split() if _is_name(word) for t in terms(word)}
        # A common word that the history never uses is the question's manner of speaking.
        self.terms = {t for t in own if self.rarity.known(t) or t in named}
        # Its words, in order, each with its parts: `timeout_ms` is one.
        parts = [terms(word) & self.terms for word in self.text.split()]
        self.words = [part for part in parts if part]
        # With those that the history never uses: one of them may be what is asked about.
        self.n_asked = len({frozenset(terms(word)) for word in self.text.split() if terms(word)})

    def n_words(self, text: set[str]) -> int:
        """How many of its words a set of terms has, whole."""
        return len({frozenset(word) for word in self.words if word <= text})

    def width(self, text: set[str]) -> int:
        """How many words lie from the first to the last that a set of terms has, at the closest."""
        places = [i for i, word in enumerate(self.words) if word & text]
        best = len(self.words)
        for at, first in enumerate(places):
            seen: set[str] = set()
            for last in places[at:]:
                seen |= self.words[last] & text
                if seen >= text & self.terms:
                    best = min(best, last - first)
                    break
        return best

    def coverage(self, text: set[str], of: set[str] | None = None) -> float:
        """See `Rarity.coverage`; of all the question's terms, or of some."""
        return self.rarity.coverage(self.terms if of is None else of, text)


def _is_name(word: str) -> bool:
    """Identifiers, paths, quoted words: `billing.timeout_ms`, 'search', "v2"."""
    bare = word.strip(".,;:?!()")
    return any(c in bare for c in "_./`'\"") or any(c.isdigit() for c in bare) or bare.isupper()


class Fact(msgspec.Struct):
    """One thing that the question asks: its terms, and the lines that tell of it, in order."""

    terms: set[str]
    told: list[tuple[int, str, tuple[str, ...]]]  # piece, line, values


def told(piece: Piece) -> Iterator[tuple[str, set[str]]]:
    """Each line of a piece with its terms; the call that it answers is part of every line."""
    call = terms(piece.call)
    for line in lines(piece.text):
        yield line, terms(line) | call


def find(turn: Turn) -> list[Evidence]:
    """The pieces of the full history that the answer depends on, the latest of each fact."""
    return [one for fact in facts_of(turn) for one in _evidence(turn, fact, Question(turn))]


def facts_of(turn: Turn) -> list[Fact]:
    """What the question asks, as far as the history tells of it."""
    question = Question(turn)
    if turn.evidence:
        seeds = [_best(question, turn.full[i]) for i in turn.evidence if i < len(turn.full)]
        seeds = [seed for seed in seeds if seed]
    else:
        seeds = _by_arguments(question, turn.full) or _by_lines(question, turn)
    facts: list[Fact] = []
    for seed in seeds[:MOST_FACTS]:
        if not any(seed == fact.terms for fact in facts):
            facts.append(Fact(seed, list(_members(question, turn.full, seed))))
    return [fact for fact in facts if fact.told]


def _best(question: Question, piece: Piece) -> set[str]:
    found = [text & question.terms for _, text in told(piece)]
    return max(found, key=lambda one: question.coverage(one), default=set())


def _by_arguments(question: Question, pieces: Sequence[Piece]) -> list[set[str]]:
    """Of calls whose arguments all stand in the question; the arguments' terms are the fact's.

    "the timeout of billing and the port of search" names four arguments, and four calls fit them:
    from its first word on, each time the call that has most of what is left, closest together.
    """
    own = terms(question.text)
    fitting = []
    for piece in pieces:
        wanted = [terms(argument) for argument in piece.arguments]
        if wanted and all(one and one <= own for one in wanted):
            fitting.append(set().union(*wanted))
    seeds: list[set[str]] = []
    left = set().union(*fitting) if fitting else set()
    while left:
        first = next((word & left for word in question.words if word & left), left)
        able = [one for one in fitting if one & first]
        best = max(able, key=lambda one: (question.n_words(one & left), -question.width(one)))
        seeds.append(best)
        left -= best
    return seeds


def _by_lines(question: Question, turn: Turn) -> list[set[str]]:
    """Lines, the best first, each of which adds to what is known of the question."""
    found: list[set[str]] = []
    covered: set[str] = set()
    spoken = [
        (line, text & question.terms)
        for piece in turn.full
        for line, text in told(piece)
        if values(line, but=[question.text])
    ]
    # What is asked, and of what: a line that has but one of the two tells of another thing.
    least = min(2, question.n_asked)
    spoken = [one for one in spoken if question.n_words(one[1]) >= least]
    while len(found) < MOST_FACTS:
        best = max(spoken, key=lambda one: question.coverage(one[1] - covered), default=None)
        if best is None or question.coverage(best[1] - covered) < ADDS:
            break
        found.append(best[1])
        covered |= best[1]
    if question.coverage(covered) >= LEAST:
        return found
    return [
        text
        for line, text in spoken
        if turn.expected and holds(line, turn.expected) and question.coverage(text) >= WITH_VALUE
    ][-1:]


def _members(
    question: Question, pieces: Sequence[Piece], seed: set[str]
) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """The lines that tell of a fact: its terms, and a value besides."""
    for piece in pieces:
        best: tuple[float, str, tuple[str, ...]] | None = None
        for line, text in told(piece):
            share = question.coverage(text, seed)
            said = values(line, but=[question.text, piece.call])
            if share >= TELLS and said and (best is None or share > best[0]):
                best = (share, line, said)
        if best is not None:
            yield piece.index, best[1], best[2]


def _evidence(turn: Turn, fact: Fact, question: Question) -> Iterator[Evidence]:
    """The piece that holds for a fact: with the expected answer in it, or the latest."""
    right = [one for one in fact.told if turn.expected and _says(one, turn.expected)]
    others = [one for one in fact.told if turn.full[one[0]].role != "assistant"] or fact.told
    index, line, said = ([one for one in right if one in others] or right or others)[-1]
    older = [
        value
        for at, _, earlier in fact.told
        if at < index
        for value in earlier
        if value not in said
    ]
    piece = turn.full[index]
    by_call = bool(piece.arguments) and terms(" ".join(piece.arguments)) <= terms(question.text)
    yield Evidence(
        index=index,
        why="given" if turn.evidence else "argument" if by_call else "lexical",
        coverage=question.coverage(fact.terms),
        values=(turn.expected,) if right else said,
        older=tuple(dict.fromkeys(older)),
        line=line,
        group=" ".join(sorted(fact.terms)),
    )


def _says(one: tuple[int, str, tuple[str, ...]], value: str) -> bool:
    return holds(one[1], value)
