"""Each rule of the linter is broken once on purpose, and is then the only one seen."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmem.explain.lint import RULES, lint_file
from kvmem.explain.lint.volatile import volatile
from tests.logs import SYSTEM, Body, conversation, linted, next_turn, tool, write

Edit = Callable[[Body], None]


def system(old: str, new: str) -> Edit:
    def edit(body: Body) -> None:
        assert old in body["messages"][0]["content"]
        body["messages"][0]["content"] = body["messages"][0]["content"].replace(old, new)

    return edit


def message(index: int, **fields: Any) -> Edit:
    return lambda body: body["messages"][index].update(fields)


def reorder_tools(body: Body) -> None:
    body["tools"].reverse()


def compact(body: Body) -> None:
    body["messages"][1:-1] = [{"role": "user", "content": "Summary: the ledger is found."}]


def reserialise(body: Body) -> None:
    function = body["messages"][2]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(json.loads(function["arguments"]), separators=(",", ":"))


# The rule, what is done to the second request, and which message then differs first (None: tools).
EDITS: dict[str, tuple[Edit, int | None]] = {
    "volatile-time": (system("10:00:00", "10:00:31"), 0),
    "volatile-id": (lambda body: None, 0),  # below, where both requests have an id
    "volatile-counter": (system("Session 41", "Session 42"), 0),
    "volatile-path": (lambda body: None, 0),
    "system-changed": (system("planner of", "reviewer of"), 0),
    "model-changed": (lambda body: body.update(model="planner-2"), 0),
    "tools-reordered": (reorder_tools, None),
    "tools-changed": (lambda body: body["tools"].append(tool("delete")), None),
    "json-reserialised": (reserialise, 2),
    "history-edited": (message(4, content="There are three: a, b and c."), 4),
    "thinking-stripped": (lambda body: body["messages"][2].pop("reasoning_content"), 2),
    "whitespace-changed": (message(5, content="Read the first one and  tell me what it says."), 5),
    "history-truncated": (lambda body: body["messages"].__delitem__(slice(1, 4)), 1),
    "history-compacted": (compact, 1),
    "tool-result-cleared": (message(3, content="[cleared]"), 3),
    "message-removed": (lambda body: body["messages"].__delitem__(slice(4, 6)), 4),
    "message-inserted": (
        lambda body: body["messages"].insert(4, {"role": "user", "content": "Be quick."}), 4
    ),
    "messages-reordered": (
        lambda body: body["messages"].__setitem__(slice(4, 6), body["messages"][4:6][::-1]), 4
    ),
    "turn-undone": (lambda body: body["messages"].__delitem__(slice(6, None)), 6),
}  # fmt: skip

PAIRS = {
    "volatile-id": (
        "run 7c9e6679-7425-40de-944b-e07fc1f90ae7", "run 16fd2706-8baf-433b-82da-8c7fada847da"
    ),
    "volatile-path": ("work in /tmp/tmpab12/x", "work in /tmp/tmpcd3456/x"),
    "volatile-time": ("today is May 5, 2026", "today is May 16, 2026"),
    "volatile-counter": ("9 steps left", "10 steps left"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name in EDITS if name not in ("volatile-id", "volatile-path")]
)
def test_a_rule_broken_on_purpose_is_the_one_that_is_seen(name: str, tmp_path: Path) -> None:
    edit, at = EDITS[name]
    first = conversation()
    second = next_turn(first) if name != "turn-undone" else copy.deepcopy(first)
    edit(second)
    (found,) = linted(tmp_path, first, second).breaks
    assert (found.name, found.turn, found.line) == (name, 1, 2)
    assert found.message == at
    assert found.fix


@pytest.mark.parametrize("name", PAIRS)
def test_what_changes_by_itself_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    before, now = PAIRS[name]
    first = conversation()
    first["messages"][0]["content"] = f"{SYSTEM} {before}. Be exact."
    second = next_turn(first)
    second["messages"][0]["content"] = f"{SYSTEM} {now}. Be exact."
    (found,) = linted(tmp_path, first, second).breaks
    assert (found.name, found.message) == (name, 0)


def test_a_conversation_that_only_grows_is_clean(tmp_path: Path) -> None:
    bodies = [conversation()]
    for _ in range(4):
        bodies.append(next_turn(bodies[-1]))
    report = linted(tmp_path, *bodies)
    assert (report.n_calls, report.n_breaks, report.n_faults) == (5, 0, 0)


def test_the_same_request_again_is_clean(tmp_path: Path) -> None:
    report = linted(tmp_path, conversation(), conversation())
    assert report.n_breaks == 0
    assert report.cached == report.prompt // 2


def test_a_reply_that_comes_back_changed_is_seen(tmp_path: Path) -> None:
    first = conversation()
    second = next_turn(first)
    reply = {"role": "assistant", "content": "The answer is in none of the files."}
    records = [
        {"session_id": "s", "request": first, "response": {"choices": [{"message": reply}]}},
        {"session_id": "s", "request": second},
    ]
    (found,) = lint_file(write(tmp_path / "log.jsonl", records)).breaks
    assert (found.name, found.message) == ("reply-rewritten", 8)


def test_a_reply_whose_thinking_is_stripped_is_seen(tmp_path: Path) -> None:
    first = conversation()
    second = next_turn(first)
    reply = {**second["messages"][8], "reasoning_content": "Where was it?"}
    records = [
        {"session_id": "s", "request": first, "response": {"choices": [{"message": reply}]}},
        {"session_id": "s", "request": second},
    ]
    (found,) = lint_file(write(tmp_path / "log.jsonl", records)).breaks
    assert found.name == "thinking-stripped"


def test_a_reply_that_comes_back_as_it_was_is_clean(tmp_path: Path) -> None:
    first = conversation()
    second = next_turn(first)
    response = {"choices": [{"message": {**second["messages"][8], "refusal": None}}]}
    records = [
        {"session_id": "s", "request": first, "response": response},
        {"session_id": "s", "request": second},
    ]
    assert lint_file(write(tmp_path / "log.jsonl", records)).breaks == ()


IDS = {
    "ids-rewound": ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5]),
    "ids-compacted": ([1, 2, 3, 4, 5, 6, 7, 8], [1, 12, 13, 14]),
    "ids-edited": ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 15, 16, 17, 18, 19]),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("kind", ["blocks", "token_ids"])
def test_a_rule_of_ids_is_seen(name: str, kind: str, tmp_path: Path) -> None:
    field = {"blocks": "block_hashes", "token_ids": "token_ids"}[kind]
    header = {"kvtrace": 1, "kind": kind, "block_size": 64, "hash_scope": "session"}
    rows = [
        {"id": i, "session": "s", "base": None, "keep": 0, field: ids}
        for i, ids in enumerate(IDS[name])
    ]
    (found,) = lint_file(write(tmp_path / "trace.jsonl", [header, *rows])).breaks
    kept = (
        next(i for i, ids in enumerate(zip(*IDS[name], strict=False)) if ids[0] != ids[1])
        if (name != "ids-rewound")
        else 5
    )
    assert (found.name, found.line) == (name, 3)
    assert found.at == kept * (64 if kind == "blocks" else 1)


def test_the_last_block_of_hashes_may_differ(tmp_path: Path) -> None:
    header = {"kvtrace": 1, "kind": "blocks", "block_size": 64}
    rows = [
        {"id": 0, "session": "s", "base": None, "keep": 0, "block_hashes": [1, 2, 3]},
        {"id": 1, "session": "s", "base": 0, "keep": 2, "block_hashes": [13, 14]},
    ]
    assert lint_file(write(tmp_path / "trace.jsonl", [header, *rows])).n_breaks == 0


def test_every_rule_has_a_test_that_breaks_it() -> None:
    assert {rule.name for rule in RULES} == {*EDITS, *IDS, "reply-rewritten"}
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_tokens_lost_are_what_was_sent_and_is_not_found(tmp_path: Path) -> None:
    first = conversation()
    second = next_turn(first)
    system("planner of", "reviewer of")(second)
    report = linted(tmp_path, first, second)
    (found,) = report.breaks
    sent = sum(report.prefill[i].new for i in range(len(report.prefill)))
    again = sum(row.again for row in report.prefill)
    assert found.at == SYSTEM.index("planner")
    assert found.lost_tokens == -(-again // 4)
    assert sent + again == report.prompt - report.cached


def test_a_session_that_no_field_names_is_seen_by_its_messages(tmp_path: Path) -> None:
    first = conversation()
    second = next_turn(first)
    system("10:00:00", "10:00:31")(second)
    other = {"model": "m", "messages": [{"role": "user", "content": "Something else."}]}
    report = lint_file(write(tmp_path / "log.jsonl", [first, other, second]))
    assert [found.name for found in report.breaks] == ["volatile-time"]
    assert report.n_sessions == 2


@pytest.mark.parametrize(
    ("before", "now"),
    [("It is 10:00.", "It was 11:00."), ("call a", "call b"), ("x 1 y", "x 1 y z 2")],
)
def test_text_that_changed_otherwise_too_is_not_volatile(before: str, now: str) -> None:
    assert volatile(before, now) is None
