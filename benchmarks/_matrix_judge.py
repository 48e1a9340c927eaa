"""When an answer is right: against the engine's own prefix hit, and against the whole prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks._matrix import EngineError, WrongError
from benchmarks._matrix_engine import Engine, Turn

__all__ = [
    "NO_KVMEM",
    "ROUNDING",
    "SHAPES",
    "Twice",
    "agree",
    "expect",
    "from_host",
    "itself",
    "same",
]

ROUNDING = 1e-5  # of logprobs between runs of the same shapes
SHAPES = 1e-4  # between a whole prefill and a hit, in float32
NO_KVMEM = {"load": False, "store": False}


def same(turn: Turn, oracle: Turn, what: str) -> None:
    """`turn` against another run of the same shapes."""
    agree(turn, oracle, what, within=ROUNDING)


def agree(turn: Turn, oracle: Turn, what: str, *, within: float = SHAPES) -> None:
    """Token by token, and logprobs to `within`."""
    if turn.tokens != oracle.tokens:
        at = next(
            (i for i, (a, b) in enumerate(zip(turn.tokens, oracle.tokens, strict=False)) if a != b),
            min(len(turn.tokens), len(oracle.tokens)),
        )
        raise WrongError(f"{what}: token {at} of {len(oracle.tokens)} differs")
    apart = [abs(a - b) for a, b in zip(turn.logprobs, oracle.logprobs, strict=True)]
    far = [d for d in apart if not d <= within]  # also where one is no number
    if far:
        raise WrongError(f"{what}: logprobs differ by {max(far):.2g}")


def itself(turn: Turn, oracle: Turn, what: str, *, within: float = SHAPES) -> None:
    """Two answers of vLLM's without kvmem; if they differ, that is not kvmem's.

    Raises:
        EngineError: they differ.
    """
    try:
        agree(turn, oracle, what, within=within)
    except WrongError as error:
        raise EngineError(str(error)) from error


def expect(held: bool, what: str) -> None:
    if not held:
        raise WrongError(what)


def from_host(turn: Turn, what: str = "a prompt that was stored") -> None:
    expect(turn.host > 0, f"{what}: nothing came from the host tier ({turn.report})")


class Twice:
    """A prompt computed, from the engine's own cache, and from the host tier."""

    def __init__(self, engine: Engine, prompt: Sequence[int], n: int = 8, **wishes: Any) -> None:
        self.cold = engine.one(prompt, n, **wishes)
        self.native = engine.one(prompt, n, **wishes)
        engine.forget_device()
        self.restored = engine.one(prompt, n, **wishes)
        self.exact = engine.setup.exact_dtype

    def check(self) -> None:
        """The three agree as closely as their shapes let them."""
        from_host(self.restored)
        expect(self.cold.cached == 0, f"a new prompt had {self.cold.cached} tokens cached")
        if self.native.cached == self.restored.cached:
            same(self.restored, self.native, "host hit and the engine's own")
        elif self.exact:
            agree(self.restored, self.native, "host hit and the engine's own")
        if self.exact:
            agree(self.restored, self.cold, "host hit and whole prefill")
        expect(
            self.exact or self.native.cached == self.restored.cached,
            f"no oracle: {self.native.cached} tokens on the device, {self.restored.host} in host",
        )
