"""Models with windows and states: vLLM's own hybrid KV-cache manager around both halves.

The forward checks every position that a step's attention reads, and every state that it goes on
from; see `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.scheduling.engine import Engine, running
from tests.scheduling.forward import BLOCK, WrongKVError
from tests.scheduling.test_steps import PROMPT, WHOLE, in_flight, other, stored

pytestmark = pytest.mark.engine
BOTH = [False, True]
NAMES = ["Scheduler", "AsyncScheduler"]


@pytest.fixture(params=BOTH, ids=NAMES)
def hybrid(request: pytest.FixtureRequest, config: Any, arena_name: str) -> Iterator[Engine]:
    options = {"asynchronous": request.param, "arena": arena_name, "n_host": 90}
    with running(config, groups="hybrid", **options) as engine:
        yield engine


@pytest.fixture(params=BOTH, ids=NAMES)
def windows(request: pytest.FixtureRequest, config: Any, arena_name: str) -> Iterator[Engine]:
    options = {"asynchronous": request.param, "arena": arena_name, "n_host": 90}
    with running(config, groups="windows", **options) as engine:
        yield engine


@pytest.fixture(params=BOTH, ids=NAMES)
def chunks(request: pytest.FixtureRequest, config: Any, arena_name: str) -> Iterator[Engine]:
    options = {"asynchronous": request.param, "arena": arena_name, "n_host": 90}
    with running(config, groups="chunks", **options) as engine:
        yield engine


def loaded(engine: Engine, act: Callable[[], Any]) -> dict[int, int]:
    """Blocks that were loaded meanwhile, by group."""
    half, found = engine.worker.worker, {}
    real = half._load

    def load(order: Any) -> Any:
        for part in order.parts:
            found[part.group] = found.get(part.group, 0) + len(part.slots)
        return real(order)

    half._load = load
    try:
        act()
    finally:
        half._load = real
    return found


def test_every_group_loads_what_it_reads(hybrid: Engine) -> None:
    stored(hybrid)
    found = loaded(hybrid, lambda: hybrid.generate(PROMPT, 30))
    # 64 tokens: four blocks; those with tokens [25, 64); the state after the last.
    assert found == {0: 4, 1: 3, 2: 1}
    told = hybrid.turns["r1"].receipt
    assert (told["tokens"]["host"], told["miss"]) == (WHOLE * BLOCK, "none")
    hybrid.assert_settled()


def test_groups_with_blocks_of_two_sizes_resume_where_both_end(windows: Engine) -> None:
    prompt = other(3 * BLOCK + 5)
    stored(windows, prompt)
    found = loaded(windows, lambda: windows.generate(prompt, 30))
    assert found == {0: 1, 1: 2}  # 32 tokens, not 48
    assert windows.turns["r1"].receipt["tokens"]["host"] == 2 * BLOCK
    windows.assert_settled()


@pytest.mark.parametrize(("n_blocks", "n_chunk"), [(2, 2), (3, 0), (4, 1), (5, 2)])
def test_a_chunk_is_loaded_from_its_own_start(chunks: Engine, n_blocks: int, n_chunk: int) -> None:
    """Three blocks make a chunk."""
    prompt = other(n_blocks * BLOCK + 5)
    stored(chunks, prompt)
    found = loaded(chunks, lambda: chunks.generate(prompt, 40))
    assert found == {group: n for group, n in ((0, n_chunk), (1, n_blocks)) if n}
    assert chunks.turns["r1"].receipt["tokens"]["host"] == n_blocks * BLOCK
    chunks.assert_settled()


def test_a_reply_over_several_chunks_is_resumed_at_its_last_block(chunks: Engine) -> None:
    turn = stored(chunks, PROMPT, 120)
    whole = (len(PROMPT) + 119) // BLOCK
    following = chunks.generate([*PROMPT, *turn.tokens, 3], 20)
    assert following.receipt["tokens"]["host"] == whole * BLOCK
    chunks.assert_settled()


def test_the_reply_is_resumed_at_its_last_block(hybrid: Engine) -> None:
    turn = stored(hybrid, PROMPT, 3 * BLOCK)
    whole = (len(PROMPT) + 3 * BLOCK - 1) // BLOCK
    following = hybrid.generate([*PROMPT, *turn.tokens, 3], 20)
    assert following.receipt["tokens"]["host"] == whole * BLOCK
    hybrid.assert_settled()


def test_a_prompt_that_parts_where_no_state_was_kept_is_computed(hybrid: Engine) -> None:
    stored(hybrid)
    turn = hybrid.generate([*PROMPT[:40], *other(30)], 4)
    assert turn.receipt["tokens"]["host"] == 0
    assert (turn.receipt["miss"], turn.receipt["first_missing_block"]) == ("no_boundary", 0)
    hybrid.assert_settled()


def test_a_window_stored_without_its_older_blocks_is_enough(windows: Engine) -> None:
    """A long reply: the engine lets go of blocks that are out of the window as it goes on."""
    turn = stored(windows, PROMPT, 120)
    n_tokens = (len(PROMPT) + 119) // (2 * BLOCK) * 2 * BLOCK
    following = windows.generate([*PROMPT, *turn.tokens, 3], 20)
    assert following.receipt["tokens"]["host"] == n_tokens
    windows.assert_settled()


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_broken_block_of_any_group_costs_the_load_and_no_more(hybrid: Engine, group: int) -> None:
    stored(hybrid)
    grant = hybrid.half.cache.acquire(
        "test", hybrid.chains_of(PROMPT), start=0, limit=WHOLE * BLOCK
    )
    hybrid.half.cache.release("test")
    (part,) = [p for p in grant.parts if p.group == group]
    hybrid.corrupt(int(part.slots[-1]))
    turn = hybrid.generate(PROMPT, 4)
    assert (turn.receipt["miss"], turn.receipt["tokens"]["host"]) == ("load_failed", 0)
    assert hybrid.half.totals.quarantined == 1
    assert hybrid.forget_device()
    assert hybrid.generate(PROMPT).receipt["tokens"]["host"] == WHOLE * BLOCK  # stored anew
    hybrid.assert_settled()


def test_a_promise_that_cannot_be_kept_is_computed(hybrid: Engine) -> None:
    stored(hybrid)
    raised = hybrid.fail_once(("half", "allocated"), after=False)
    turn = hybrid.generate(PROMPT, 4)
    assert raised()
    assert turn.receipt["tokens"]["host"] == 0
    hybrid.assert_settled()


def test_an_abort_while_a_load_of_all_groups_is_in_flight_waits_for_it(hybrid: Engine) -> None:
    stored(hybrid)
    one = in_flight(hybrid)
    hybrid.abort(one)
    hybrid.step()
    assert one in hybrid.scheduler.requests
    assert hybrid.half.cache.stats()["leases"] == 1 + 3 + 1
    hybrid.drain()
    hybrid.assert_settled()


def test_preempted_requests_go_on_from_the_host_tier(hybrid: Engine) -> None:
    for seed in range(4):
        hybrid.add(other(66, seed), 120)
    hybrid.drain()
    assert hybrid.preemptions > 0
    assert hybrid.half.totals.blocks_loaded > 0
    hybrid.assert_settled()


def test_a_salt_keeps_every_group_apart(hybrid: Engine) -> None:
    stored(hybrid, salt="a")
    assert hybrid.generate(PROMPT, salt="b").receipt["tokens"]["host"] == 0
    assert hybrid.forget_device()
    assert hybrid.generate(PROMPT, salt="a").receipt["tokens"]["host"] == WHOLE * BLOCK
    hybrid.assert_settled()


# -- the harness sees what it is for -------------------------------------------------------------


def spoil(engine: Engine, group: int, change: Callable[[Any], None]) -> None:
    """Every load's part of a group is changed on its way to the worker."""
    half = engine.worker.worker
    real = half.begin

    def begin(orders: Any) -> None:
        for load in orders.loads:
            for part in load.parts:
                if part.group == group:
                    change(part)
        real(orders)

    half.begin = begin


def _rolled(part: Any) -> None:
    part.block_ids = np.roll(part.block_ids, 1)


def _left_out(part: Any) -> None:
    for name in ("block_ids", "slots", "generations", "verify"):
        setattr(part, name, getattr(part, name)[:0])
    part.keys = b""


@pytest.mark.parametrize(
    ("group", "change"), [(1, _rolled), (1, _left_out), (2, _left_out), (0, _left_out)]
)
def test_a_group_that_is_loaded_wrong_is_seen(
    hybrid: Engine, group: int, change: Callable[[Any], None]
) -> None:
    stored(hybrid)
    spoil(hybrid, group, change)
    with pytest.raises(WrongKVError):
        hybrid.generate(PROMPT, 4)


def test_a_state_of_another_boundary_is_seen(hybrid: Engine) -> None:
    """States stored by their place in the table, not by what the engine offers."""
    storing = hybrid.half.storing
    real = storing.of_states

    def shifted(orders: Any, seen: Any, offers: Any) -> None:
        real(orders, seen, [(group, block, n - BLOCK) for group, block, n in offers])

    storing.of_states = shifted
    with pytest.raises(WrongKVError, match="does not hold its key's KV"):
        stored(hybrid)
