"""The table of vLLM's releases in docs/vllm.md is one that `make versions` can have written."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from kvmem.engines.vllm import interface
from kvmem.engines.vllm.sources import Sources
from tests.versions import matrix
from tests.versions.matrix import OFF, READ, YES, Row

ROWS = matrix.rows_of(matrix.in_page(matrix.PAGE.read_text()))


def test_every_release_has_its_row_in_order() -> None:
    assert [row.version for row in ROWS] == matrix.releases()


def test_rows_make_the_table() -> None:
    assert matrix.table(ROWS) == matrix.in_page(matrix.PAGE.read_text())


def test_what_does_not_run_here_was_read_and_everything_else_was_run() -> None:
    assert {row.version for row in ROWS if row.works == READ} == set(matrix.NOT_BUILT)
    assert {row.works for row in ROWS} == {YES, OFF, READ}


def test_releases_that_work_follow_one_another_and_are_the_range_that_the_code_names() -> None:
    works = [row.version for row in ROWS if row.works != OFF]
    assert [row.version for row in ROWS][-len(works) :] == works
    first, last = (version.rpartition(".")[0] for version in (works[0], works[-1]))
    assert f"vLLM {first} to {last}" == interface.KNOWN


def test_the_oldest_that_works_is_the_one_that_is_run_before_a_change_lands() -> None:
    makefile = (matrix.ROOT / "Makefile").read_text()
    oldest = re.findall(r"^OLDEST := (\S+)$", makefile, re.MULTILINE)
    assert oldest == [next(row.version for row in ROWS if row.works == YES)]
    assert "step versions-oldest" in (matrix.ROOT / ".ci" / "run").read_text()


@pytest.mark.engine
def test_the_row_of_the_installed_engine_is_true() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    notes = matrix._lost(Sources(Path(spec.submodule_search_locations[0])))
    assert Row(matrix.newest(), YES, notes) in ROWS
