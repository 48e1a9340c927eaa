"""Many children of one session, a task each, with what they share computed once.

The first child asks alone until its first token is there: then its prompt, and with it the shared
prefix, is computed, and the others find it. Where the engine has the prefix already nobody waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec

from kvmem.agents.choice import Choice, Share
from kvmem.agents.turn import Message, Wish
from kvmem.agents.values import Reply, Usage
from kvmem.errors import ConfigError, KVMemError

if TYPE_CHECKING:
    from kvmem.agents.session import Session

__all__ = ["Fanout", "How", "OnError", "Result", "spread"]

T = TypeVar("T")
OnError = Literal["raise", "keep"]


class How(msgspec.Struct, frozen=True):
    """How tasks are spread.

    Args:
        share: "prefix": children are forks; "message": they have the head and their task alone.
        concurrency: children that ask at once; None leaves it to the runtime's own limit.
        on_error: "raise": the first error ends the others; "keep": it stands in the result.
    """

    share: Share = "prefix"
    concurrency: int | None = None
    on_error: OnError = "raise"


class Result(msgspec.Struct, Generic[T], frozen=True):
    """What became of one task: a reply, or an error.

    `session` is the child, to go on with; it is closed with the fan-out's `close`.
    """

    task: Message
    session: Session
    reply: Reply[T] | None = None
    error: KVMemError | None = None

    @property
    def value(self) -> T:
        """The reply's value.

        Raises:
            KVMemError: the error, where there is one.
        """
        if self.error is not None:
            raise self.error
        assert self.reply is not None
        return self.reply.value

    @property
    def text(self) -> str:
        """The reply's text; for an error, its message."""
        return self.reply.text if self.reply is not None else f"failed: {self.error}"

    def __repr__(self) -> str:
        return f"<Result {self.session.name}: {self.error or self.reply!r}>"


class Fanout(Sequence[Result[T]]):
    """The results, in the order of the tasks; what it cost, and what it was chosen by."""

    def __init__(self, results: Sequence[Result[T]], choice: Choice, seconds: float) -> None:
        self._results = tuple(results)
        self.choice, self.seconds = choice, seconds

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, index: Any) -> Any:
        return self._results[index]

    def __iter__(self) -> Iterator[Result[T]]:
        return iter(self._results)

    def __repr__(self) -> str:
        return f"<Fanout {self.explain()}>"

    @property
    def values(self) -> list[T]:
        """Every result's value.

        Raises:
            KVMemError: the first error, where there is one.
        """
        return [result.value for result in self._results]

    @property
    def errors(self) -> list[KVMemError]:
        """The errors that were kept."""
        return [result.error for result in self._results if result.error is not None]

    @property
    def usage(self) -> Usage:
        """Of all children together."""
        return sum((result.session.usage for result in self._results), Usage())

    def explain(self) -> str:
        """One line."""
        failed = f", {len(self.errors)} failed" if self.errors else ""
        return f"{len(self)} children{failed} in {self.seconds:.1f} s: {self.usage.explain()}"

    def join(self, parent: Session, intro: str = "The results are in.") -> None:
        """Appends all results to the parent as one message of the user, in their order.

        Raises:
            AgentError, PrefixBroken: see `Session.append`.
        """
        parent.append(
            "\n".join([intro, *(f"{i}. {r.text}" for i, r in enumerate(self._results, 1))])
        )

    def close(self) -> None:
        """Closes the children."""
        for result in self._results:
            result.session.close()


async def spread(parent: Session, tasks: Sequence[Message], how: How, wish: Wish) -> Fanout[Any]:
    """One child a task, each for one turn. What it costs is told first.

    Raises:
        ConfigError: there is no task, or the concurrency is not positive.
        KVMemError: the first child's error, with `on_error="raise"`; the others are ended, and the
            engine stops computing them.
    """
    if not tasks or (how.concurrency is not None and how.concurrency < 1):
        raise ConfigError(
            "A map needs a task, and children that may ask",
            next_step="Give one task or more, and a concurrency of 1 or more.",
            setting="tasks" if not tasks else "concurrency",
        )
    began = time.monotonic()
    children, choice, shared = _children(parent, tasks, how.share)
    once = _WarmOnce(parent.knows(shared))
    gate = asyncio.Semaphore(how.concurrency or len(tasks))

    async def one(task: Message, child: Session) -> Result[Any]:
        async def ask(on_first: Callable[[], None] | None) -> Reply[Any]:
            if on_first is not None:
                return await child.step_streamed(wish, on_first)
            child.known_tokens = max(child.known_tokens, shared)
            return await child.step_as(wish)

        try:
            async with gate:
                return Result(task, child, await once.run(ask))
        except KVMemError as error:
            if how.on_error == "raise":
                raise
            return Result(task, child, error=error)

    try:
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(one(task, child))
                for task, child in zip(tasks, children, strict=True)
            ]
    except ExceptionGroup as failures:
        # The first one ended the others.
        raise failures.exceptions[0] from failures
    finally:
        if any(child.turn for child in children):  # what they made the engine compute
            parent.known_tokens = max(parent.known_tokens, shared)
    return Fanout([task.result() for task in running], choice, time.monotonic() - began)


def _children(
    parent: Session, tasks: Sequence[Message], share: Share
) -> tuple[list[Session], Choice, int]:
    """A child a task, what they cost, and how many tokens they share; the cost is told."""
    at = None if share == "prefix" else 1
    shared = parent.ledger.n_tokens if at is None else parent.ledger.spans[0].stop
    made = []
    for task in tasks:
        child = parent.child(parent.next_name(), at=at)
        child.append(task)
        made.append(child)
    choice = parent.weigh([child.ledger.n_tokens - shared for child in made])
    parent.asker.tell(f"{parent.name} maps by {share}: {choice.explain()}")
    return made, choice, shared


class _WarmOnce:
    """Lets one ask alone until it says that its prompt is computed; then all.

    Where it fails before, the next one asks alone.
    """

    def __init__(self, warm: bool) -> None:
        self._warm = asyncio.Event()
        self._lock = asyncio.Lock()
        if warm:
            self._warm.set()

    async def run(
        self, ask: Callable[[Callable[[], None] | None], Awaitable[Reply[Any]]]
    ) -> Reply[Any]:
        async with self._lock:
            if not self._warm.is_set():
                first = asyncio.ensure_future(self._warm.wait())
                leader = asyncio.ensure_future(ask(self._warm.set))
                try:
                    await asyncio.wait({first, leader}, return_when=asyncio.FIRST_COMPLETED)
                except asyncio.CancelledError:
                    leader.cancel()
                    await asyncio.wait({leader})  # the engine is told before this one is gone
                    raise
                finally:
                    first.cancel()
            else:
                leader = None
        return await (leader if leader is not None else ask(None))
