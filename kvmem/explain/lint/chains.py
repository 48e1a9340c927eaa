"""Which earlier prompt a call is meant to extend: the last one of its session and agent.

Where a log names them, they decide. Where it does not, the prompt does: the chain that shares most
messages with it, wherever they stand in it, so that an edited head does not hide whose it is.
"""

from __future__ import annotations

from collections import OrderedDict

from kvmem.explain.lint.values import Call, Part

__all__ = ["Chain", "Chains"]

MOST_CHAINS = 4_096
MOST_HELD = 64 << 20  # characters and ids of the chains' last prompts
_COMPARED = 256  # of the newest chains, where a log names no session


class Chain:
    """The last prompt of one agent in one session, and what was measured of it."""

    def __init__(self, session: str, agent: str) -> None:
        self.session, self.agent = session, agent
        self.turn = -1
        self.line = 0
        self.parts: list[Part] = []
        self.reply: Part | None = None
        self.model: str | None = None
        self.place = ""  # in which equal prompts are one: a model's cache, under a salt
        self.units: list[str | list[int]] = []  # of each part
        self.keys: list[bytes] = []  # of each part with all before it
        self.size = 0
        self.ids: list[int] = []
        self.n_whole = 0  # ids that stand for whole blocks
        self.names: frozenset[int] = frozenset()

    @property
    def held(self) -> int:
        """Characters and ids kept in memory."""
        return self.size + len(self.ids)


class Chains:
    """The chains that are open; the least lately used close when there are too many."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, str], Chain] = OrderedDict()
        self._held = 0
        self._n_named = 0

    def of(self, call: Call) -> Chain:
        """The chain that a call goes on, or a new one."""
        if call.session is not None and call.agent is not None:
            return self._get(call.session, call.agent)
        names = _names(call.parts)
        chain = self._closest(call, names)
        if chain is None:
            self._n_named += 1
            session = call.session if call.session is not None else f"session-{self._n_named}"
            chain = self._get(session, call.agent or self._free_agent(session))
        chain.names = names
        self._open.move_to_end((chain.session, chain.agent))
        return chain

    def measured(self, before: int, chain: Chain) -> None:
        """Counts what a chain holds after a call; before it was `before`."""
        self._held += chain.held - before
        while len(self._open) > MOST_CHAINS or (self._held > MOST_HELD and len(self._open) > 1):
            _, oldest = self._open.popitem(last=False)
            self._held -= oldest.held

    def _get(self, session: str, agent: str) -> Chain:
        chain = self._open.get((session, agent))
        if chain is None:
            chain = self._open[session, agent] = Chain(session, agent)
        else:
            self._open.move_to_end((session, agent))
        return chain

    def _free_agent(self, session: str) -> str:
        n = 1
        while (session, agent := "main" if n == 1 else f"agent-{n}") in self._open:
            n += 1
        return agent

    def _closest(self, call: Call, names: frozenset[int]) -> Chain | None:
        """The chain that shares most with a call; the newest of several."""
        best, most = None, 0
        for n, chain in enumerate(reversed(self._open.values())):
            if call.session is None and n == _COMPARED:
                break
            if call.session not in (None, chain.session) or call.agent not in (None, chain.agent):
                continue
            shared = len(chain.names & names)
            if shared > most:
                best, most = chain, shared
            elif best is None and call.session is not None and _same_head(chain.parts, call.parts):
                best = chain
        return best


def _names(parts: list[Part]) -> frozenset[int]:
    """Hashes of the messages: only compared within one process, never shown."""
    return frozenset(hash(part.identity) for part in parts if part.kind == "message")


def _same_head(before: list[Part], now: list[Part]) -> bool:
    """Whether two prompts that share no message may still be one agent's: by system prompt."""
    old = [part.text for part in before if part.kind == "system"]
    new = [part.text for part in now if part.kind == "system"]
    return old == new
