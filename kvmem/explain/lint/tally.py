"""Adds up what is found in a file; lists are bounded, counts are not."""

from __future__ import annotations

from kvmem.explain.lint.chains import Chain
from kvmem.explain.lint.values import (
    Break,
    Fault,
    FileReport,
    Part,
    Prefill,
    Request,
    Unit,
)

__all__ = ["MOST_BREAKS", "MOST_FAULTS", "Tally"]

MOST_BREAKS = 10_000
MOST_FAULTS = 1_000
MOST_AGENTS = 2_000
_OTHERS = ("other sessions", "all")


class Tally:
    """What was found so far."""

    def __init__(self, path: str, unit: Unit, block_tokens: int, with_requests: bool) -> None:
        self.unit: Unit = unit
        self.block_tokens = block_tokens
        self._path = path
        self._with_requests = with_requests
        self._n_calls = self._n_breaks = self._n_faults = 0
        self._prompt = self._cached = self._lost = 0
        self._sessions: set[str] = set()
        self._breaks: list[Break] = []
        self._faults: list[Fault] = []
        self._requests: list[Request] = []
        self._agents: set[tuple[str, str]] = set()
        self._prefill: dict[tuple[str, str, str], Prefill] = {}

    def fault(self, fault: Fault) -> None:
        """Counts a place that could not be read."""
        self._n_faults += 1
        if len(self._faults) < MOST_FAULTS:
            self._faults.append(fault)

    def broken(self, found: Break) -> None:
        """Counts a break."""
        self._n_breaks += 1
        self._lost += found.lost_tokens
        if len(self._breaks) < MOST_BREAKS:
            self._breaks.append(found)

    def request(self, request: Request) -> None:
        """Counts a call."""
        self._n_calls += 1
        self._prompt += request.prompt
        self._cached += request.cached
        self._sessions.add(request.session)
        if self._with_requests:
            self._requests.append(request)

    def parts(
        self,
        chain: Chain,
        parts: list[Part],
        units: list[str | list[int]],
        cached: int,
        again: int,
    ) -> None:
        """Counts what of a prompt's parts is computed: the first `again` units of it once more."""
        at = cached
        end = 0
        for part, piece in zip(parts, units, strict=True):
            end += len(piece)
            if end <= at:
                continue
            n, at = end - at, end
            once_more = min(n, again)
            again -= once_more
            self.prefill(chain, part.role, n - once_more, once_more)

    def prefill(self, chain: Chain, role: str, new: int, again: int) -> None:
        """Counts units computed of a role."""
        if not new and not again:
            return
        agent = (chain.session, chain.agent)
        if agent not in self._agents:
            if len(self._agents) >= MOST_AGENTS:
                agent = _OTHERS
            self._agents.add(agent)
        session, name = agent
        found = self._prefill.get((session, name, role))
        if found is None:
            found = self._prefill[session, name, role] = Prefill(session, name, role)
        found.new += new
        found.again += again

    def report(self, form: str) -> FileReport:
        """All of it."""
        return FileReport(
            path=self._path,
            format=form,
            unit=self.unit,
            block_tokens=self.block_tokens,
            n_calls=self._n_calls,
            n_sessions=len(self._sessions),
            n_breaks=self._n_breaks,
            n_faults=self._n_faults,
            prompt=self._prompt,
            cached=self._cached,
            lost_tokens=self._lost,
            breaks=tuple(self._breaks),
            faults=tuple(self._faults),
            prefill=tuple(self._prefill.values()),
            requests=tuple(self._requests),
        )
