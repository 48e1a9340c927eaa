"""The front door of agents: one engine behind an address, sessions on it.

async with Runtime("http://127.0.0.1:8000") as runtime:
    planner = runtime.session("planner", system="You are a planner.")
    reply = await planner.step("Where should we go?")
    found = await planner.map(["the sea", "the hills"], schema=Finding)
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvmem.agents.announcing import Announcer
from kvmem.agents.asker import Asker, Defaults
from kvmem.agents.budget import Budget
from kvmem.agents.hinting import EngineHints
from kvmem.agents.session import Session
from kvmem.agents.state import resume
from kvmem.agents.team import Layout, Team
from kvmem.agents.tools import Tool
from kvmem.agents.wire import Retries, Wire
from kvmem.context import CallFormat, Renderer
from kvmem.context.mask import HERMES
from kvmem.errors import AgentError, ConfigError

if TYPE_CHECKING:
    import httpx

__all__ = ["Runtime"]

BLOCK_TOKENS = 16  # vLLM's on a GPU, where the server does not say


class Runtime:
    """See the module. An async context manager; one event loop uses it.

    Args:
        base_url: the vLLM server, with or without `/v1`.
        model: a name that it serves; None takes its only one.
        api_key: the server's, if it wants one.
        renderer: of that model; None reads the tokenizer.
        tokenizer: folder or hub name to read it from; None takes what the server was given.
        concurrency: requests that are out at once.
        retries: see `kvmem.agents.Retries`.
        max_tokens: that a turn samples at most, where it says nothing else.
        timeout_s: for a turn, where it says nothing else.
        fields: of every request: `{"temperature": 0}`.
        form: how the model writes calls of tools.
        accept: rules that its template may break (docs/context.md).
        announcer: is told when tools start and end, and when sessions end, as the engine is.
        hints: tell the engine, where it takes hints (docs/policy.md).
        tell: takes a line before each fork, spawn and map: what it costs; None logs it.
        transport: instead of the network, for tests.

    Raises:
        ConfigError: the address is none, or httpx is not installed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str = "",
        renderer: Renderer | None = None,
        tokenizer: str | None = None,
        concurrency: int = 64,
        retries: Retries = Retries(),  # noqa: B008 - it never changes
        max_tokens: int = 512,
        timeout_s: float | None = None,
        fields: Mapping[str, Any] | None = None,
        form: CallFormat = HERMES,
        accept: Sequence[str] = (),
        announcer: Announcer | None = None,
        hints: bool = True,
        tell: Callable[[str], None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if concurrency < 1:
            raise ConfigError(
                f"With a concurrency of {concurrency} nothing is asked",
                next_step="Give 1 or more.",
                setting="concurrency",
            )
        self.model = model
        self._wire = Wire(base_url, api_key=api_key, retries=retries, transport=transport)
        self._renderer, self._tokenizer = renderer, tokenizer
        self._defaults = Defaults(max_tokens, timeout_s, dict(fields or {}))
        self._concurrency, self._form, self._accept = concurrency, form, tuple(accept)
        self._hints = EngineHints(self._wire) if hints else None
        self._announcer, self._tell = announcer, tell
        self._asker: Asker | None = None

    def __repr__(self) -> str:
        state = "" if self._asker is not None else ", not open"
        return f"<Runtime {self._wire.base_url}: {self.model or 'its only model'}{state}>"

    async def __aenter__(self) -> Runtime:
        """Asks the server for its model and reads its tokenizer.

        Raises:
            EngineUnavailable, RequestRefused: the server is not there, or wants a key.
            ConfigError: it does not have the model, or the tokenizer cannot be read.
        """
        try:
            await self._open()
        except BaseException:
            await self._wire.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the connections."""
        self._asker = None
        if self._hints is not None:
            await self._hints.close()
        await self._wire.close()

    async def _open(self) -> None:
        served = {str(one["id"]): one for one in await self._wire.models()}
        if self.model is None and len(served) == 1:
            self.model = next(iter(served))
        if self.model not in served:
            raise ConfigError(
                f"{self._wire.base_url} does not have the model {self.model}",
                next_step=f"Give one of {', '.join(served) or 'none, it seems'}.",
                setting="model",
            )
        if self._renderer is None:
            from kvmem.engines.tokenizers import renderer_of  # brings transformers

            root = self._tokenizer or str(served[self.model].get("root") or self.model)
            self._renderer = await asyncio.to_thread(renderer_of, root)
        self._asker = Asker(
            wire=self._wire, model=self.model, renderer=self._renderer,
            block_tokens=_block_tokens(await self._wire.metrics()), form=self._form,
            gate=asyncio.Semaphore(self._concurrency), defaults=self._defaults,
            announcers=[one for one in (self._hints, self._announcer) if one is not None],
            tell=self._tell, accept=self._accept,
        )  # fmt: skip

    @property
    def asker(self) -> Asker:
        """What its sessions share.

        Raises:
            AgentError: the runtime is not open.
        """
        if self._asker is None:
            raise AgentError(
                f"{self!r} cannot be asked yet, or no more",
                next_step="Use it within `async with Runtime(...) as runtime:`.",
            )
        return self._asker

    def session(
        self,
        name: str,
        *,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        budget: Budget | None = None,
        cache_salt: str = "",
        seal: bool = True,
    ) -> Session:
        """A new conversation.

        Args:
            name: the agent's; its requests carry it as their session id.
            system: the system prompt. Where the chat template says nothing of tools, what they are
                is added to it.
            tools: that it may call; the list never changes (`allow` masks some of them).
            budget: that its turns and its children's spend.
            cache_salt: the engine's: other salts share nothing with it.
            seal: refuse a system prompt with a clock, an id or the like in it.

        Raises:
            AgentError: the runtime is not open.
            PrefixBroken: the template breaks a rule, or the head is volatile (docs/context.md).
        """
        asker = self.asker
        ledger = asker.ledger(name, system, tools, cache_salt=cache_salt, seal=seal)
        return Session(asker, ledger, name=name, tools=tools, budget=budget)

    def team(
        self,
        name: str,
        *,
        system: str,
        layout: Layout = "role-first",
        tools: Sequence[Tool] = (),
        budget: Budget | None = None,
        seal: bool = True,
    ) -> Team:
        """A team whose agents hear one another; see `Team`."""
        return Team(
            self.asker, name, system=system, layout=layout, tools=tools, budget=budget, seal=seal
        )

    def resume(self, folder: Path, *, tools: Sequence[Tool] = ()) -> Team:
        """The team that `Team.save` wrote; see `kvmem.agents.state.resume`."""
        return resume(self.asker, folder, tools)


def _block_tokens(metrics: str) -> int:
    found = re.search(r'^vllm:cache_config_info\{[^}]*block_size="(\d+)"', metrics, re.MULTILINE)
    return int(found[1]) if found else BLOCK_TOKENS
