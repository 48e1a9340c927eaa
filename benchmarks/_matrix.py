"""The engine matrix: which cells there are, and what a cell can come to.

A cell is a scenario on a setup: a model with vLLM's options, and kvmem in it. All cells of a setup
share one engine. What a cell comes to:

    right     the answers are the oracle's, and blocks came from the host tier
    refused   kvmem said no at start, with a reason
    wrong     anything else
    not run   vLLM cannot, without kvmem either: no cell of kvmem's, and not counted
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

__all__ = [
    "Cell",
    "EngineError",
    "Outcome",
    "Setup",
    "Verdict",
    "WrongError",
    "chosen",
    "is_refusal",
    "summary",
]

Verdict = Literal["right", "refused", "wrong", "not run"]
Kind = Literal["llm", "async", "server", "flags"]


class WrongError(AssertionError):
    """An answer that differs from the oracle's, blocks that did not move, or something left."""


class EngineError(Exception):
    """What vLLM does wrong by itself, seen without kvmem: the cell can prove nothing."""


class Setup(msgspec.Struct, frozen=True):
    """An engine: a model of `_models.CONFIGS` and vLLM's options.

    `kind` is how it is started: `llm` in one process, `async` with an engine process of its own,
    `server` over HTTP, `flags` only as far as `kvmem serve` looks at its flags. `connectors` stand
    beside kvmem in a MultiConnector. `environ` is added to the engine's.
    """

    name: str
    model: str
    cells: tuple[str, ...]
    options: Mapping[str, Any] = {}
    kind: Kind = "llm"
    connectors: tuple[str, ...] = ()
    environ: Mapping[str, str] = {}

    @property
    def exact_dtype(self) -> bool:
        """Whether a prompt computed whole and its hit agree to rounding: in float32 they do."""
        plain = self.options.get("kv_cache_dtype", "auto") == "auto"
        return plain and self.options.get("dtype", "float32") == "float32"


class Cell(msgspec.Struct, frozen=True):
    """A scenario, a function of `_matrix_cells` or `_matrix_servers`, on a setup."""

    setup: Setup
    scenario: str

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"{self.setup.name}/{self.scenario}"


class Outcome(msgspec.Struct, frozen=True):
    """What a cell came to, and in a few words why."""

    cell: str
    verdict: Verdict
    detail: str
    seconds: float = 0.0


def is_refusal(message: str) -> bool:
    """Whether a start failed because kvmem refused what it does not serve; it says so in words.

    Other errors at start (a setting out of range, no room) are the benchmark's own fault.
    """
    return "kvmem's vLLM connector does not serve " in message


def chosen(setups: Iterable[Setup], only: Iterable[str]) -> list[Setup]:
    """The setups with the cells that `only` names, all of them without it.

    A name is a cell's, a setup's, or the beginning of one that ends before a '/' or a space.

    Raises:
        ValueError: a name that nothing has.
    """
    setups, names = list(setups), list(only)
    for name in names:
        if not any(_named(name, Cell(s, c)) for s in setups for c in s.cells):
            raise ValueError(f"there is no cell {name!r}; --list tells which there are")
    kept = []
    for setup in setups:
        cells = tuple(
            c for c in setup.cells if not names or any(_named(n, Cell(setup, c)) for n in names)
        )
        if cells:
            kept.append(msgspec.structs.replace(setup, cells=cells))
    return kept


def _named(name: str, cell: Cell) -> bool:
    rest = cell.name.removeprefix(name)
    return cell.name.startswith(name) and rest[:1] in ("", "/", " ")


def summary(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """The counts of the closing line."""
    verdicts = [outcome.verdict for outcome in outcomes]
    counted = [verdict for verdict in verdicts if verdict != "not run"]
    return {
        "cells": len(counted),
        "right": counted.count("right"),
        "wrong": counted.count("wrong"),
        "refused_with_reason": counted.count("refused"),
        "not_run": len(verdicts) - len(counted),
    }
