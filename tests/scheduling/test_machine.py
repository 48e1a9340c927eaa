"""Any order of requests, steps, aborts, resets, broken blocks and broken hooks.

The forward looks at every position that attention would read, after every step; here is what else
must hold, and that the machine got to where things go wrong.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmem.engines.vllm.hinting import METHOD
from tests.scheduling.engine import GROUPS, MAX_TOKENS, Engine

pytestmark = pytest.mark.engine


def _segment(name: int, n_tokens: int) -> list[int]:
    return [1 + (name * 131 + i * 7) % 900 for i in range(n_tokens)]


# A small tree: two roots, each with branches that part inside a block and at its edge.
_ROOTS = [_segment(0, 48), _segment(1, 21)]
_BRANCHES = [_segment(2, 16), _segment(3, 35), _segment(4, 5)]
PROMPTS = [
    *_ROOTS,
    *[root + branch for root in _ROOTS for branch in _BRANCHES],
    _ROOTS[0] + _BRANCHES[0] + _BRANCHES[1],
    _ROOTS[0] + _BRANCHES[1] + _BRANCHES[0],
]
HINTS: list[dict[str, Any]] = [
    {"do": "pin", "for_s": 60.0},
    {"do": "retain", "for_s": 60.0},
    {"do": "release"},
    {"do": "session_end"},
    {"do": "supersede"},
    {"do": "tool_started", "tool": "ls"},
    {"do": "tool_ended", "tool": "ls"},
    {"do": "prefetch", "to": "device"},
    {"do": "pin", "for_s": "for ever"},
]
HOOKS = [
    ("half", "on_new_request"),
    ("half", "match"),
    ("half", "allocated"),
    ("half", "orders"),
    ("half", "acknowledged"),
    ("half", "received"),
    ("half", "finished"),
    ("half", "write_stats"),
    ("worker", "begin"),
    ("worker", "store"),
    ("worker", "results"),
    ("worker", "failed_requests"),
    ("worker", "failed_blocks"),
    ("worker", "acks"),
    ("worker", "_load"),
    ("cache", "publish"),
]


class StepsMachine(RuleBasedStateMachine):
    config: ClassVar[Any]
    asynchronous: ClassVar[bool]
    new_arena_name: ClassVar[Callable[[], str]]
    seen: ClassVar[Counter[str]]
    faults = False
    groups = "full"

    @initialize(
        eviction=st.sampled_from(["agents", "agents", "s3fifo", "lru"]),
        n_host=st.sampled_from([9, 20]),
    )
    def start(self, eviction: str, n_host: int) -> None:
        self.engine = Engine(
            self.config,
            asynchronous=self.asynchronous,
            arena=self.new_arena_name(),
            n_host=n_host * len(GROUPS[self.groups]),
            eviction=eviction,
            groups=self.groups,
        )
        self.engine.loads.hold = True

    @rule(
        at=st.integers(0, len(PROMPTS) - 1),
        n_tokens=st.sampled_from([1, 2, 16, 17, 40]),
        load=st.sampled_from([True, True, True, False]),
        store=st.sampled_from([True, True, True, False]),
        stop=st.booleans(),
        salt=st.sampled_from([None, None, None, "a"]),
        skip_reading=st.sampled_from([None, None, None, True]),
        session=st.sampled_from([None, "s", "t"]),
        hint=st.sampled_from([None, *HINTS]),
    )
    def add(
        self, at: int, n_tokens: int, load: bool, store: bool, stop: bool, salt: str | None,
        skip_reading: bool | None, session: str | None, hint: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        self.engine.add(
            PROMPTS[at],
            n_tokens,
            kvmem={
                "load": load,
                "store": store,
                **({"hints": {"version": 1, "actions": [hint]}} if hint else {}),
            },
            session=session if self._has_sessions() else None,
            stop=stop,
            salt=salt,
            skip_reading=skip_reading,
        )

    @staticmethod
    def _has_sessions() -> bool:
        from vllm.v1.request import Request

        return "session_id" in inspect.signature(Request).parameters

    @rule(hint=st.sampled_from(HINTS), session=st.sampled_from(["s", "t"]))
    def hint(self, hint: dict[str, Any], session: str) -> None:
        """An orchestrator says something of a session, between requests."""
        envelope = {"version": 1, "actions": [{**hint, "session": session}]}
        told = getattr(self.engine.core, METHOD)(json.dumps({"envelope": envelope}))
        for receipt in json.loads(told)["receipts"]:
            self.seen[f"hints {receipt['status']}"] += 1

    @rule(at=st.integers(0, 7), extra=st.sampled_from([1, 12, 27]), n_tokens=st.integers(1, 33))
    def follow_up(self, at: int, extra: int, n_tokens: int) -> None:
        """The next turn of a conversation: the last one's prompt and reply, and some more."""
        over = [t for t in self.engine.turns.values() if t.finish_reason is not None]
        if over:
            turn = over[at % len(over)]
            tokens = [*turn.prompt, *turn.tokens, *_segment(at, extra)]
            if len(tokens) + n_tokens <= MAX_TOKENS - 32:
                self.engine.add(tokens, n_tokens, salt=turn.salt)

    @rule(n=st.sampled_from([1, 2, 3, 8, 20]), eager=st.booleans())
    def step(self, n: int, eager: bool) -> None:
        self.engine.eager = eager
        for _ in range(n):
            self.engine.step()
            self.engine.check()

    @rule(forget=st.booleans(), at=st.integers(0, 7), eager=st.booleans())
    def quiet(self, forget: bool, at: int, eager: bool) -> None:
        """All that was asked for is answered; then perhaps only kvmem has it, and is asked."""
        self.engine.drain()
        self.engine.loads.hold = True
        if forget:
            assert self.engine.forget_device()
            self.follow_up(at, 12, 17)
            self.step(1, eager)

    @rule(n=st.sampled_from([1, 1, 3]))
    def end_loads(self, n: int) -> None:
        self.seen["loads held"] += len(self.engine.loads.held)
        self.engine.loads.run(n)

    @rule(
        at=st.integers(0, 7),
        late=st.booleans(),
        first=st.sampled_from(["RUNNING", "WAITING_FOR_REMOTE_KVS", "WAITING"]),
    )
    def abort(self, at: int, late: bool, first: str) -> None:
        requests, live = self.engine.scheduler.requests, self.engine.live()
        live = [i for i in live if requests[i].status.name == first] or live
        if live:
            one = live[at % len(live)]
            self.seen[f"aborted while {requests[one].status.name}"] += 1
            if late:
                self.engine.meanwhile.append(lambda: self.engine.abort(one))
            else:
                self.engine.abort(one)

    @rule()
    def forget_device(self) -> None:
        self.seen["device emptied"] += self.engine.forget_device()

    @precondition(lambda self: not self.engine.queue)
    @rule()
    def preempt_all(self) -> None:
        """vLLM can't do this while others than running requests hold blocks: waiting requests that
        load, and loads to the device for no request."""
        requests = self.engine.scheduler.requests.values()
        holds = self.engine.scheduler._holds_kv_blocks
        early = self.engine.half.device.stats()["under_way"]
        if not early and all(r.status.name == "RUNNING" or not holds(r) for r in requests):
            self.engine.preemptions += len(self.engine.scheduler.running)
            self.engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    @rule(dice=st.integers(0, 3))
    def reset(self, dice: int) -> None:
        if dice == 0:
            self.seen["resets asked for"] += 1
            self.seen["resets"] += self.engine.reset()

    @rule(dice=st.integers(0, 3))
    def new_weights(self, dice: int) -> None:
        if dice == 0:
            statuses = {r.status.name for r in self.engine.scheduler.requests.values()}
            self.seen.update(f"new weights while {status}" for status in statuses)
            self.engine.new_weights()

    @rule(slot=st.integers(0, 59), at=st.integers(0, 511))
    def corrupt(self, slot: int, at: int) -> None:
        self.engine.corrupt(slot % self.engine.half.cache.stats()["n_slots"], at)

    @precondition(lambda self: self.faults)
    @rule(hook=st.sampled_from(HOOKS), after=st.booleans())
    def break_a_hook(self, hook: tuple[str, str], after: bool) -> None:
        self.engine.fail_once(hook, after=after)

    @invariant()
    def the_tables_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        try:
            engine.eager = True
            engine.drain()
            if engine.faulted:  # what was lost is given back once a store is acknowledged
                engine.mend()
                engine.generate(_segment(len(engine.turns) + 50, 40))
            keeping = engine.half.cache.keeping
            if keeping is not None and self.groups == "full":
                assert not keeping.off
                self.seen["blocks cut"] += keeping.room.n_cut
            engine.half.cache.sessions.dropped()  # pins hold what they hold
            engine.assert_settled()
            self._count()
        finally:
            engine.close()

    def _count(self) -> None:
        engine, totals = self.engine, self.engine.half.totals
        self.seen["loads"] += totals.blocks_loaded
        self.seen["stores"] += totals.blocks_stored
        self.seen["quarantines"] += totals.quarantined
        self.seen["refused"] += totals.refused
        self.seen["evictions"] += engine.half.cache.stats()["evictions"]
        self.seen["preemptions"] += engine.preemptions
        self.seen["kept"] += len(engine.kept)
        self.seen["failures"] += engine.half.page.failures
        told = engine.half.device.stats()
        assert told["off"] == "" or self.groups != "full", told
        self.seen["brought early"] += told["brought"]
        self.seen["brought for nothing"] += told["discarded"]
        self.seen["positions read"] += engine.forward.positions_read


MUST = ("loads", "stores", "evictions", "preemptions", "quarantines", "resets", "device emptied",
        "new weights while RUNNING", "new weights while WAITING_FOR_REMOTE_KVS",
        "aborted while RUNNING", "aborted while WAITING_FOR_REMOTE_KVS", "loads held")  # fmt: skip

LOTS = 8
BOTH = (False, True)
# Everything with one group; with several what differs there: the engine's hybrid manager, under
# either scheduler, and a load that fails as a whole.
CASES = [
    *[("full", asynchronous, faults) for asynchronous in BOTH for faults in BOTH],
    ("hybrid", False, False),
    ("hybrid", True, True),
    ("windows", True, False),
]
# Chunks differ from windows in where they begin, which test_groups.py has.
assert {groups for groups, _, _ in CASES} == set(GROUPS) - {"chunks"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "asynchronous", "faults"),
    CASES,
    ids=[
        f"{groups}-{'AsyncScheduler' if asynchronous else 'Scheduler'}"
        f"-{'with broken hooks' if faults else 'sound'}"
        for groups, asynchronous, faults in CASES
    ],
)
def test_any_order_of_events_reads_right_and_leaves_nothing(
    config: Any,
    new_arena_name: Callable[[], str],
    groups: str,
    asynchronous: bool,
    faults: bool,
) -> None:
    seen: Counter[str] = Counter()
    must = [*MUST, *(["blocks cut", "hints accepted"] if groups == "full" else [])]
    must += [*(["kept"] if asynchronous else []), *(["failures"] if faults else [])]
    # Examples are derandomised by the machine's name: another name, other examples. Most often one
    # lot reaches everything that must have happened, or the run would prove nothing.
    for lot in range(LOTS):
        machine = type(
            f"Machine{lot}",
            (StepsMachine,),
            {
                "config": config,
                "asynchronous": asynchronous,
                "new_arena_name": staticmethod(new_arena_name),
                "seen": seen,
                "faults": faults,
                "groups": groups,
            },
        )
        run_state_machine_as_test(
            machine, settings=settings(max_examples=100, stateful_step_count=60)
        )
        if all(seen[what] for what in must):
            break
    assert not [what for what in must if not seen[what]], seen
