"""A request's device blocks are those of the step, in the forms of all releases that are served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvmem.engines.vllm.tables import BlockTables

ONE, TWO, MORE = ([1],), ([2, 3],), ([1, 4],)


def told(fresh: dict[str, Any], finished: tuple[str, ...] = ()) -> Any:
    """A step's output in 0.29: tables of the requests that were given blocks in it."""
    state = SimpleNamespace(block_ids=fresh)
    return SimpleNamespace(kv_connector_block_state=state, finished_req_ids=set(finished))


@pytest.fixture
def tables() -> BlockTables:
    return BlockTables()


def test_the_engine_is_asked_where_it_answers(tables: BlockTables) -> None:
    state = SimpleNamespace(get_block_ids={"a": ONE}.get)
    tables.take(SimpleNamespace(kv_connector_block_state=state))  # type: ignore[arg-type]
    assert tables.of("a") == ONE
    assert tables.of("b") is None


def test_a_table_stands_until_the_request_is_given_blocks(tables: BlockTables) -> None:
    tables.take(told({"a": ONE, "b": TWO}))
    tables.take(told({}))
    assert (tables.of("a"), tables.of("b")) == (ONE, TWO)
    tables.take(told({"a": MORE}))
    assert (tables.of("a"), tables.of("b")) == (MORE, TWO)


def test_a_step_may_be_taken_twice(tables: BlockTables) -> None:
    step = told({"a": ONE}, finished=("b",))
    tables.take(step)
    tables.take(step)
    assert tables.of("a") == ONE


def test_a_finished_request_leaves_nothing(tables: BlockTables) -> None:
    tables.take(told({"a": ONE, "b": TWO}))
    tables.take(told({}, finished=("a",)))
    assert tables.of("a") is None
    assert tables._told == {"b": TWO}


def test_an_id_that_ends_and_comes_again_in_one_step_has_its_new_blocks(
    tables: BlockTables,
) -> None:
    tables.take(told({"a": ONE}))
    tables.take(told({"a": TWO}, finished=("a",)))
    assert tables.of("a") == TWO


def test_after_a_step_that_could_not_be_taken_no_table_is_known(tables: BlockTables) -> None:
    tables.take(told({"a": ONE}))
    with pytest.raises(AttributeError):
        tables.take(SimpleNamespace())  # type: ignore[arg-type]
    assert tables.of("a") is None
    tables.take(told({"b": TWO}))
    assert tables.of("a") is None  # it may have been given others in the step that was lost
    assert tables.of("b") == TWO


def test_a_step_without_a_state_tells_of_nobody(tables: BlockTables) -> None:
    tables.take(told({"a": ONE}))
    tables.take(SimpleNamespace(kv_connector_block_state=None))  # type: ignore[arg-type]
    assert tables.of("a") is None
