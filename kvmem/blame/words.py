"""Terms, lines and values of texts: what the lexical parts of blame compare."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Rarity", "holds", "lines", "terms", "values"]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?", re.UNICODE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# A full stop ends a sentence only before a blank: 0.5 and a.b are whole.
_LINE = re.compile(r"\n+|(?<=[.!?;])\s+")
_NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
_VALUE = re.compile(
    r"\"(?P<quoted>[^\"\n]{1,80})\""
    r"|(?P<mixed>\b(?=[\w./-]*\d)(?=[\w./-]*[A-Za-z])[\w./-]+\b)"
    rf"|(?P<number>(?<![\w.]){_NUMBER}(?!\w))"
    r"|(?:[:=]|\b(?:is|was|to|as)\b)\s*(?P<said>[A-Za-z][\w./-]*)"
)
_COMMON = """
a an and are as at be by did do does for from give had has have how i if in is it its me my now of
on or please say should so tell than that the their then there these they this to was we were what
when where which who why will with would you your answer question only value current currently
"""
_STOP = frozenset(_COMMON.split())


def terms(text: str) -> set[str]:
    """The words of a text, lower-cased, identifiers in their parts, without the commonest ones."""
    found = (part.lower() for w in _WORD.findall(text) for part in _CAMEL.split(w))
    return {_stem(t) for t in found if t not in _STOP}


def _stem(word: str) -> str:
    """Without a plural's end."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def lines(text: str) -> Iterator[str]:
    """Lines and sentences, the empty ones left out."""
    return (line for line in (part.strip() for part in _LINE.split(text)) if line)


def values(text: str, *, but: Iterable[str] = ()) -> tuple[str, ...]:
    """What a line may be telling: numbers, quoted texts, names with digits, what follows a colon,
    an equals sign or "is"; in order, each once, without those whose every word is in `but`."""
    known = {t for one in but for t in terms(one)}
    found: dict[str, None] = {}
    for match in _VALUE.finditer(text):
        value = next(v for v in match.groups() if v is not None).strip().rstrip(".,")
        own = terms(value)
        if own and not own <= known:
            found.setdefault(value)
    return tuple(found)


def holds(text: str, value: str) -> bool:
    """Whether a text says a value: as a run of its own, and not as a part of a larger number."""
    value = value.strip()
    if not value:
        return False
    plain = re.escape(value)
    head = r"(?<![\w.])" if value[0].isalnum() else ""
    tail = r"(?!\w)(?!\.\d)" if value[-1].isalnum() else ""
    if re.search(head + plain + tail, text, re.IGNORECASE):
        return True
    if not re.fullmatch(_NUMBER, value):
        return False
    told = float(value.replace(",", ""))  # 4,300 says 4300
    return any(float(n.replace(",", "")) == told for n in re.findall(rf"(?<![\w.]){_NUMBER}", text))


class Rarity:
    """How much a term tells among some texts (BM25's inverse document frequency).

    Args:
        texts: of the history's pieces.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._n = len(texts)
        self._in = Counter(t for text in texts for t in terms(text))

    def of(self, term: str) -> float:
        """At least a little; most for a term that no text has."""
        seen = self._in[term]
        return math.log(1.0 + (self._n - seen + 0.5) / (seen + 0.5))

    def known(self, term: str) -> bool:
        """Whether a text has it."""
        return self._in[term] > 0

    def coverage(self, wanted: set[str], text: set[str]) -> float:
        """The share of the wanted terms that a text has, each by its rarity; 0..1."""
        whole = sum(self.of(t) for t in wanted)
        return sum(self.of(t) for t in wanted & text) / whole if whole else 0.0
