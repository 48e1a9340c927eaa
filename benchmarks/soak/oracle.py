"""Whether answers are right: those of an engine without kvmem to the same requests.

float32 and greedy, so an answer is decided by its request, but for the last bits of a sum, which
depend on the shapes that the engine happened to multiply. They show in two ways:

    tie     two tokens so near that the last bits choose: both engines say so of both tokens. It is
            counted, and the rest of the answer held against the oracle's after the same token.
    drift   the same token with another logprob. Rounding stays below 1e-4; one wrong block of KV
            shows above 1e-2 (tests/e2e/test_failures.py). In between is the border.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec

from benchmarks.soak.asks import Answer, Ask, Call

__all__ = ["DRIFT", "TIE", "Judge", "Judgement", "Wrong", "first_difference", "is_tie"]

TIE = 1e-4
DRIFT = 1e-3
_AT_ONCE = 16

Engine = Callable[[Ask], Awaitable[Answer]]


class Wrong(msgspec.Struct, frozen=True):
    """An answer that the oracle does not give: where it begins to differ, and how."""

    ask: Ask
    place: int
    why: str


class Judgement(msgspec.Struct):
    """What became of all calls; `drift` is the largest difference of a token's logprobs."""

    calls: int = 0
    distinct: int = 0
    near_ties: int = 0
    drift: float = 0.0
    wrong: list[Wrong] = []


class Judge:
    """Asks the oracle each distinct request once, and compares every call with its answer."""

    def __init__(self, oracle: Engine, tell: Callable[[int, int], None]) -> None:
        """`oracle` answers a request; `tell` is called with requests judged, and all of them."""
        self._oracle = oracle
        self._tell = tell
        self._answers: dict[bytes, asyncio.Task[Answer]] = {}
        self.judgement = Judgement()

    async def judge(self, calls: Iterable[Call]) -> Judgement:
        """What the calls amount to."""
        by_request: dict[bytes, list[Call]] = {}
        for call in calls:
            by_request.setdefault(call.ask.digest, []).append(call)
        self.judgement.distinct = len(by_request)
        at_once = asyncio.Semaphore(_AT_ONCE)
        done = 0

        async def one(same: list[Call]) -> None:
            nonlocal done
            async with at_once:
                for call in same:
                    await self._compare(call.ask, call.answer)
            done += 1
            self._tell(done, len(by_request))

        async with asyncio.TaskGroup() as tasks:
            # Sorted, so that prompts that begin alike come together and the oracle reuses them.
            for same in sorted(by_request.values(), key=lambda same: same[0].ask.prompt):
                tasks.create_task(one(same))
        self.judgement.calls = sum(map(len, by_request.values()))
        return self.judgement

    async def _compare(self, ask: Ask, ours: Answer) -> None:
        skipped = 0
        while True:
            theirs = await self._answer(ask)
            place = first_difference(ours, theirs)
            drift = _drift(ours.logprobs[:place], theirs.logprobs[:place])
            self.judgement.drift = max(self.judgement.drift, drift)
            if drift > DRIFT:
                why = f"a logprob differs by {drift:.2g}"
                self.judgement.wrong.append(Wrong(ask, skipped, why))
                return
            if place is None:
                return
            if not is_tie(ours, theirs, place):
                why = f"{ours.tokens[place:]} where the oracle has {theirs.tokens[place:]}"
                self.judgement.wrong.append(Wrong(ask, skipped + place, why))
                return
            self.judgement.near_ties += 1
            begun = place + 1
            if begun == len(ours.tokens):
                return
            ask, ours = ask.after(ours.tokens[:begun]), ours.after(begun)
            skipped += begun

    async def _answer(self, ask: Ask) -> Answer:
        """The oracle's answer, asked for once."""
        task = self._answers.get(ask.digest)
        if task is None:
            task = asyncio.create_task(self._ask(ask))
            self._answers[ask.digest] = task
        return await task

    async def _ask(self, ask: Ask) -> Answer:
        plain = Ask(kind="oracle", prompt=ask.prompt, n_tokens=ask.n_tokens, adapter=ask.adapter)
        return await self._oracle(plain)


def _drift(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def first_difference(ours: Answer, theirs: Answer) -> int | None:
    """The first place where the tokens differ, or None.

    Raises:
        ValueError: the answers are not of one length.
    """
    pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=True))
    return next((i for i, (a, b) in pairs if a != b), None)


def is_tie(ours: Answer, theirs: Answer, place: int) -> bool:
    """Whether both engines found both tokens equally good at `place`, but for rounding."""
    a, b = ours.tokens[place], theirs.tokens[place]
    return all(
        a in best and b in best and abs(best[a] - best[b]) <= TIE
        for best in (ours.best[place], theirs.best[place])
    )
