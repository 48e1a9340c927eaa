"""When do prompts come back? Learned as a hazard by the age of what waits, class by class.

For each bin of age it counts returns and the seconds that were waited in it, so that what has not
come back yet counts, too: hazard = returns / seconds. A class is a path of features, most telling
first; each prefix of it is a class of its own and lends its hazard to the next until that has seen
enough. From the hazards comes what keeping is worth at an age t, the Gittins index of the wait:

    worth(t) = max over H of P(return within H | age t) / E[seconds kept up to then | age t]

the best rate of hits for each second of a block's room that any time limit H could get (J. C.
Gittins, "Bandit processes and dynamic allocation indices", 1979). A steady loop is worth most just
before it returns, a heavy tail less the longer it lasts; no horizon has to be set.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["N_BINS", "Class", "Returns"]

Class = tuple[str | int, ...]
Floats = npt.NDArray[np.float64]

FIRST_S, RATIO, N_BINS = 0.5, 1.35, 48  # the last bin begins at 8 days
EDGES_S: Floats = np.concatenate([[0.0], FIRST_S * RATIO ** np.arange(N_BINS)])
_EDGES: list[float] = EDGES_S.tolist()
WIDTHS_S: Floats = np.diff(EDGES_S)
MOST_CLASSES = 4096
# Before anything was seen: a tail as heavy as the waits of agents have, 20 seconds' worth of it.
PRIOR: Floats = 0.3 / ((EDGES_S[:-1] + EDGES_S[1:]) / 2 + 5)
PRIOR_S = 20.0
# The same for kinds of waits: medians of about 9 s for tools and 2 minutes for persons, as agents
# have them, and a second for the prompt after a wait that is over.
PRIORS: dict[str | int, Floats] = {
    "tool": 0.9 / ((EDGES_S[:-1] + EDGES_S[1:]) / 2 + 8),
    "user": 0.9 / ((EDGES_S[:-1] + EDGES_S[1:]) / 2 + 110),
    "back": np.where(EDGES_S[:-1] < 2.0, 1.0, 0.2),
}
LENT = 3.0  # returns that a class's hazard is lent before its own count
STALE = 1.15  # a table is made again when its class has seen so much more


class _Seen:
    __slots__ = ("n", "returns", "seconds", "table", "table_n")

    def __init__(self) -> None:
        self.returns, self.seconds = np.zeros(N_BINS), np.zeros(N_BINS)
        self.n = self.table_n = 0
        self.table: Floats | None = None


class Returns:
    """See the module."""

    def __init__(self) -> None:
        self._seen: dict[Class, _Seen] = {(): _Seen()}
        self.stale: set[Class] = set()  # classes whose worth is another by now

    def settle(self, of: Class) -> Class:
        """The class itself, or what is known of it where there are too many."""
        while of not in self._seen and len(self._seen) >= MOST_CLASSES:
            of = of[:-1]
        for n in range(len(of) + 1):
            if of[:n] not in self._seen:
                self._seen[of[:n]] = _Seen()
                self.stale.add(of[:n])
        return of

    def waited(self, of: Class, from_s: float, to_s: float) -> None:
        """One of this class was waited for, from one age to another, no lesser one."""
        first, last = _bin_of(from_s), _bin_of(to_s)
        spent = WIDTHS_S[first : last + 1].copy()
        spent[-1] = min(to_s - _EDGES[last], spent[-1])
        spent[0] -= min(max(0.0, from_s) - _EDGES[first], float(WIDTHS_S[first]))
        self._add(of, spent, 1, first)

    def waited_all(
        self, of: Sequence[Class], which: npt.NDArray[np.int64], from_s: Floats, to_s: Floats
    ) -> None:
        """As `waited`, for many at once: the i-th is of the class of[which[i]]."""
        spent = _spent_by(which, to_s, len(of)) - _spent_by(which, from_s, len(of))
        counts = np.bincount(which, minlength=len(of))
        for number in np.nonzero(counts)[0].tolist():
            self._add(of[number], spent[number], int(counts[number]))

    def _add(self, of: Class, spent: Floats, count: int, first: int = 0) -> None:
        """Seconds in the bins from that one on."""
        for n in range(len(of) + 1):
            seen = self._seen[of[:n]]
            seen.seconds[first : first + len(spent)] += spent
            self._count(of[:n], seen, count)

    def _count(self, of: Class, seen: _Seen, count: int) -> None:
        seen.n += count
        if seen.n > STALE * seen.table_n + 4:
            self.stale.add(of)

    def returned(self, of: Class, age_s: float) -> None:
        """It came back at this age."""
        at = _bin_of(age_s)
        for n in range(len(of) + 1):
            seen = self._seen[of[:n]]
            seen.returns[at] += 1
            self._count(of[:n], seen, 1)

    def hazard(self, of: Class) -> Floats:
        """Returns a second in each bin of age."""
        seen = self._seen[of]
        prior = PRIOR if not of else PRIORS.get(of[0]) if len(of) == 1 else None
        if prior is not None:
            return (seen.returns + prior * PRIOR_S) / (seen.seconds + PRIOR_S)
        lent = np.maximum(self.hazard(of[:-1]), 1e-12)
        return (seen.returns + LENT) / (seen.seconds + LENT / lent)

    def worth(self, of: Class) -> Floats:
        """Hits a second of keeping, by bin of age; not to be changed."""
        seen = self._seen[of]
        if seen.table is None or seen.n > STALE * seen.table_n + 4:
            seen.table, seen.table_n = gittins(self.hazard(of)), seen.n
        self.stale.discard(of)
        return seen.table


def _bin_of(age_s: float) -> int:
    """The bin of one age."""
    return min(N_BINS - 1, max(0, bisect.bisect_right(_EDGES, age_s) - 1))


def _spent_by(which: npt.NDArray[np.int64], ages_s: Floats, n: int) -> Floats:
    """The same of many ages, together by their number in [0, n)."""
    at = bins_of(ages_s)
    cells = which * N_BINS + at
    ended = np.bincount(cells, minlength=n * N_BINS).reshape(n, N_BINS)
    inside = np.minimum(ages_s - EDGES_S[at], WIDTHS_S[at])
    part = np.bincount(cells, inside, minlength=n * N_BINS).reshape(n, N_BINS)
    passed = ended[:, ::-1].cumsum(1)[:, ::-1] - ended  # those that ended in a later bin
    spent: Floats = part + passed * WIDTHS_S
    return spent


def bins_of(ages_s: Floats) -> npt.NDArray[np.intp]:
    """The bin of each age."""
    return np.clip(np.searchsorted(EDGES_S, ages_s, side="right") - 1, 0, N_BINS - 1)


def gittins(hazard: Floats) -> Floats:
    """The index at the beginning of each bin, where the hazard is even within a bin."""
    here = hazard * WIDTHS_S
    gone = np.concatenate([[0.0], np.cumsum(here)])[:-1]
    # [i, j]: still waited for at bin j, of what was at bin i
    left = np.triu(np.exp(np.minimum(0.0, gone[:, None] - gone[None, :])))
    back = np.cumsum(left * -np.expm1(-here), 1)
    kept = np.cumsum(left * (-np.expm1(-here) / np.maximum(hazard, 1e-12)), 1)
    rates = np.divide(back, kept, out=np.zeros_like(back), where=kept > 0)
    index: Floats = rates.max(1)
    return index
