"""Sessions under any order of turns, faults, forks and fan-outs, against lists of messages."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

pytest.importorskip("transformers")
pytest.importorskip("httpx")

from kvmem.agents import Budget, Retries, Session
from kvmem.agents.values import Where
from kvmem.errors import AgentError
from tests.fake_engine import FakeEngine, runtime

LIMIT = 60_000
FATAL = st.sampled_from([400, 404])
PASSING = st.sampled_from([503, 429, httpx.ReadError("cut"), httpx.ConnectError("gone")])
PICK = st.integers(0, 10**6)


class Agents(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine = FakeEngine("Aye.")
        self.runtime = runtime(self.engine, retries=Retries(times=2, first_wait_s=0.0))
        self.do(self.runtime.__aenter__())
        self.budget = Budget(tokens=LIMIT)
        first = self.runtime.session("s0", system="Sail.", budget=self.budget)
        self.sessions: list[Session] = [first]
        self.told: list[list[str]] = [[]]
        self.tokens: list[list[int]] = [first.ledger.tokens()]

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.do(self.runtime.__aexit__(None, None, None))
        self.loop.close()

    def pick(self, n: int) -> int:
        return n % len(self.sessions)

    @rule(n=PICK, faults=st.lists(PASSING, max_size=2))
    def step(self, n: int, faults: list[Any]) -> None:
        at = self.pick(n)
        self.engine.faults = list(faults)
        reply = self.do(self.sessions[at].step(f"Question {n}."))
        assert reply.text == "Aye."
        self.told[at] += [f"Question {n}.", "Aye."]

    @rule(n=PICK, faults=st.lists(PASSING, min_size=3, max_size=3) | st.lists(FATAL, min_size=1))
    def step_that_fails(self, n: int, faults: list[Any]) -> None:
        at = self.pick(n)
        self.engine.faults = list(faults)
        with pytest.raises(AgentError):
            self.do(self.sessions[at].step(f"Question {n}."))
        self.engine.faults = []

    @rule(n=PICK, take=st.integers(0, 8))
    def stream(self, n: int, take: int) -> None:
        at = self.pick(n)

        async def work() -> bool:
            async with self.sessions[at].stream(f"Question {n}.") as stream:
                texts, taken = aiter(stream), 0
                while taken < take and await anext(texts, None) is not None:
                    taken += 1
            return stream._reply is not None

        if self.do(work()):
            self.told[at] += [f"Question {n}.", "Aye."]

    @rule(n=PICK)
    def append(self, n: int) -> None:
        at = self.pick(n)
        self.sessions[at].append(f"Word {n}.")
        self.told[at].append(f"Word {n}.")

    @precondition(lambda self: len(self.sessions) < 6)
    @rule(n=PICK, spawn=st.booleans())
    def child(self, n: int, spawn: bool) -> None:
        at = self.pick(n)
        name = f"s{len(self.sessions)}"
        parent = self.sessions[at]
        child = parent.spawn("Go.", name=name) if spawn else parent.fork(name)
        self.sessions.append(child)
        self.told.append(["Go."] if spawn else list(self.told[at]))
        self.tokens.append([])

    @rule(
        n=PICK, tasks=st.integers(1, 5), keep=st.booleans(), fatal=st.none() | st.integers(0, 4),
        share=st.sampled_from(["prefix", "message"]), join=st.booleans(),
    )  # fmt: skip
    def map(
        self, n: int, tasks: int, keep: bool, fatal: int | None, share: Any, join: bool
    ) -> None:
        at = self.pick(n)
        one = self.sessions[at]
        fails = fatal is not None and fatal < tasks
        self.engine.faults = [None] * fatal + [400] if fatal is not None and fails else []
        work = one.map([f"Task {i}." for i in range(tasks)], share=share,
                       on_error="keep" if keep else "raise")  # fmt: skip
        if fails and not keep:
            with pytest.raises(AgentError):
                self.do(work)
            self.engine.faults = []
            return
        found = self.do(work)
        assert [result.task for result in found] == [f"Task {i}." for i in range(tasks)]
        assert len(found.errors) == int(fails)
        if join:
            found.join(one)
            self.told[at].append(one.ledger.messages()[-1]["content"])

    @invariant()
    def messages_are_those_that_were_said_and_tokens_only_grow(self) -> None:
        for at, one in enumerate(self.sessions):
            said = [m["content"] for m in one.ledger.messages() if m["role"] != "system"]
            assert said == self.told[at]
            now = one.ledger.tokens()
            assert now[: len(self.tokens[at])] == self.tokens[at]  # I8
            self.tokens[at] = now
            assert one.known_tokens <= len(now)

    @invariant()
    def nothing_runs_and_nothing_stays_set_aside(self) -> None:
        assert self.engine.running == 0
        left = LIMIT - self.budget.spent.tokens
        again = self.budget.reserve(Where("x", 1), prompt_tokens=0, max_tokens=LIMIT)
        assert again.max_tokens == left
        self.budget.settle(again, type(self.sessions[0].usage)())


TestAgents = Agents.TestCase
TestAgents.settings = settings(max_examples=60, stateful_step_count=20)
