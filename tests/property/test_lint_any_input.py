"""Whatever a file holds, the linter ends with a report: any JSON, damaged logs, bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmem.explain.lint import lint_file
from kvmem.explain.lint.fix import fix_file
from kvmem.explain.lint.flame import page
from kvmem.explain.lint.readers import FORMATS
from kvmem.explain.lint.sarif import sarif
from tests.logs import conversation, next_turn
from tests.unit.test_lint_readers import anthropic, claude_code, codex, sharegpt

KEYS = [
    "messages", "role", "content", "tool_calls", "function", "arguments", "name", "type", "text",
    "input", "model", "system", "tools", "instructions", "request", "response", "choices",
    "message", "uuid", "parentUuid", "sessionId", "payload", "conversations", "from", "value",
    "kvtrace", "kind", "id", "session", "base", "keep", "token_ids", "block_hashes", "metadata",
    "output", "session_id", "agent", "thinking", "summary", "num_turns", "replacement_history",
]  # fmt: skip
WORDS = [
    "user", "assistant", "system", "tool", "tool_use", "tool_result", "thinking", "message",
    "reasoning", "function_call", "function_call_output", "response_item", "session_meta",
    "compacted", "event_msg", "thread_rolled_back", "human", "gpt", "blocks", "text", "", "x",
]  # fmt: skip
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.floats(allow_nan=False), st.sampled_from(WORDS)
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=12,
)
LOGS: list[list[Any]] = [
    [conversation(), next_turn(conversation())],
    [anthropic(), anthropic()],
    claude_code(),
    codex(),
    [sharegpt(), sharegpt()],
    [
        {"kvtrace": 1, "kind": "messages"},
        {"id": 0, "session": "s", "messages": conversation()["messages"]},
        {"id": 1, "session": "s", "base": 0, "keep": 3, "messages": []},
    ],
]


def read(folder: Path, data: bytes, form: str | None) -> None:
    path = folder / "log"
    path.write_bytes(data)
    report = lint_file(path, form=form)
    json.dumps(sarif([report], "0.0.0"))
    page([report]).encode()
    fixed = folder / "fixed"
    fixed.unlink(missing_ok=True)
    fix_file(path, to=fixed, form=form)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@given(lines=st.lists(values, max_size=4), form=st.sampled_from([None, *FORMATS]))
def test_json_of_any_shape_is_reported_on(folder: Path, lines: list[Any], form: str | None) -> None:
    read(folder, "\n".join(map(json.dumps, lines)).encode(), form)


@given(log=st.sampled_from(LOGS), data=st.data())
def test_a_log_with_any_value_changed_is_reported_on(
    folder: Path, log: list[Any], data: st.DataObject
) -> None:
    changed = json.loads(json.dumps(log))
    place: Any = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(values)
            break
        place = place[key]
    read(folder, "\n".join(map(json.dumps, changed)).encode(), None)


@given(log=st.sampled_from(LOGS), data=st.data(), indent=st.sampled_from([None, 1]))
def test_a_log_with_any_bytes_changed_is_reported_on(
    folder: Path, log: list[Any], data: st.DataObject, indent: int | None
) -> None:
    text = json.dumps(log, indent=1) if indent else "\n".join(map(json.dumps, log))
    raw = bytearray(text.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    read(folder, bytes(raw), None)
