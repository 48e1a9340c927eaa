"""One agent's conversation with one engine: a ledger, its turns, its tools.

A turn is all or nothing: where it fails, the session is as it was before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from kvmem.agents import fanout
from kvmem.agents.announcing import Hint
from kvmem.agents.asker import Asker
from kvmem.agents.budget import Budget
from kvmem.agents.calling import answered
from kvmem.agents.choice import Choice, Share, choose
from kvmem.agents.stream import Stream
from kvmem.agents.tools import Tool
from kvmem.agents.turn import Message, Turn, Wish, as_message, begin
from kvmem.agents.values import Reply, ToolCall, Usage, Where
from kvmem.agents.wire import Answer
from kvmem.context import Ledger
from kvmem.errors import AgentError, ToolCallInvalid, TurnTimeout

__all__ = ["Session"]

T = TypeVar("T")
Mode = Literal["auto", "required", "none"]
FAULTY_TURNS = 3  # in a row, then the caller is told


class Session:
    """See the module; `Runtime.session` makes one. One event loop uses it, a turn at a time.

    Args:
        asker: the runtime's side.
        ledger: what is committed.
        name: the agent's, in errors and reprs.
        tools: that its head tells of.
        budget: that its turns spend.
        turn: turns done.
        calls: calls of tools so far.
        usage: tokens so far.
        known_tokens: of its ledger, those that the engine has computed as far as is known.
        closed: whether it has ended.
    """

    def __init__(
        self,
        asker: Asker,
        ledger: Ledger,
        *,
        name: str,
        tools: Sequence[Tool] = (),
        budget: Budget | None = None,
        turn: int = 0,
        calls: int = 0,
        usage: Usage = Usage(),  # noqa: B008 - it never changes
        known_tokens: int = 0,
        closed: bool = False,
    ) -> None:
        self.name = name
        self.budget = budget if budget is not None else Budget()
        self.tools = {tool.name: tool for tool in tools}
        self.turn, self.calls, self.usage = turn, calls, usage
        self.known_tokens = known_tokens
        self.closed = closed
        self.asker, self._ledger = asker, ledger
        self._lock = asyncio.Lock()
        self._born = 0

    def __repr__(self) -> str:
        told = f"{self._ledger.n_tokens:,} tokens, {self.turn} turns"
        if self.usage.prompt_tokens:
            told += f", {self.usage.cached_tokens / self.usage.prompt_tokens:.0%} reused"
        return f"<Session {self.name}: {told}{', closed' if self.closed else ''}>"

    @property
    def ledger(self) -> Ledger:
        """What is committed. To go on with another one, an epoch for instance, use `adopt`."""
        return self._ledger

    @property
    def where(self) -> Where:
        """The next turn."""
        return Where(self.name, self.turn + 1)

    # -- turns -------------------------------------------------------------------------------

    def append(self, *messages: Message, pin: bool = False) -> None:
        """Adds messages without asking the model; a string is a user's.

        Raises:
            AgentError: the session is closed, or its turn is under way.
            PrefixBroken: the template refuses them.
        """
        self._idle("appended to")
        self._ledger.append(*map(as_message, messages), pin=pin)

    async def step(
        self,
        *messages: Message,
        schema: type[T] | Mapping[str, Any] | None = None,
        allow: str = "*",
        mode: Mode = "auto",
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Reply[T]:
        """One turn: adds the messages, asks the model, commits what it sampled.

        Args:
            messages: of the user (a string), of tools; none asks with what is there.
            schema: a type (or JSON schema) that the answer is held to while it is sampled;
                `Reply.value` is of it. Tools cannot be called in such a turn.
            allow: pattern of the tools that may be called; the prompt stays as it is.
            mode: "auto": text or calls; "required": a call; "none": no call.
            timeout_s: for the whole turn.
            fields: of the request: max_tokens, temperature, seed, priority, ...

        Raises:
            TurnTimeout, EngineUnavailable, RequestRefused, ResultInvalid, BudgetExceeded: all name
                the agent and the turn.
            PrefixBroken: the engine was asked something else than what was sent.
        """
        wish = Wish(schema=schema, allow=allow, mode=mode, timeout_s=timeout_s, fields=fields)
        return await self.step_as(wish, *messages)

    async def step_as(self, wish: Wish, *messages: Message) -> Reply[Any]:
        """`step`, its arguments in one."""
        async with self._turn(messages, wish) as turn:
            answer = await self.asker.wire.complete(turn.body, turn.where, timeout_s=turn.timeout_s)
            return self._commit(turn, answer)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        *messages: Message,
        allow: str = "*",
        mode: Mode = "auto",
        timeout_s: float | None = None,
        **fields: Any,
    ) -> AsyncIterator[Stream]:
        """The same as `step`, its text piece by piece.

        `async with session.stream("...") as stream: async for text in stream: ...`; then
        `stream.reply`. One that is left before its end commits nothing, and the engine stops.
        Raises as `step` does.
        """
        wish = Wish(allow=allow, mode=mode, timeout_s=timeout_s, fields=fields)
        async with self._turn(messages, wish) as turn:
            pieces = self.asker.wire.stream(turn.body, turn.where, timeout_s=turn.timeout_s)
            async with contextlib.aclosing(pieces):
                yield Stream(
                    pieces, turn.prefill, turn.note, lambda answer: self._commit(turn, answer)
                )

    async def step_streamed(self, wish: Wish, on_first: Callable[[], None]) -> Reply[Any]:
        """A turn that says when its first token is there: by then its prompt is computed."""
        async with self._turn((), wish) as turn:
            pieces = self.asker.wire.stream(
                turn.body, turn.where, timeout_s=turn.timeout_s, restart=True
            )
            last: Answer | None = None
            async with contextlib.aclosing(pieces):
                async for _, answer in pieces:
                    last = answer
                    turn.note(answer)
                    on_first()
            if last is None:
                raise AgentError(f"{turn.where}: an empty answer", **turn.where.details)
            return self._commit(turn, last)

    async def run(
        self,
        *messages: Message,
        max_turns: int = 8,
        allow: str = "*",
        mode: Mode = "auto",
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Reply[Any]:
        """Turns until the model answers without a call; its calls are made and answered between.

        Args:
            messages: see `step`, as for the other arguments.
            max_turns: turns at most.
            mode: of the first turn; later ones are "auto" where it is "required".
            timeout_s: of each turn.

        Raises:
            ToolCallInvalid: three turns in a row have no call that its tool's schema takes.
            AgentError: it still calls tools after `max_turns`.
        """
        faulty = 0
        for number in range(max_turns):
            how: Mode = "auto" if number and mode == "required" else mode
            reply: Reply[Any] = await self.step(
                *messages, allow=allow, mode=how, timeout_s=timeout_s, **fields
            )
            if not reply.tool_calls:
                return reply
            if number == max_turns - 1:
                break
            faulty = faulty + 1 if all(call.fault for call in reply.tool_calls) else 0
            messages = tuple(await self.answer(reply.tool_calls))
            if faulty >= FAULTY_TURNS:
                self.append(*messages)
                fault = reply.tool_calls[-1]
                raise ToolCallInvalid(
                    f"{self.where}: {faulty} turns in a row call tools wrongly, at last "
                    f"{fault.name or 'one'}: {fault.fault}",
                    next_step="Look at the tool's description and schema, or ask with "
                    "mode='required', which holds calls to their schemas.",
                    fault=fault.fault, **self.where.details,
                )  # fmt: skip
        raise AgentError(
            f"{self.where}: it still calls tools after {max_turns} turns",
            next_step="Give more max_turns, or go on: step(*await answer(error.tool_calls)).",
            tool_calls=reply.tool_calls,
            **self.where.details,
        )

    async def answer(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        """Makes the calls, side by side, and gives the messages that answer them, in their order.

        A call that does not fit its schema, or whose tool fails, is answered by what is wrong.
        """
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(answered(self.asker, self._ledger, self.tools, call))
                for call in calls
            ]
        return [task.result() for task in running]

    # -- children ----------------------------------------------------------------------------

    def quote(self, *messages: Message, n: int = 1) -> Choice:
        """What `n` children with these messages would cost, by the prefix and by the message."""
        fork = self._ledger.fork("")
        fork.append(*map(as_message, messages))
        return self.weigh([fork.n_tokens - self._ledger.n_tokens] * n)

    def weigh(self, tails: Sequence[int]) -> Choice:
        """The same for children whose own messages are `tails` tokens long."""
        asks = len(self.asker.renderer.generation("user"))  # and so does every child
        return choose(
            prefix_tokens=self._ledger.n_tokens,
            head_tokens=self._ledger.spans[0].stop,
            known_tokens=self.known_tokens,
            tails=[tail + asks for tail in tails],
            block_tokens=self.asker.block_tokens,
        )

    def fork(self, name: str, *, budget: Budget | None = None) -> Session:
        """A session with all of this one's past, which the engine has; costs nothing by itself.

        What that is worth against a message is told first.

        Raises:
            AgentError: the session is closed.
        """
        self._open()
        self.asker.tell(f"{self.name} forks {name}: {self.weigh([0]).explain()}")
        return self.child(name, budget=budget)

    def spawn(self, *messages: Message, name: str, budget: Budget | None = None) -> Session:
        """A session with this one's head and, of all else, only the messages; then `step()`.

        What that is worth against the prefix is told first.

        Raises:
            AgentError: the session is closed.
            PrefixBroken: the template refuses the messages.
        """
        self._open()
        self.asker.tell(f"{self.name} spawns {name}: {self.quote(*messages).explain()}")
        child = self.child(name, at=1, budget=budget)
        child.append(*messages)
        return child

    def child(
        self,
        name: str,
        *,
        at: int | None = None,
        turn: int = 0,
        calls: int = 0,
        budget: Budget | None = None,
    ) -> Session:
        """A fork that nobody is told of; see `Ledger.fork` for `at`, `Session` for the others."""
        ledger = self._ledger.fork(name, at=at)
        return Session(
            self.asker, ledger, name=name, tools=tuple(self.tools.values()),
            budget=budget if budget is not None else self.budget, turn=turn, calls=calls,
            known_tokens=min(self.known_tokens, ledger.n_tokens),
        )  # fmt: skip

    async def map(
        self,
        tasks: Sequence[Message],
        *,
        share: Share = "prefix",
        schema: type[T] | Mapping[str, Any] | None = None,
        concurrency: int | None = None,
        timeout_s: float | None = None,
        on_error: fanout.OnError = "raise",
        **fields: Any,
    ) -> fanout.Fanout[T]:
        """One child a task, each for one turn; see `kvmem.agents.fanout`."""
        self._open()
        how = fanout.How(share=share, concurrency=concurrency, on_error=on_error)
        wish = Wish(schema=schema, timeout_s=timeout_s, fields=fields)
        return await fanout.spread(self, tasks, how, wish)

    # -- the rest ----------------------------------------------------------------------------

    def next_name(self) -> str:
        """Of a child that has none of its own."""
        self._born += 1
        return f"{self.name}/{self._born}"

    def knows(self, n_tokens: int) -> bool:
        """Whether the engine has all whole blocks of the first `n_tokens`, as far as is known."""
        block = self.asker.block_tokens
        return self.known_tokens // block >= n_tokens // block

    def adopt(self, ledger: Ledger) -> None:
        """Goes on with another ledger, such as `ledger.rewrite(...)`'s next epoch.

        Raises:
            AgentError: the session is closed, or its turn is under way.
        """
        self._idle("given another ledger")
        shared = 0
        for mine, theirs in zip(self._ledger.spans, ledger.spans, strict=False):
            if mine.digest != theirs.digest:
                break
            shared = mine.stop
        self._ledger = ledger
        self.known_tokens = min(self.known_tokens, shared)

    def take(self, child: Session) -> None:
        """Goes on where a child of this one is."""
        self.adopt(child.ledger.fork(self._ledger.session_id))
        self.turn, self.calls, self.known_tokens = child.turn, child.calls, child.known_tokens

    def close(self) -> None:
        """Says that it will not be asked again; a second time does nothing."""
        if not self.closed:
            self.closed = True
            mine = self._ledger
            self.asker.announce(
                Hint("session_end", mine.session_id, mine.n_tokens, cache_salt=mine.cache_salt)
            )

    def _open(self) -> None:
        if self.closed:
            raise AgentError(
                f"{self.where}: the session is closed",
                next_step="Fork it before it is closed, or open another.",
                **self.where.details,
            )

    def _idle(self, what: str) -> None:
        self._open()
        if self._lock.locked():
            raise AgentError(
                f"{self.where}: a session whose turn is under way cannot be {what}",
                next_step="Wait for the turn, or fork the session.",
                **self.where.details,
            )

    @contextlib.asynccontextmanager
    async def _turn(self, messages: Sequence[Message], wish: Wish) -> AsyncIterator[Turn]:
        """A turn's resources: the session's lock, its budget, the runtime's gate."""
        async with self._lock:
            self._open()
            turn = begin(self.asker, self._ledger, messages, wish, self)
            try:
                async with self.asker.gate:
                    turn.began = time.monotonic()
                    yield turn
            except TurnTimeout as error:
                left_s = self.budget.left_s
                if left_s is not None and left_s <= 0:
                    raise self.budget.time_over(turn.where) from error
                raise
            finally:
                self.budget.settle(turn.reservation, turn.usage)
                self.usage += turn.usage

    def _commit(self, turn: Turn, answer: Answer) -> Reply[Any]:
        reply, known = turn.finish(answer, self.tools, self.calls)
        self._ledger = turn.ledger
        self.turn += 1
        self.calls += len(reply.tool_calls)
        self.known_tokens = known
        return reply
