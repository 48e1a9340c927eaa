"""Rounds of traffic, what is looked at between them, and the verdict."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from benchmarks.soak.asks import Answer, Ask, Call
from benchmarks.soak.client import Client, RequestFailed
from benchmarks.soak.engines import Engine
from benchmarks.soak.plan import EVERYTHING, Plan, Round
from benchmarks.soak.traffic import Library, Script, script
from benchmarks.soak.watch import held_at_rest, memory_of
from kvmem.cli.live import Page

__all__ = ["Soak"]

_TELL_EVERY_S = 30.0
_GIVEN_BACK_WITHIN_S = 20.0
_LATEST = 3
_DRILLED = 4
_MOST_FAILED = 100  # an engine that fails them all fails fast, and would fill the memory here


class Soak:
    """The traffic of one engine: `play` it, then read what happened.

    `happened` counts every kind of thing that a soak is there for, `held` says what was not given
    back at rest, `failed` which requests came back without an answer.
    """

    def __init__(
        self, engine: Engine, shelf: Library, plan: Plan, tell: Callable[[str], None] = print
    ) -> None:
        self.calls: list[Call] = []
        self.happened: Counter[str] = Counter()
        self.held: list[str] = []
        self.failed: list[str] = []
        self.memory: list[dict[str, int]] = []
        self.page: Page | None = None
        self.preemptions = 0  # for want of room: vLLM counts those of a drill with them
        self._by_drills = 0
        self._moved: tuple[int, int] | None = None
        self._engine = engine
        self._shelf = shelf
        self._plan = plan
        self._tell = tell
        self._scripts: list[Script] = [script(i, shelf, plan) for i in range(plan.streams)]
        self._next: list[Ask] = [next(one) for one in self._scripts]

    async def play(self) -> None:
        """All rounds.

        Raises:
            RequestFailed: the engine answers nothing, from the beginning.
            ExceptionGroup: it ended (ChildError), or fails everything (RequestFailed).
        """
        async with self._engine.client() as client:
            await self._warm_up(client)
            began = time.monotonic()
            teller = asyncio.create_task(self._tell_now_and_then(began))
            try:
                for number, round_ in enumerate(self._plan.rounds, start=1):
                    # On one clock: a round that takes long shortens the next.
                    await self._traffic(client, round_, began + number * self._plan.round_s)
                    await self._rest(client, number, round_)
            finally:
                teller.cancel()

    async def _warm_up(self, client: Client) -> None:
        """Steps of every number of tokens that there can be.

        For each new one vLLM's CPU kernels keep some MiB for good, kvmem or no kvmem: half a GiB
        for 256 of them, which would pass for a leak.
        """
        for n_tokens in range(1, self._plan.step_tokens + 1):
            prompt = tuple(range(1_000 + n_tokens, 1_000 + 2 * n_tokens))  # no two begin alike
            ask = Ask(kind="warm-up", prompt=prompt, n_tokens=1, load=False, store=False)
            await client.ask(ask)

    # -- traffic -----------------------------------------------------------------------------

    async def _traffic(self, client: Client, round_: Round, until: float) -> None:
        if round_.switched:
            await self._switch(client, on=False)
        answered = asyncio.Semaphore(0)  # once by each stream
        async with asyncio.TaskGroup() as tasks:
            for stream in range(self._plan.streams):
                tasks.create_task(self._stream(client, stream, until, answered))
            await asyncio.sleep(max(0.0, until - time.monotonic()) / 2)
            if round_.amid is not None:
                # Yes or no, either is right while requests hold blocks.
                await self._reset(client, round_.amid, "amid")
            if round_.switched:
                # However late it is: without traffic meanwhile nothing would be shown.
                for _ in range(self._plan.streams):
                    await answered.acquire()
                await self._switch(client, on=True)

    async def _switch(self, client: Client, *, on: bool) -> None:
        """Switches kvmem off at rest, and on again if nothing moved meanwhile."""
        page = self._engine.page()
        moved = (page.counters.blocks_loaded, page.counters.blocks_stored) if page else None
        if on and moved != self._moved:
            self.failed.append(f"switched off: blocks loaded, stored {self._moved} became {moved}")
        self._moved = moved
        await client.switch(on=on)
        self.happened[f"switched {'on' if on else 'off'}"] += 1

    async def _stream(
        self, client: Client, stream: int, until: float, answered: asyncio.Semaphore
    ) -> None:
        asked, at_last = 0, time.monotonic() + _LATEST * self._plan.round_s
        while (
            asked == 0
            or (now := time.monotonic()) < until
            or (asked < self._plan.least_asks and now < at_last)
        ):
            asked += 1
            ask = self._next[stream]
            answer = await self._ask(client, ask)
            if asked == 1:
                answered.release()
            reply = answer.tokens if answer is not None else None
            self._next[stream] = self._scripts[stream].send(reply)

    async def _ask(
        self, client: Client, ask: Ask, on_token: Callable[[], None] = lambda: None
    ) -> Answer | None:
        self._engine.check()
        try:
            answer = await client.ask(ask, on_token)
        except RequestFailed as error:
            self.failed.append(str(error))
            if len(self.failed) > _MOST_FAILED:
                raise
            return None
        if answer is None:
            self.happened[f"hung up, {'streamed' if ask.stream else 'whole'}"] += 1
            return None
        self.calls.append(Call(ask, answer))
        wishes = {
            ask.kind: True,
            "streamed": ask.stream,
            "salted": ask.salt is not None,
            "adapter": ask.adapter is not None,
            "load off": not ask.load,
            "store off": not ask.store,
        }
        self.happened.update(name for name, is_so in wishes.items() if is_so)
        return answer

    # -- at rest -----------------------------------------------------------------------------

    async def _rest(self, client: Client, number: int, round_: Round) -> None:
        if round_.drill:
            await self._drill(client)
        held = await self._given_back(client)
        self.held += [f"at rest after round {number}: {what}" for what in held]
        if round_.at_rest is not None and not await self._reset(client, round_.at_rest, "at rest"):
            # The engine refuses while any block of the device is held.
            self.held.append(f"at rest after round {number}: blocks of the device")
        self.happened["rest"] += 1
        self.memory.append(memory_of(self._engine.pids()))
        self.preemptions = await self._preempted(client) - self._by_drills
        mib = sum(self.memory[-1].values()) >> 20
        at_rest = ", ".join(held) or "all is back"
        self._tell(f"  round {number}: {self._told()}; at rest: {at_rest}, {mib:,} MiB")

    async def _given_back(self, client: Client) -> list[str]:
        """What is still held after some seconds at rest; asks again, since engines put things off
        until there is something to do."""
        deadline = time.monotonic() + _GIVEN_BACK_WITHIN_S
        while True:
            asked_s = time.time()
            # Each step of the engine's writes kvmem's page anew; this one uses nothing of kvmem.
            poke = Ask(kind="poke", prompt=(1, 2, 3), n_tokens=2, load=False, store=False)
            await self._ask(client, poke)
            page = self._engine.page()
            if page is not None and page.updated_s >= asked_s:
                self.page = page
                held = held_at_rest(page, await client.metrics())
            else:
                held = ["kvmem's page is not written any more"]
            if not held or time.monotonic() > deadline:
                return held
            await asyncio.sleep(0.2)

    async def _drill(self, client: Client) -> None:
        """Resets everything under requests that run. None of them loads, since the engine can't
        take blocks back from a load and raises."""
        before = await self._preempted(client)
        first_tokens = asyncio.Semaphore(0)
        asks = [
            Ask(
                kind="drill",
                prompt=(*system, *self._shelf.questions[i]),
                n_tokens=64,
                load=False,
                stream=True,
            )
            for i, system in enumerate(self._shelf.systems[:_DRILLED])
        ]

        async def drilled(ask: Ask) -> None:
            release = _once(first_tokens.release)
            try:
                await self._ask(client, ask, release)
            finally:
                release()  # one that failed has no first token

        async with asyncio.TaskGroup() as tasks:
            for ask in asks:
                tasks.create_task(drilled(ask))
            for _ in asks:
                await first_tokens.acquire()
            if not await self._reset(client, EVERYTHING, "under running requests", running=True):
                self.held.append("a reset under running requests was not done")
        self._by_drills += await self._preempted(client) - before

    async def _preempted(self, client: Client) -> int:
        return round((await client.metrics())["vllm:num_preemptions_total"])

    async def _reset(self, client: Client, what: str, when: str, *, running: bool = False) -> bool:
        try:
            done = await client.reset(what, running=running)
        except RequestFailed as error:
            self.failed.append(str(error))
            return False
        self.happened[f"reset of {what} {when}"] += 1
        return done

    # -- progress ----------------------------------------------------------------------------

    async def _tell_now_and_then(self, began: float) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            self._tell(f"  {time.monotonic() - began:5.0f} s: {self._told()}")

    def _told(self) -> str:
        hung_up = sum(n for what, n in self.happened.items() if what.startswith("hung up"))
        page = self._engine.page()
        ours = (
            f", {page.counters.blocks_loaded:,} blocks loaded, {page.counters.evictions:,} evicted"
            if page is not None
            else ""
        )
        return (
            f"{len(self.calls):,} answers, {hung_up} hung up, {len(self.failed)} failed{ours}, "
            f"{self.preemptions} preempted until the last rest"
        )


def _once(do: Callable[[], None]) -> Callable[[], None]:
    """`do`, the first time."""
    left = [do]

    def call() -> None:
        if left:
            left.pop()()

    return call
