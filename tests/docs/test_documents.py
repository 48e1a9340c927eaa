"""What README and docs name exists; what code can say, code has written."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from kvmem.explain.lint.readers import FORMATS
from tests.docs import (
    blocks,
    metrics_table,
    models_table,
    reasons_table,
    rules_table,
    settings_table,
)

ROOT = blocks.ROOT
MADE = {"kvmem/_core.abi3.so"}  # by `make setup`, so not in the repository


def ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("document", blocks.DOCUMENTS, ids=ids)
def test_every_path_named_exists(document: Path) -> None:
    named = blocks.named_paths(document.read_text()) - MADE
    beside = document.parent
    missing = [p for p in named if not (ROOT / p).exists() and not (beside / p).exists()]
    assert missing == []


@pytest.mark.parametrize("document", blocks.DOCUMENTS, ids=ids)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", blocks.DOCUMENTS, ids=ids)
def test_every_make_target_named_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*  ## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert blocks.make_targets(document.read_text()) - targets == set()


@pytest.mark.parametrize("document", blocks.DOCUMENTS, ids=ids)
def test_every_command_named_exists(document: Path) -> None:
    import typer

    from kvmem.cli import app

    command = typer.main.get_command(app)
    assert blocks.commands(document.read_text()) - set(command.commands) == set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", blocks.DOCUMENTS, ids=ids)
def test_every_test_cited_exists(document: Path) -> None:
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    native = {path.stem for path in (ROOT / "tests" / "native").glob("*_test.cc")}
    cited = blocks.test_names(document.read_text())
    assert {name for name in cited if f"def {name}(" not in written} - native == set()


def test_readme_names_the_two_commands() -> None:
    assert {"demo", "test"} <= blocks.make_targets(blocks.README.read_text())


def test_readme_commands_are_seen() -> None:
    assert {"serve", "stats"} <= blocks.commands(blocks.README.read_text())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `tests/unit/gone.py`", {"tests/unit/gone.py"}),
        ("see [it](docs/gone.md)", {"docs/gone.md"}),
        ("```\ncat kvmem/gone.py\n```", {"kvmem/gone.py"}),
        ("plain tests/unit/gone.py is prose", set()),
    ],
)
def test_paths_are_seen_where_they_are_claims(text: str, found: set[str]) -> None:
    assert blocks.named_paths(text) == found


def test_settings_table_is_what_the_code_describes() -> None:
    page = settings_table.PAGE.read_text()
    assert settings_table.in_page(page) == settings_table.table(), "`make golden` writes it anew"


def test_models_table_is_what_the_engine_matrix_expects() -> None:
    page = models_table.PAGE.read_text()
    assert models_table.in_page(page) == models_table.table(), "`make golden` writes it anew"


def test_rules_table_is_the_catalogue_of_the_linter() -> None:
    page = rules_table.PAGE.read_text()
    assert rules_table.in_page(page) == rules_table.table(), "`make golden` writes it anew"


def test_reasons_table_is_the_catalogue_of_the_explainer() -> None:
    page = reasons_table.PAGE.read_text()
    assert reasons_table.in_page(page) == reasons_table.table(), "`make golden` writes it anew"


def test_metrics_table_is_the_catalogue_of_metrics() -> None:
    page = metrics_table.PAGE.read_text()
    assert metrics_table.in_page(page) == metrics_table.table(), "`make golden` writes it anew"


def test_every_event_is_on_the_telemetry_page() -> None:
    from kvmem import events

    tags = {one.__struct_config__.tag for one in events.Event.__subclasses__()}
    page = metrics_table.PAGE.read_text().partition("## Events")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == tags


def test_every_field_of_a_quote_is_on_its_page() -> None:
    from kvmem.telemetry.quote import Quote

    page = reasons_table.PAGE.read_text()
    assert [name for name in Quote.__struct_fields__ if f"`{name}`" not in page] == []


def test_every_field_of_a_run_is_on_the_explainers_page() -> None:
    from kvmem.explain.misses.runs import Run

    page = reasons_table.PAGE.read_text()
    assert [name for name in Run.__struct_fields__ if f"`{name}`" not in page] == ["reason"]


def test_every_form_of_log_is_on_the_linters_page() -> None:
    page = rules_table.PAGE.read_text()
    listed = page.partition("## What it reads")[2].partition("\n\nThe first")[0]
    assert set(re.findall(r"^\| `([a-z][\w/-]+)` \|", listed, re.MULTILINE)) == set(FORMATS)


def test_every_invariant_cited_in_the_code_is_in_the_document() -> None:
    document = (ROOT / "docs" / "invariants.md").read_text()
    written = set(re.findall(r"^## (I\d+) ", document, re.MULTILINE))
    cited: set[str] = set()
    for folder in ("kvmem", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".h", ".cc", ".cu"}:
                cited.update(re.findall(r"\b(I\d{1,2})\b", path.read_text()))
    assert written == {f"I{n}" for n in range(1, 12)}
    assert cited - written == set()


def test_error_tree_of_the_docstring_is_the_tree_of_the_classes() -> None:
    tree = ast.parse((ROOT / "kvmem" / "errors.py").read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    drawn = re.findall(r"^[ │]*[├└]── (\w+)", ast.get_docstring(tree) or "", re.MULTILINE)
    assert {*drawn, "KVMemError"} == classes


def benchmark_keys() -> dict[str, set[str]]:
    """The keys that docs/benchmarks.md promises, by benchmark."""
    page = (ROOT / "docs" / "benchmarks.md").read_text().partition("## Keys")[2]
    parts = re.split(r"^\*\*(bench_\w+)\*\*", page.partition("## Soak")[0], flags=re.MULTILINE)
    promised = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) or [text]
        promised[name] = set(re.findall(r"`(\w+)`", " ".join(rows)))
    return promised


def soak_keys() -> set[str]:
    """The keys that docs/benchmarks.md promises of the soak."""
    page = (ROOT / "docs" / "benchmarks.md").read_text().partition("## Soak")[2]
    rows = re.findall(r"^\| (`.*?) \|", page.partition("## Two traps")[0], re.MULTILINE)
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


def newest_results() -> dict[str, dict[str, object]]:
    """The JSON of each program's first row in RESULTS.md, which has the newest first."""
    newest: dict[str, dict[str, object]] = {}
    for line in (ROOT / "benchmarks" / "RESULTS.md").read_text().splitlines():
        found = re.search(r"benchmarks\.(\w+).*\| `(\{.*\})` \|$", line)
        if found:
            newest.setdefault(found[1], json.loads(found[2]))
    return newest


def test_every_benchmark_is_on_the_page_with_its_keys() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    listed = set(re.findall(r"^\| `(bench_\w+)` \|", page, re.MULTILINE))
    assert listed == {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert listed == set(benchmark_keys())


@pytest.mark.parametrize("name", sorted(benchmark_keys()))
def test_a_benchmarks_newest_result_has_every_key_that_the_page_explains(name: str) -> None:
    assert benchmark_keys()[name] - set(newest_results()[name]) == set()


def test_the_soaks_newest_result_has_every_key_that_the_page_explains() -> None:
    assert "wrong" in soak_keys()
    assert soak_keys() - set(newest_results()["soak"]) == set()


def test_the_context_page_has_every_rule_of_the_probe() -> None:
    from kvmem.context.probe import RULES

    page = (ROOT / "docs" / "context.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == RULES
