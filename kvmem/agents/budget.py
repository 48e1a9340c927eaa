"""Tokens and seconds that agents may spend; forks and workers spend from the same ones."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from kvmem.agents.values import Usage, Where
from kvmem.errors import BudgetExceeded, ConfigError

__all__ = ["Budget", "Reservation", "Spent"]


class Spent(msgspec.Struct, frozen=True):
    """What is spent of a budget."""

    tokens: int = 0
    seconds: float = 0.0


class Reservation(msgspec.Struct, frozen=True):
    """What one request may take: `max_tokens` sampled, within `seconds`; `tokens` are set aside, of
    them `prompt_tokens` for what must be computed as far as is known.
    """

    tokens: int
    prompt_tokens: int
    max_tokens: int
    seconds: float | None


class Budget:
    """What sessions may spend together. One event loop uses it.

    A request sets aside what it may take at most before it is sent, so requests that run side by
    side do not pass the limit together. Cached tokens are free; where the engine does not say what
    was cached, all of the prompt counts.

    Args:
        tokens: computed prompt tokens and sampled ones, in all; None: as many as they like.
        seconds: of wall time from the first request on; None: as long as they like.
        spent: what was spent before, of a team that goes on.
        clock: seconds that only grow.

    Raises:
        ConfigError: a limit is not positive.
    """

    def __init__(
        self,
        tokens: int | None = None,
        seconds: float | None = None,
        *,
        spent: Spent = Spent(),  # noqa: B008 - it never changes
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, limit in (("tokens", tokens), ("seconds", seconds)):
            if limit is not None and limit <= 0:
                raise ConfigError(
                    f"A budget of {limit} {name} allows nothing",
                    next_step="Give a positive number, or None for no limit.",
                    setting=name,
                )
        self.tokens, self.seconds = tokens, seconds
        self._clock = clock
        self._spent_tokens, self._before_s = spent.tokens, spent.seconds
        self._reserved = 0
        self._began: float | None = None

    def __repr__(self) -> str:
        spent = self.spent
        tokens = "" if self.tokens is None else f" of {self.tokens:,}"
        seconds = "" if self.seconds is None else f" of {self.seconds:g}"
        return f"<Budget: {spent.tokens:,}{tokens} tokens, {spent.seconds:.1f}{seconds} s spent>"

    @property
    def spent(self) -> Spent:
        """Tokens and seconds so far."""
        running = 0.0 if self._began is None else self._clock() - self._began
        return Spent(self._spent_tokens, self._before_s + running)

    @property
    def left_s(self) -> float | None:
        """Seconds that are left; None where there is no limit."""
        return None if self.seconds is None else self.seconds - self.spent.seconds

    def reserve(self, where: Where, *, prompt_tokens: int, max_tokens: int) -> Reservation:
        """Sets aside what a request may take at most; then `settle`.

        Args:
            where: whose turn.
            prompt_tokens: of its prompt, those that must be computed.
            max_tokens: that it may sample; fewer where the budget ends before.

        Raises:
            BudgetExceeded: not one token could be sampled, or the time is over.
        """
        if self._began is None:
            self._began = self._clock()
        left_s = self.left_s
        if left_s is not None and left_s <= 0:
            raise self.time_over(where)
        if self.tokens is None:
            return Reservation(0, prompt_tokens, max_tokens, left_s)
        left = self.tokens - self._spent_tokens - self._reserved - prompt_tokens
        if left < 1:
            raise BudgetExceeded(
                f"{where}: {self._spent_tokens:,} of {self.tokens:,} tokens are spent, "
                f"{self._reserved:,} are set aside, and its prompt needs {prompt_tokens:,}",
                next_step="Give a larger Budget(tokens=...), or end here.",
                limit=self.tokens, spent=self._spent_tokens, **where.details,
            )  # fmt: skip
        allowed = min(max_tokens, left)
        self._reserved += prompt_tokens + allowed
        return Reservation(prompt_tokens + allowed, prompt_tokens, allowed, left_s)

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        """Ends a reservation with what was really taken."""
        self._reserved -= reservation.tokens
        computed = reservation.prompt_tokens if usage.untold else usage.computed_tokens
        self._spent_tokens += computed + usage.sampled_tokens

    def time_over(self, where: Where) -> BudgetExceeded:
        """The error that says so."""
        return BudgetExceeded(
            f"{where}: the {self.seconds:g} s of its budget are over",
            next_step="Give a larger Budget(seconds=...), or end here.",
            limit=self.seconds, spent=self.spent.seconds, **where.details,
        )  # fmt: skip
