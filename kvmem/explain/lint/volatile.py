"""Which of two texts' differences is one that changes by itself: times, ids, counters, paths."""

from __future__ import annotations

import re

__all__ = ["common_length", "volatile"]

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_DAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_PATTERNS: tuple[tuple[str, str], ...] = (
    (
        "volatile-path",
        r"(?:/tmp|/var/tmp|/var/folders|/private/tmp|/dev/shm|\\Temp)[/\\][\w./\\+-]*",
    ),
    ("volatile-id", r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"),
    (
        "volatile-time",
        (
            r"\b\d{4}[-/]\d{1,2}[-/]\d{1,2}(?:[T ]+\d{1,2}:\d{2}(?::\d{2})?(?:[.,]\d+)?)?"
            r"(?:\s?(?:Z|UTC|GMT|[+-]\d{2}:?\d{2}))?"
            r"|\b\d{1,2}[-/.]\d{1,2}[-/.]\d{4}\b"
            r"|\b\d{1,2}:\d{2}(?::\d{2})?(?:[.,]\d+)?(?:\s?[AaPp][Mm]\b)?"
            rf"|\b(?:{_DAY}\b,?\s*)?{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?:,?\s+\d{{4}})?"
            rf"|\b\d{{1,2}}\s+{_MONTH}\b(?:\s+\d{{4}})?|\b{_DAY}\b"
            r"|\b1[4-9]\d{8}(?:\d{3}){0,3}(?:\.\d+)?\b"
        ),
    ),
    (
        "volatile-id",
        (
            r"\b(?=[0-9a-fA-F]*\d)(?:[0-9a-f]{8,}|[0-9A-F]{8,})\b"
            r"|\b[a-z]{2,12}[_-](?=[A-Za-z]*\d)[A-Za-z0-9]{8,}\b"
            r"|\b(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{16,}\b"
        ),
    ),
    ("volatile-counter", r"\d+(?:[.,]\d+)*"),
)
_ALL = re.compile("|".join(f"(?P<p{i}>{text})" for i, (_, text) in enumerate(_PATTERNS)))
_MOST = 1 << 20  # characters looked at: no prompt's head is longer


def volatile(before: str, now: str) -> str | None:
    """The rule of what changed, where nothing but volatile text did; else None."""
    if max(len(before), len(now)) > _MOST:
        return None
    old, new = list(_ALL.finditer(before)), list(_ALL.finditer(now))
    if len(old) != len(new) or _ALL.sub("\0", before) != _ALL.sub("\0", now):
        return None
    for one, other in zip(old, new, strict=True):
        if one[0] != other[0]:
            kinds = {_kind(one), _kind(other)}
            # A run of digits may look like an id here and like a number there.
            return next(name for name, _ in _PATTERNS if name in kinds)
    return None


def _kind(found: re.Match[str]) -> str:
    return _PATTERNS[int((found.lastgroup or "p0")[1:])][0]


def common_length(before: str | list[int], now: str | list[int]) -> int:
    """How long the two are equal from their start on."""
    n = min(len(before), len(now))
    if before[:n] == now[:n]:
        return n
    low, high, step = 0, n, 256
    while low + step < high and before[low : low + step] == now[low : low + step]:
        low, step = low + step, step * 2
    high = min(high, low + step)
    while low < high:  # before[:low] == now[:low], and they differ before high
        middle = (low + high + 1) // 2
        if before[low:middle] == now[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
