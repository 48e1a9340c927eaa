"""The same agents without `await`: the names of `kvmem.agents`, for scripts and notebooks.

with sync.Runtime("http://127.0.0.1:8000") as runtime:
    lead = runtime.session("lead", system="You lead a team of researchers.")
    print(lead.step("Make a plan.").text)

One thread runs the event loop; calls may come from any thread, and an interrupt cancels what it
waits for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from kvmem import agents
from kvmem.agents.budget import Budget
from kvmem.agents.choice import Choice
from kvmem.agents.fanout import Fanout
from kvmem.agents.team import Layout, Member
from kvmem.agents.tools import Tool
from kvmem.agents.turn import Message
from kvmem.agents.values import Reply, Usage
from kvmem.context import Ledger
from kvmem.errors import AgentError

__all__ = ["Runtime", "Session", "Team"]

T = TypeVar("T")


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvmem-agents", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result; an interrupt of the waiting thread cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """A plain function's result, called in the loop's thread."""

        async def work() -> T:
            return function(*args, **kwargs)

        return self.wait(work())

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Runtime:
    """`kvmem.agents.Runtime`, with the same arguments; a context manager."""

    def __init__(self, base_url: str, **options: Any) -> None:
        self._made: Callable[[], agents.Runtime] = lambda: agents.Runtime(base_url, **options)
        self._loop: _Loop | None = None
        self._inner: agents.Runtime | None = None

    def __repr__(self) -> str:
        return repr(self._inner) if self._inner is not None else "<Runtime, not open>"

    def __enter__(self) -> Runtime:
        """Asks the server for its model; see `kvmem.agents.Runtime.__aenter__`."""
        loop = _Loop()
        try:
            inner = loop.call(self._made)
            loop.wait(inner.__aenter__())
        except BaseException:
            loop.stop()
            raise
        self._loop, self._inner = loop, inner
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the connections and the thread."""
        loop, inner = self._both
        self._loop = None
        loop.wait(inner.__aexit__(kind, error, trace))
        loop.stop()

    @property
    def _both(self) -> tuple[_Loop, agents.Runtime]:
        if self._loop is None or self._inner is None:
            raise AgentError(
                "This runtime is not open",
                next_step="Use it within `with sync.Runtime(...) as runtime:`.",
            )
        return self._loop, self._inner

    def session(self, name: str, **options: Any) -> Session:
        """See `kvmem.agents.Runtime.session`."""
        loop, inner = self._both
        return Session(loop, loop.call(inner.session, name, **options))

    def team(self, name: str, *, system: str, layout: Layout = "role-first", **how: Any) -> Team:
        """See `kvmem.agents.Runtime.team`."""
        loop, inner = self._both
        return Team(loop, loop.call(inner.team, name, system=system, layout=layout, **how))

    def resume(self, folder: Path, *, tools: Sequence[Tool] = ()) -> Team:
        """See `kvmem.agents.Runtime.resume`."""
        loop, inner = self._both
        return Team(loop, loop.call(inner.resume, folder, tools=tools))


class Session:
    """`kvmem.agents.Session`, its verbs without `await`."""

    def __init__(self, loop: _Loop, inner: agents.Session) -> None:
        self._loop, self.inner = loop, inner

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def name(self) -> str:
        """The agent's."""
        return self.inner.name

    @property
    def ledger(self) -> Ledger:
        """What is committed."""
        return self.inner.ledger

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.inner.usage

    def append(self, *messages: Message, pin: bool = False) -> None:
        """See `kvmem.agents.Session.append`."""
        self._loop.call(self.inner.append, *messages, pin=pin)

    def step(
        self,
        *messages: Message,
        schema: type[T] | Mapping[str, Any] | None = None,
        **how: Any,
    ) -> Reply[T]:
        """See `kvmem.agents.Session.step`."""
        return self._loop.wait(self.inner.step(*messages, schema=schema, **how))

    def stream(self, *messages: Message, **how: Any) -> Iterator[str]:
        """The answer's text piece by piece; iterate to the end, which commits it.

        One that is left before its end commits nothing.
        """
        stream = self.inner.stream(*messages, **how)
        pieces = self._loop.wait(stream.__aenter__())
        texts = aiter(pieces)

        async def take() -> str | None:
            return await anext(texts, None)

        try:
            while (text := self._loop.wait(take())) is not None:
                yield text
        finally:
            self._loop.wait(stream.__aexit__(None, None, None))

    def run(self, *messages: Message, **how: Any) -> Reply[Any]:
        """See `kvmem.agents.Session.run`."""
        return self._loop.wait(self.inner.run(*messages, **how))

    def quote(self, *messages: Message, n: int = 1) -> Choice:
        """See `kvmem.agents.Session.quote`."""
        return self._loop.call(self.inner.quote, *messages, n=n)

    def fork(self, name: str, *, budget: Budget | None = None) -> Session:
        """See `kvmem.agents.Session.fork`."""
        return Session(self._loop, self._loop.call(self.inner.fork, name, budget=budget))

    def spawn(self, *messages: Message, name: str, budget: Budget | None = None) -> Session:
        """See `kvmem.agents.Session.spawn`."""
        made = self._loop.call(self.inner.spawn, *messages, name=name, budget=budget)
        return Session(self._loop, made)

    def map(
        self,
        tasks: Sequence[Message],
        *,
        schema: type[T] | Mapping[str, Any] | None = None,
        **how: Any,
    ) -> Fanout[T]:
        """See `kvmem.agents.Session.map`; the results' sessions are the asynchronous ones."""
        return self._loop.wait(self.inner.map(tasks, schema=schema, **how))

    def join(self, found: Fanout[Any], intro: str = "The results are in.") -> None:
        """See `kvmem.agents.Fanout.join`; this is the parent."""
        self._loop.call(found.join, self.inner, intro)

    def close(self) -> None:
        """See `kvmem.agents.Session.close`."""
        self._loop.call(self.inner.close)


class Team:
    """`kvmem.agents.Team`, its verbs without `await`."""

    def __init__(self, loop: _Loop, inner: agents.Team) -> None:
        self._loop, self.inner = loop, inner

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def usage(self) -> Usage:
        """Of all its agents."""
        return self.inner.usage

    @property
    def said(self) -> tuple[Mapping[str, Any], ...]:
        """What everybody has heard, as messages."""
        return self.inner.said

    def agent(self, name: str, *, role: str, allow: str = "*") -> Member:
        """See `kvmem.agents.Team.agent`."""
        return self._loop.call(self.inner.agent, name, role=role, allow=allow)

    def session(self, name: str, *, system: str | None = None) -> Session:
        """See `kvmem.agents.Team.session`."""
        return Session(self._loop, self._loop.call(self.inner.session, name, system=system))

    def tell(self, *messages: Message) -> None:
        """See `kvmem.agents.Team.tell`."""
        self._loop.call(self.inner.tell, *messages)

    def turn(self, name: str, *messages: Message, **how: Any) -> Reply[Any]:
        """See `kvmem.agents.Team.turn`."""
        return self._loop.wait(self.inner.turn(name, *messages, **how))

    def save(self, folder: Path) -> None:
        """See `kvmem.agents.save`."""
        self._loop.call(agents.save, self.inner, folder)

    def close(self) -> None:
        """See `kvmem.agents.Team.close`."""
        self._loop.call(self.inner.close)
