"""The engine matrix's own judgement: what counts as right, refused and wrong."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import pytest

from benchmarks import _matrix_async, _matrix_cells, _matrix_servers, _models
from benchmarks._matrix import (
    EngineError,
    Outcome,
    Setup,
    WrongError,
    chosen,
    is_refusal,
    summary,
)
from benchmarks._matrix_engine import Turn
from benchmarks._matrix_judge import agree, from_host, itself, same
from benchmarks._matrix_setups import MODELS, SETUPS, SHORT
from kvmem.engines.vllm import support
from kvmem.errors import ConfigError, UnsupportedEngine


def turn(**changes: Any) -> Turn:
    whole = {"tokens": [5, 6, 7], "logprobs": [-0.5, -1.0, -2.0], "cached": 64, "report": {}}
    return Turn(**{**whole, **changes})


def test_the_same_answer_is_right() -> None:
    same(turn(), turn(), "itself")
    agree(turn(logprobs=[-0.50005, -1.0, -2.0]), turn(), "another shape")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [5, 9, 7]}, "token 1 of 3 differs"),
        ({"tokens": [5, 6], "logprobs": [-0.5, -1.0]}, "token 2 of 3 differs"),
        ({"logprobs": [-0.5, -1.00005, -2.0]}, "logprobs differ by 5e-05"),
        ({"logprobs": [-0.5, math.nan, -2.0]}, "logprobs differ"),
    ],
)
def test_a_token_or_the_fifth_decimal_makes_it_wrong(change: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongError, match=said):
        same(turn(**change), turn(), "this")


def test_an_answer_that_moved_nothing_is_wrong() -> None:
    from_host(turn(report={"tokens": {"host": 32}}))
    with pytest.raises(WrongError, match="nothing came from the host tier"):
        from_host(turn(report={"tokens": {"host": 0}}))


def test_an_engine_that_contradicts_itself_is_not_held_against_kvmem() -> None:
    itself(turn(), turn(), "a batch")
    with pytest.raises(EngineError, match="a batch: token 1 of 3 differs"):
        itself(turn(tokens=[5, 9, 7]), turn(), "a batch")


def test_a_refusal_is_told_from_other_failures() -> None:
    with pytest.raises(UnsupportedEngine) as refused:
        support.check_flags(
            Namespace(
                data_parallel_size=2,
                enable_lora=False,
                speculative_config=None,
                prefix_caching_hash_algo="sha256",
            )
        )
    assert is_refusal(str(refused.value))
    mistaken = ConfigError("kvmem has no setting 'x'", next_step="Leave it out.", setting="x")
    assert not is_refusal(str(mistaken))


def test_the_line_counts_every_cell_but_those_that_vllm_cannot_run() -> None:
    verdicts = ("right", "right", "refused", "wrong", "not run")
    found = summary(Outcome(f"m/{i}", verdict, "") for i, verdict in enumerate(verdicts))
    assert found == {
        "cells": 4, "right": 2, "wrong": 1, "refused_with_reason": 1, "not_run": 1,
    }  # fmt: skip


def test_names_choose_cells_setups_and_families() -> None:
    setups = [Setup("a", "llama", ("x", "y")), Setup("a b", "llama", ("x",)), Setup("ab", "m", ())]

    def names(*only: str) -> list[str]:
        return [f"{s.name}/{c}" for s in chosen(setups, only) for c in s.cells]

    assert names() == ["a/x", "a/y", "a b/x"]
    assert names("a") == ["a/x", "a/y", "a b/x"]
    assert names("a/x", "a b") == ["a/x", "a b/x"]
    with pytest.raises(ValueError, match="no cell 'c'"):
        names("a", "c")


def test_there_are_enough_cells_and_each_has_a_scenario() -> None:
    known = {
        "llm": _matrix_cells.SCENARIOS,
        "async": _matrix_async.SCENARIOS,
        "server": _matrix_servers.SCENARIOS,
        "flags": {"refused_flags": None},
    }
    cells = [(setup.kind, cell) for setup in SETUPS for cell in setup.cells]
    assert len(cells) >= 40
    assert [cell for kind, cell in cells if cell not in known[kind]] == []
    assert len({(setup.name, cell) for setup in SETUPS for cell in setup.cells}) == len(cells)
    assert chosen(SETUPS, SHORT)


def test_every_model_has_a_setup_and_a_shape() -> None:
    assert {setup.name for setup in SETUPS} >= set(MODELS)
    assert {setup.model for setup in SETUPS} == set(_models.CONFIGS)


def test_prompts_are_new_from_their_first_tokens_on_and_the_same_every_time() -> None:
    starts = {tuple(_models.prompt(300, seed)[:16]) for seed in range(5000)}
    assert len(starts) == 5000
    assert _models.prompt(300, 7)[:200] == _models.prompt(200, 7)
    assert all(2 <= token < _models.VOCABULARY for token in _models.prompt(3000, 1))
