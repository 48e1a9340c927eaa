"""What an orchestrator's words do to what a branch is worth."""

from __future__ import annotations

import numpy as np
import pytest

from kvmem.policy.keeper import BACK, Keeper
from kvmem.policy.returns import N_BINS, bins_of


def waited(keeper: Keeper, tool: str, seconds: float, runs: int = 40, *, told_back: bool) -> None:
    """Branches of their own that wait for a tool once each."""
    for i in range(runs):
        run = 1000 + 100 * len(tool) + i
        branch = keeper.used([run], 0.0, None)
        keeper.waits(branch, tool, 0.0)
        if told_back:
            keeper.waits(branch, BACK, seconds)
        keeper.used([run, run + 50_000], seconds + 0.1)
        keeper.waits(branch, "over", seconds + 0.1)


def worth_after(keeper: Keeper, kind: str, seconds: float) -> float:
    branch = keeper.used([7], 0.0)
    keeper.waits(branch, kind, 0.0)
    return float(keeper.worths(seconds)[1][branch])


@pytest.mark.parametrize("told_back", [False, True])
def test_a_tool_has_returned_when_its_end_is_said(told_back: bool) -> None:
    """That the wait was over before the prompt came takes nothing from what is learned of the
    tool: it is worth more just before it uses to return than a while later."""
    keeper = Keeper()
    waited(keeper, "tool:quick", 2.0, told_back=told_back)
    found = keeper.returns.hazard(("tool", "tool:quick"))
    at = int(bins_of(np.array([2.05]))[0])
    assert found[at] > 3 * found[min(at + 4, N_BINS - 1)]
    assert worth_after(keeper, "tool:quick", 1.5) > 2 * worth_after(keeper, "tool:quick", 8.0)


def test_a_prompt_that_comes_now_is_worth_more_than_any_wait() -> None:
    keeper = Keeper()
    waited(keeper, "tool:slow", 60.0, told_back=True)
    branch = keeper.used([7], 0.0)
    keeper.waits(branch, "tool:slow", 0.0)
    waiting = keeper.worths(5.0)[1][branch]
    keeper.waits(branch, BACK, 5.0)
    assert keeper.worths(5.1)[1][branch] > 5 * waiting


def test_a_person_takes_longer_than_a_tool_before_anything_was_learned() -> None:
    keeper = Keeper()
    assert worth_after(keeper, "tool:new", 3.0) > 3 * worth_after(keeper, "user", 3.0)


def test_a_tool_not_seen_yet_is_lent_what_is_known_of_tools() -> None:
    before = worth_after(Keeper(), "tool:new", 40.0)
    keeper = Keeper()
    waited(keeper, "tool:other", 60.0, told_back=True)
    assert worth_after(keeper, "tool:new", 40.0) > 1.4 * before


def test_saying_twice_that_a_wait_is_over_counts_once() -> None:
    one, two = Keeper(), Keeper()
    for keeper, times in ((one, 1), (two, 3)):
        branch = keeper.used([7], 0.0)
        keeper.waits(branch, "tool:x", 0.0)
        for _ in range(times):
            keeper.waits(branch, BACK, 4.0)
        keeper.used([7, 8], 4.5)
    assert (one._times[0], one._pace[0]) == (two._times[0], two._pace[0])
    assert one.returns.hazard(("tool", "tool:x")).tolist() == pytest.approx(
        two.returns.hazard(("tool", "tool:x")).tolist()
    )
    assert one._kind[one._branch_at[8]] == "tool:x"
