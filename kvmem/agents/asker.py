"""What the sessions of one runtime have in common: one engine, one gate, one listener."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from kvmem.agents.announcing import Announcer, Hint, announce_safely
from kvmem.agents.tools import Tool, describe
from kvmem.agents.wire import Wire
from kvmem.context import CallFormat, Ledger, Renderer

__all__ = ["Asker", "Defaults"]

log = logging.getLogger("kvmem.agents")


class Defaults(msgspec.Struct, frozen=True):
    """Of every turn, where it says nothing else.

    Args:
        max_tokens: that a turn samples at most.
        timeout_s: for a whole turn, retries included; None waits as long as it takes.
        fields: of the body: temperature, seed, ...
    """

    max_tokens: int = 512
    timeout_s: float | None = None
    fields: Mapping[str, Any] = {}


class Asker:
    """See the module. One event loop uses it.

    Args:
        wire: to the engine.
        model: the name it serves.
        renderer: of that model.
        block_tokens: of the engine's blocks.
        form: how the model writes calls of tools.
        gate: how many requests are out at once.
        defaults: of turns.
        announcers: who is told of tools and ends.
        tell: takes lines for people: what a fork, a spawn or a map will cost.
        accept: rules of the probe that the template may break (docs/context.md).
    """

    def __init__(
        self,
        *,
        wire: Wire,
        model: str,
        renderer: Renderer,
        block_tokens: int,
        form: CallFormat,
        gate: asyncio.Semaphore,
        defaults: Defaults,
        announcers: Sequence[Announcer],
        tell: Callable[[str], None] | None,
        accept: tuple[str, ...],
    ) -> None:
        self.wire, self.model, self.renderer = wire, model, renderer
        self.block_tokens, self.form, self.gate, self.defaults = block_tokens, form, gate, defaults
        self.accept = accept
        self.tell = tell if tell is not None else log.info
        self._announcers = tuple(announcers)
        self._took: dict[str, deque[float]] = {}

    def ledger(
        self,
        name: str,
        system: str | None,
        tools: Sequence[Tool],
        *,
        cache_salt: str = "",
        seal: bool = True,
    ) -> Ledger:
        """A new ledger whose head tells of the tools: by the template, or by the system prompt
        where the template says nothing of them.

        Raises:
            PrefixBroken: see `Ledger.open`.
        """
        schemas = [tool.schema for tool in tools]
        head = self.renderer.head
        if tools and head(system, schemas) == head(system, ()):
            system, schemas = (system or "") + describe(tools, self.form), []
        return Ledger.open(
            self.renderer, system=system, tools=schemas, session_id=name, cache_salt=cache_salt,
            accept=self.accept, seal=seal,
        )  # fmt: skip

    def announce(self, hint: Hint) -> None:
        """Tells those who listen."""
        for announcer in self._announcers:
            announce_safely(announcer, hint)

    def expected_s(self, tool: str) -> float | None:
        """How long the tool took so far, median of the last 32 times."""
        took = self._took.get(tool)
        return statistics.median(took) if took else None

    def took(self, tool: str, seconds: float) -> None:
        """Notes how long a tool took."""
        self._took.setdefault(tool, deque(maxlen=32)).append(seconds)
