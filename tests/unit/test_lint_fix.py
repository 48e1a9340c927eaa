"""--fix puts back what says the same to a model, in a new file, and leaves the rest."""

from __future__ import annotations

import copy
import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kvmem.errors import ConfigError
from kvmem.explain.lint import fix, lint_file
from kvmem.explain.lint.fix import fix_file, fixed_name
from kvmem.explain.lint.rules import RULES
from tests.logs import Body, conversation, next_turn, write
from tests.unit.test_lint_readers import anthropic
from tests.unit.test_lint_rules import EDITS

SAFE = [rule.name for rule in RULES if rule.fixable]


def trim(body: Body) -> None:
    body["messages"][5]["content"] += " \n"


def broken(name: str) -> tuple[Body, Body]:
    first = conversation()
    second = next_turn(first)
    edit = trim if name == "whitespace-changed" else EDITS[name][0]
    edit(second)
    return first, second


@pytest.mark.parametrize("name", SAFE)
def test_a_safe_rule_is_put_right(name: str, tmp_path: Path) -> None:
    first, second = broken(name)
    path = write(tmp_path / "log.jsonl", [first, second, next_turn(second)])
    (found,) = lint_file(path).breaks
    assert (found.name, found.fixable) == (name, True)
    fixed = fix_file(path)
    assert fixed is not None
    # The third request extended the second as it was, so both are changed.
    assert (fixed.n_changed, fixed.report.n_breaks) == (2, 0)
    again = lint_file(Path(fixed.path))
    assert (again.n_breaks, again.n_calls) == (0, 3)
    lines = Path(fixed.path).read_text().splitlines()
    assert json.loads(lines[1]) == next_turn(first)


@pytest.mark.parametrize("name", sorted({*EDITS} - {*SAFE, "volatile-id", "volatile-path"}))
def test_what_needs_a_decision_stays(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", list(broken(name)))
    fixed = fix_file(path)
    assert fixed is not None
    assert fixed.n_changed == 0
    assert Path(fixed.path).read_bytes() == path.read_bytes()


def test_blanks_within_a_line_are_left_alone(tmp_path: Path) -> None:
    first = conversation()
    second = next_turn(first)
    EDITS["whitespace-changed"][0](second)
    path = write(tmp_path / "log.jsonl", [first, second])
    (found,) = lint_file(path).breaks
    assert (found.name, found.fixable) == ("whitespace-changed", False)
    fixed = fix_file(path)
    assert fixed is not None
    assert fixed.n_changed == 0


def test_the_log_stays_and_the_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", list(broken("tools-reordered")))
    before = path.read_bytes()
    fixed = fix_file(path)
    assert fixed is not None
    assert path.read_bytes() == before
    assert Path(fixed.path) == tmp_path / "log.fixed.jsonl"
    assert Path(fixed.path).stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", list(broken("tools-reordered")))
    fixed_name(path).write_text("mine")
    for to in (None, path):
        with pytest.raises(ConfigError, match="is there already"):
            fix_file(path, to=to)
    assert fixed_name(path).read_text() == "mine"


def test_a_copy_that_cannot_be_finished_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "log.jsonl", list(broken("tools-reordered")))

    def full(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fix._Copier, "_write", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        fix_file(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_of_another_form_is_left_alone(tmp_path: Path) -> None:
    rows: list[Any] = [{"kvtrace": 1, "kind": "text"}, {"id": 0, "session": "s", "text": "a"}]
    path = write(tmp_path / "t.jsonl", rows)
    assert fix_file(path) is None
    assert list(tmp_path.iterdir()) == [path]


def test_compressed_logs_stay_compressed_and_unread_lines_stay(tmp_path: Path) -> None:
    first, second = broken("tools-reordered")
    lines = [json.dumps(first), "not JSON", json.dumps(second), '{"level": "info"}']
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    fixed = fix_file(path)
    assert fixed is not None
    assert fixed.path.endswith("log.fixed.jsonl.gz")
    written = gzip.decompress(Path(fixed.path).read_bytes()).decode().splitlines()
    assert written[:2] == lines[:2]
    assert json.loads(written[2]) == next_turn(first)
    assert written[3] == lines[3]


def test_a_message_whose_calls_have_other_ids_is_left_alone(tmp_path: Path) -> None:
    first, second = broken("json-reserialised")
    second["messages"][2]["tool_calls"][0]["id"] = "call_other"
    fixed = fix_file(write(tmp_path / "log.jsonl", [first, second]))
    assert fixed is not None
    assert fixed.n_changed == 0


def test_anthropics_breakpoint_stays_where_it_was_put(tmp_path: Path) -> None:
    first = anthropic()
    second = copy.deepcopy(first)
    mark = {"type": "ephemeral"}
    first["messages"][2]["content"][0]["cache_control"] = mark
    second["messages"][1]["content"][2]["input"] = {"b": 2, "a": 1}
    first["messages"][1]["content"][2]["input"] = {"a": 1, "b": 2}
    second["messages"][2]["content"][0]["content"][0]["text"] = "42 "
    fixed = fix_file(write(tmp_path / "log.jsonl", [first, second]))
    assert fixed is not None
    assert (fixed.n_changed, fixed.report.n_breaks) == (1, 0)
    line = Path(fixed.path).read_text().splitlines()[1]
    assert line.count("cache_control") == 1  # the system prompt's, as in the second request
    assert list(json.loads(line)["messages"][1]["content"][2]["input"]) == ["a", "b"]
