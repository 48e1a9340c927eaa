"""When prompts may be answered: every rank has proved that its blocks come back as they were.

Each worker's half tries it out on the engine's own tensors (`kvmem.engines.proving`). Until every
rank has said that it went well the scheduler's half answers no prompt from kvmem, and where it did
not, never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvmem import events

__all__ = ["ProofDone", "Proofs"]

PATIENCE_S = 5.0


@dataclass(slots=True)
class ProofDone:
    """What a rank found: nothing, or what went wrong."""

    rank: int
    error: str


class Proofs:
    """What the scheduler's half knows of them.

    Args:
        ranks: how many there must be.
        bus: where the outcome goes.
        clock: seconds.
    """

    def __init__(self, ranks: int, bus: events.Bus, clock: Callable[[], float]) -> None:
        self._ranks = ranks
        self._bus = bus
        self._clock = clock
        self._told: set[int] = set()
        self._waits_since_s: float | None = None
        self.error: str | None = None

    @property
    def wanted(self) -> bool:
        """Whether the workers are to say what they found: all of it, however often it got lost."""
        return self.error is None and len(self._told) < self._ranks

    @property
    def failed(self) -> bool:
        """Whether no prompt can be answered: a proof failed, or none came in time."""
        return self.error is not None or (self.wanted and self._late())

    def told(self, proofs: Iterable[ProofDone]) -> str | None:
        """Takes in what workers found; the error, when there is one for the first time."""
        before = self.wanted
        for proof in proofs:
            self._told.add(proof.rank)
            if proof.error and self.error is None:
                self.error = f"rank {proof.rank}: {proof.error}"
        if before and not self.wanted:
            self._bus.emit(events.Proof(tier="host", error=self.error or ""))
            return self.error
        return None

    def wait(self) -> None:
        """A prompt waits for them from now on."""
        if self._waits_since_s is None:
            self._waits_since_s = self._clock()

    def _late(self) -> bool:
        since = self._waits_since_s
        return since is not None and self._clock() - since > PATIENCE_S
