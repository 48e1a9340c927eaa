"""How long the soak is, how wide, and what disturbs it: all of it decided before it starts."""

from __future__ import annotations

from pathlib import Path

import msgspec

__all__ = ["DEVICE", "EVERYTHING", "LONG_MINUTES", "ROUNDS", "SHORT_MINUTES", "Plan", "Round"]

LONG_MINUTES = 60.0
SHORT_MINUTES = 5.0

DEVICE = "device"  # the engine's own prefix cache; kvmem keeps what it has
EVERYTHING = "everything"  # kvmem's cache too

_ROUND_S = 120.0
_LEAST_ROUNDS = 6  # each kind of round at least once, and enough points to see memory grow


class Round(msgspec.Struct, frozen=True):
    """Some minutes of traffic and the rest after them.

    `amid` is reset while requests are under way: the engine then answers yes or no. `at_rest` is
    reset when nothing runs, and must be. A `drill` resets everything under requests that run, at
    rest otherwise, since the engine raises where a load is under way. With `switched` kvmem's
    loads and stores are off in the first half, and nothing may be loaded or stored meanwhile.
    """

    amid: str | None = None
    at_rest: str | None = None
    drill: bool = False
    switched: bool = False


# In turns. A reset of everything while the engine holds blocks ends kvmem's stores on top of them
# until a later one has emptied the device too, so the round that has one ends with one.
ROUNDS = (
    Round(),
    Round(at_rest=DEVICE),
    Round(amid=EVERYTHING, at_rest=EVERYTHING),
    Round(amid=DEVICE),
    Round(drill=True),
    Round(switched=True),
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One soak.

    A round lasts `round_s`, and longer where the machine is slow: until each stream has asked
    `least_asks` times, at most three times as long.

    The device holds fewer tokens than the streams ask for at once, so requests are preempted; the
    host tier holds more than the device and less than all sessions, so both evict.
    """

    minutes: float
    folder: Path
    streams: int = 16
    seed: int = 20_261_126
    adapters: int = 2
    least_asks: int = 3
    block_tokens: int = 32
    device_blocks: int = 56
    host_gb: float = 0.2
    max_model_len: int = 1_024
    step_tokens: int = 128

    @property
    def seconds(self) -> float:
        """Of traffic; starting engines and asking the oracle come on top."""
        return self.minutes * 60.0

    @property
    def round_s(self) -> float:
        """Seconds of traffic of one round."""
        return min(_ROUND_S, self.seconds / _LEAST_ROUNDS)

    @property
    def rounds(self) -> list[Round]:
        """What happens in each round."""
        return [ROUNDS[i % len(ROUNDS)] for i in range(round(self.seconds / self.round_s))]

    @property
    def sessions(self) -> int:
        """Conversations that the streams take from; more of them in a longer soak."""
        return 8 + round(self.minutes)

    @property
    def longs(self) -> int:
        """Long prompts that nothing follows: more than the host tier holds."""
        return 8 + round(self.minutes / 2)
