"""Bad input is named by file and line, and the rest is read."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmem.errors import ConfigError
from kvmem.explain.lint import FileReport, lint_file
from kvmem.explain.lint.lines import Record, records
from kvmem.explain.lint.readers import reader_of
from tests.logs import conversation, next_turn, write

ROOT = Path(__file__).resolve().parents[2]
GOOD = json.dumps(conversation()).encode()
NEXT = json.dumps(next_turn(conversation())).encode()
WRONG_ROLE = json.dumps({"model": "m", "messages": [{"role": "wizard", "content": "Hm"}]}).encode()

BAD = {
    "cut": (GOOD[:200], "a cut line: the JSON ends too early"),
    "binary": (bytes(range(9)) + b"\xff\xfe\x00\x80", "not UTF-8 text"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8 text"),
    "no JSON": (b"INFO server started", "not the JSON expected"),
    "no object": (b"[1, 2]", "not the JSON expected"),
    "no request": (b'{"level": "info"}', "no request in this record"),
    "wrong role": (WRONG_ROLE, "message 0 has the role 'wizard'"),
    "messages": (b'{"model": "m", "messages": 7}', "messages is no list"),
    "message": (b'{"model": "m", "messages": [7]}', "message 0 is no JSON object"),
    "content": (b'{"messages": [{"role": "user", "content": 7}]}', "message 0 has a content"),
    "block": (b'{"messages": [{"role": "user", "content": [7]}]}', "content block"),
    "calls": (b'{"messages": [{"role": "user", "tool_calls": 7}]}', "tool_calls"),
    "tools": (b'{"messages": [], "tools": 7}', "tools is no list"),
    "input": (b'{"model": "m", "input": 7}', "input is neither text nor list"),
    "item": (b'{"model": "m", "input": [7]}', "item 0 is no JSON object"),
    "deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
}  # fmt: skip


def check(report: FileReport, line: int, reason: str, n_calls: int) -> None:
    (fault,) = report.faults
    assert (fault.line, report.n_faults, report.n_calls) == (line, 1, n_calls)
    assert reason in fault.reason
    assert str(fault).startswith(f"{report.path}:{line}: ")
    assert fault.next_step.endswith(".")


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_line_is_named_and_the_rest_is_read(kind: str, first: bool, tmp_path: Path) -> None:
    bad, reason = BAD[kind]
    lines = [bad, GOOD, NEXT] if first else [GOOD, bad, NEXT]
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join(lines))
    if first and bad.startswith(b"["):
        return  # a file that begins so is an array
    check(lint_file(path), 1 if first else 2, reason, n_calls=2)


TRACE: list[tuple[dict[str, Any], str]] = [
    ({"id": 1, "session": "s", "base": 9, "keep": 1, "messages": []}, "builds on call 9"),
    ({"id": 1, "session": "s", "base": 0, "keep": 99, "messages": []}, "keeps 99 of 8"),
    ({"id": 1, "session": "s", "base": 0, "keep": 1}, "has no messages"),
    ({"id": "x", "session": "s"}, "not the JSON expected"),
    ({"id": 1, "session": "s", "messages": [{"role": "wizard"}]}, "the role 'wizard'"),
]


@pytest.mark.parametrize(("row", "reason"), TRACE)
def test_a_bad_row_of_a_trace_is_named(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rows = [
        {"kvtrace": 1, "kind": "messages"},
        {"id": 0, "session": "s", "messages": conversation()["messages"]},
        row,
        {"id": 2, "session": "s", "base": 0, "keep": 8, "messages": []},
    ]
    check(lint_file(write(tmp_path / "t.jsonl", rows)), 3, reason, n_calls=2)


@pytest.mark.parametrize("ids", [[-1], [1 << 31], [1.5], ["1"], 7])
def test_ids_that_no_tokenizer_has_are_named(ids: Any, tmp_path: Path) -> None:
    rows = [
        {"kvtrace": 1, "kind": "token_ids"},
        {"id": 0, "session": "s", "token_ids": [1, 2]},
        {"id": 1, "session": "s", "token_ids": ids},
        {"id": 2, "session": "s", "base": 0, "keep": 2, "token_ids": [3]},
    ]
    check(lint_file(write(tmp_path / "t.jsonl", rows)), 3, "not the JSON expected", n_calls=2)


def test_a_trace_whose_blocks_have_no_size_is_refused(tmp_path: Path) -> None:
    rows: list[Any] = [{"kvtrace": 1, "kind": "blocks", "block_size": 0}]
    check(lint_file(write(tmp_path / "t.jsonl", rows)), 1, "block_size", n_calls=0)


def test_half_of_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    half = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    path.write_bytes(b"\n".join([GOOD, half, NEXT]))
    report = lint_file(path)
    assert (report.n_calls, [fault.line for fault in report.faults]) == (2, [2])


@pytest.mark.parametrize("turn", [{"from": "wizard", "value": "Hm"}, 7])
def test_a_bad_turn_of_sharegpt_is_named(turn: Any, tmp_path: Path) -> None:
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    report = lint_file(write(tmp_path / "d.jsonl", [good, {"conversations": [turn]}, good]))
    check(report, 2, "turn 0", n_calls=2)


def test_an_array_that_is_cut_is_read_up_to_there(tmp_path: Path) -> None:
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good, good, good], indent=1)[:-30])
    report = lint_file(path)
    check(report, report.faults[0].line, "a cut value", n_calls=2)


def test_damaged_gzip_is_read_up_to_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n" + os.urandom(40_000).hex().encode())[:-20_000])
    report = lint_file(path)
    assert (report.n_calls, report.faults[-1].reason[:12]) == (1, "damaged gzip")


@pytest.mark.parametrize("content", [b"", b"\n\n", bytes(5_000), b"[]", b"{}"])
def test_a_file_of_no_known_form_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    (fault,) = lint_file(path).faults
    assert "no record of a known form" in fault.reason


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Name a file that exists"):
        reader_of(tmp_path / "gone")


def test_a_record_that_is_too_long_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 3_000_000 + b'"}\n{"c": 2}\n')
    found = list(records(path, most_bytes=1 << 20))
    assert [r.line for r in found] == [1, 2, 3]
    assert [isinstance(r, Record) for r in found] == [True, False, True]


def test_a_value_that_is_too_long_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'[{"a": 1},\n{"b": "' + b"x" * 3_000_000 + b'"},\n{"c": "]}\\""}]')
    found = list(records(path, most_bytes=1 << 20))
    assert [r.line for r in found] == [1, 2, 3]
    assert isinstance(found[2], Record)
    assert found[2].data == b'{"c": "]}\\""}'


# VmHWM is of this process alone; ru_maxrss begins at what the process that started it had.
PROBE = """
import re, sys
from pathlib import Path
from kvmem.explain.lint import lint_file
report = lint_file(Path(sys.argv[1]))
print(report.n_calls, report.n_faults, report.faults[0].line, report.faults[0].reason)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_one_line_of_200_megabytes_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with path.open("wb") as out:
        out.write(GOOD + b"\n")
        for _ in range(200):
            out.write(b"x" * (1 << 20))
        out.write(b"\n" + NEXT + b"\n")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    said, peak_kib = done.stdout.splitlines()
    assert said == "2 1 2 one record of more than 64 MiB"
    assert int(peak_kib) < 300 << 10
