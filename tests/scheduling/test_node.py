"""Engines that share a node, under vLLM's own schedulers: one computes, the others load.

A node that goes and comes again costs recomputes, never an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmem.cli.where import of_prompt, of_session
from kvmem.errors import ConfigError
from kvmem.node import Node
from kvmem.store import list_live
from tests import nodes
from tests.scheduling.engine import Engine, running
from tests.scheduling.forward import BLOCK
from tests.scheduling.test_steps import PROMPT, WHOLE, other, stored
from tests.unit.test_node import until

pytestmark = pytest.mark.engine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def node(path: Path) -> Iterator[Node]:
    with nodes.serving(path, host_gb=0.02) as node:
        yield node


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def start(
    request: pytest.FixtureRequest, config: Any, new_arena_name: Callable[[], str], path: Path
) -> Iterator[Callable[..., Engine]]:
    with ExitStack() as stack:

        def start(**options: Any) -> Engine:
            return stack.enter_context(
                running(
                    config, asynchronous=request.param, arena=new_arena_name(), node=str(path),
                    **options,
                )
            )  # fmt: skip

        yield start


def settled(engine: Engine, node: Node) -> None:
    """Nothing is held of requests that are over."""
    assert node.hall is not None
    until(lambda: node.hall.cache.stats()["leases"] == 0)
    engine.assert_settled()


def test_what_one_engine_computed_the_other_loads(start: Callable[..., Engine], node: Node) -> None:
    one, two = start(), start()
    assert one.generate(PROMPT, 20).receipt["tokens"]["computed"] == len(PROMPT)
    told = two.generate(PROMPT, 20).receipt["tokens"]
    assert (told["host"], told["computed"]) == (WHOLE * BLOCK, len(PROMPT) - WHOLE * BLOCK)
    assert two.half.totals.blocks_loaded == WHOLE
    for engine in (one, two):
        settled(engine, node)


@pytest.mark.parametrize("groups", ["hybrid", "windows", "chunks"])
def test_all_groups_are_shared(start: Callable[..., Engine], node: Node, groups: str) -> None:
    one, two = start(groups=groups), start(groups=groups)
    one.generate(PROMPT, 20)
    told = two.generate(PROMPT, 20).receipt["tokens"]
    assert told["host"] == WHOLE * BLOCK
    for engine in (one, two):
        settled(engine, node)


def test_a_prompt_that_both_get_at_once_is_computed_once(
    start: Callable[..., Engine], node: Node
) -> None:
    one, two = start(), start()
    prompt = other(200)
    first, second = one.add(prompt, 4), two.add(prompt, 4)
    one.step()  # its flight begins
    for _ in range(400):
        two.step()
        one.step()
        if two.turns[second].finish_reason and one.turns[first].finish_reason:
            break
    one.drain()
    two.drain()
    computed = [e.turns[i].receipt["tokens"]["computed"] for e, i in ((one, first), (two, second))]
    whole = (len(prompt) - 1) // BLOCK * BLOCK
    assert computed == [len(prompt), len(prompt) - whole]
    for engine in (one, two):
        settled(engine, node)


def test_a_block_of_another_engine_is_verified_before_its_first_use(
    start: Callable[..., Engine], node: Node
) -> None:
    """Whatever share of its own blocks an engine verifies."""
    one, two = start(verify_share=0.0), start(verify_share=0.0)
    one.generate(PROMPT)
    two.generate(other(20))  # so that the memory is mapped
    (slot, *_) = one.slots_of(PROMPT)
    two.corrupt(slot)
    told = two.generate(PROMPT, 20).receipt["tokens"]
    assert told["host"] == 0
    assert two.half.totals.quarantined >= 1
    for engine in (one, two):
        settled(engine, node)


def test_a_salt_of_its_own_shares_nothing(start: Callable[..., Engine], node: Node) -> None:
    one, two = start(), start()
    one.generate(PROMPT, 4, salt="a")
    assert two.generate(PROMPT, 4, salt="b").receipt["tokens"]["host"] == 0
    assert two.generate(PROMPT, 4, salt="a").receipt["tokens"]["host"] == WHOLE * BLOCK
    assert node.hall is not None
    assert len(node.hall.tenants.told(node.beat_s)) == 2


def test_after_a_reset_an_engine_believes_nobody(start: Callable[..., Engine], node: Node) -> None:
    one, two = start(), start()
    two.generate(PROMPT, 4)
    assert one.reset()
    two.forget_device()
    two.generate(PROMPT, 4)  # it stores again, under the keys of before
    assert one.generate(PROMPT, 4).receipt["tokens"]["host"] == 0
    one.forget_device()
    assert one.generate(PROMPT, 4).receipt["tokens"]["host"] == WHOLE * BLOCK
    for engine in (one, two):
        settled(engine, node)


def test_new_weights_in_one_engine(start: Callable[..., Engine], node: Node) -> None:
    one, two = start(), start()
    one.generate(PROMPT, 4)
    one.new_weights()
    assert one.generate(PROMPT, 4).receipt["tokens"]["host"] == 0
    assert two.generate(PROMPT, 4).receipt["tokens"]["host"] == WHOLE * BLOCK


def test_an_engine_runs_on_without_its_node_and_uses_the_next(
    start: Callable[..., Engine], path: Path
) -> None:
    with nodes.serving(path, host_gb=0.02):
        engine = start()
        stored(engine)
        assert engine.generate(PROMPT, 4).receipt["tokens"]["host"] == WHOLE * BLOCK
        engine.forget_device()
    engine.faulted = True  # it says that it is without a node
    assert engine.generate(PROMPT, 4).receipt["tokens"]["computed"] == len(PROMPT)
    engine.forget_device()
    with nodes.serving(path, host_gb=0.02) as node:
        until(lambda: engine.half.cache._ready is not None)
        assert engine.generate(PROMPT, 4).receipt["tokens"]["host"] == 0  # it is another memory
        engine.forget_device()
        assert engine.generate(PROMPT, 4).receipt["tokens"]["host"] == WHOLE * BLOCK
        assert engine.half.page.last_failure.startswith("node: ")
        settled(engine, node)
        engine.close()


@pytest.mark.parametrize("stores", [False, True])
def test_a_node_that_goes_in_the_middle_of_a_prompt(
    start: Callable[..., Engine], path: Path, stores: bool
) -> None:
    """With loads under way, or with slots reserved: what comes of them is nobody's any more."""
    with nodes.serving(path, host_gb=0.02):
        engine = start()
        engine.faulted = True
        stored(engine)
        if stores:
            waits = engine.add(other(200), 4)
            engine.eager = False
            engine.step()
        else:
            engine.loads.hold = True
            waits = engine.add(PROMPT, 4)
            engine.step_until(lambda: engine.loads.held)
    with nodes.serving(path, host_gb=0.02) as node:
        until(lambda: engine.half.cache._ready is not None or engine.half.cache.attached)
        more = engine.add(other(60, 2), 4)
        engine.eager = True
        engine.drain()
        assert engine.turns[waits].finish_reason
        assert engine.turns[more].finish_reason
        until(lambda: engine.half.cache._ready is not None or engine.half.cache.attached)
        engine.generate(PROMPT, 4)
        settled(engine, node)
        engine.close()


def test_settings_that_are_the_nodes_are_refused(
    start: Callable[..., Engine], tmp_path: Path, node: Node
) -> None:
    for wrong in (
        {"disk_gb": 0.1, "disk_path": str(tmp_path / "disk")},
        {"far": "redis://127.0.0.1:1"},
        {"eviction": "agents"},
    ):
        with pytest.raises(ConfigError) as caught:
            start(**wrong)
        assert caught.value.setting in wrong


def test_where_says_which_engine_has_how_much(start: Callable[..., Engine], node: Node) -> None:
    one, two = start(), start()
    one.generate(PROMPT, 4, session="s", salt="a")
    live = [live for live in list_live() if live.path in (e.half.arena.path for e in (one, two))]
    first, second = of_prompt(live, PROMPT, salt="a")
    assert first.arena == one.half.arena.path.name
    assert (first.device, first.host) == (WHOLE * BLOCK, 0)
    assert (second.device, second.host) == (0, WHOLE * BLOCK)  # the node's
    assert [place.here for place in of_prompt(live, PROMPT)] == [0, 0]  # I11: not its salt
    (place,) = of_session(live, "s")
    assert (place.arena, place.device) == (first.arena, WHOLE * BLOCK)
    assert of_session(live, "another") == []
    two.generate(PROMPT, 4, salt="a")
    assert [place.device for place in of_prompt(live, PROMPT, salt="a")] == [WHOLE * BLOCK] * 2


def test_what_is_to_be_compared_goes_with_its_node(
    start: Callable[..., Engine], path: Path
) -> None:
    """I1: the same slots of the next node hold other blocks, which would seem to be wrong ones."""
    with nodes.serving(path, host_gb=0.02):
        engine = start(shadow_share=1.0)
        engine.faulted = True
        stored(engine)
        shadowed = engine.add(PROMPT, 4)  # it is to be computed, and compared with what is stored
        assert engine.half.shadows._of
    with nodes.serving(path, host_gb=0.02) as node:
        until(lambda: engine.half.cache.adopt() or engine.half.cache._ready is not None)
        other_engine = start()
        other_engine.generate(other(100, 5), 4)  # other blocks in those slots
        until(engine.half.cache.adopt)
        engine.drain()
        assert engine.turns[shadowed].finish_reason
        assert engine.half.totals.quarantined == 0
        assert engine.half.totals.shadowed == 0
        settled(engine, node)
        engine.close()
        other_engine.close()
