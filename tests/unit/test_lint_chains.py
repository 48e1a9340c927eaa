"""Which earlier prompt a call is compared with, and how many are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvmem.explain.lint import Call, Characters, Linter, lint_file
from kvmem.explain.lint import chains as chains_module
from kvmem.explain.lint.readers import kvtrace
from kvmem.explain.lint.readers.parts import message_part
from tests.logs import Body, conversation, next_turn, write


def title(text: str) -> Body:
    system = {"role": "system", "content": "You write titles of three words."}
    return {"model": "small", "messages": [system, {"role": "user", "content": text}]}


def agents(path: Path) -> list[tuple[str, str, int]]:
    report = lint_file(path, with_requests=True)
    assert report.n_breaks == 0
    return [(request.session, request.agent, request.turn) for request in report.requests]


def test_agents_that_no_field_names_are_told_apart_within_a_session(tmp_path: Path) -> None:
    first = conversation()
    bodies = [first, title("a"), next_turn(first), next_turn(next_turn(first))]
    records = [{"session_id": "s", "request": body} for body in bodies]
    main = [("s", "main", n) for n in range(3)]
    assert agents(write(tmp_path / "log.jsonl", records)) == [
        main[0],
        ("s", "agent-2", 0),
        *main[1:],
    ]


def test_agents_that_are_named_are_told_apart_by_name(tmp_path: Path) -> None:
    first = conversation()
    records = [
        {"session_id": "s", "agent": "a", "request": first},
        {"session_id": "s", "agent": "b", "request": conversation()},
        {"session_id": "s", "agent": "a", "request": next_turn(first)},
    ]
    found = agents(write(tmp_path / "log.jsonl", records))
    assert found == [("s", "a", 0), ("s", "b", 0), ("s", "a", 1)]


def test_a_full_compaction_in_a_named_session_is_a_break(tmp_path: Path) -> None:
    first = conversation()
    second = conversation()
    second["messages"][1:] = [{"role": "user", "content": "Summary: on with the ledger."}]
    records = [{"session_id": "s", "request": body} for body in (first, second)]
    (found,) = lint_file(write(tmp_path / "log.jsonl", records)).breaks
    assert (found.name, found.message) == ("history-compacted", 1)


@pytest.mark.parametrize(
    "named",
    [
        {"prompt_cache_key": "s"},
        {"metadata": {"session_id": "s"}},
        {"metadata": {"user_id": "user_1_account_2_session_s"}},
    ],
)
def test_a_body_names_its_session(named: Body, tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", [{**conversation(), **named}])
    assert agents(path) == [("s", "main", 0)]


def call(session: str, *texts: str) -> Call:
    messages: list[Any] = [{"role": "user", "content": text} for text in texts]
    return Call(1, session, "main", parts=[message_part(m, i) for i, m in enumerate(messages)])


def test_the_chain_that_was_used_least_lately_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains_module, "MOST_CHAINS", 2)
    linter = Linter("log", Characters())
    for session in ("a", "b", "a", "c"):
        linter.call(call(session, "x"))
    assert linter.call(call("a", "y")).turn == 2
    assert linter.call(call("b", "y")).turn == 0  # forgotten, so that nothing is said of it


def test_chains_are_closed_when_they_hold_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains_module, "MOST_HELD", 1_000)
    linter = Linter("log", Characters())
    for session in ("a", "b", "c"):
        linter.call(call(session, "x" * 400))
    assert [linter.call(call(s, "y")).turn for s in ("c", "b", "a")] == [1, 1, 0]


def test_a_trace_keeps_no_more_prompts_than_it_may(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kvtrace, "MOST_KEPT", 10)
    rows = [
        {"kvtrace": 1, "kind": "token_ids"},
        *({"id": i, "session": "s", "token_ids": [i] * 6} for i in range(2)),
        {"id": 2, "session": "s", "base": 0, "keep": 6, "token_ids": [7]},
        {"id": 3, "session": "s", "base": 1, "keep": 6, "token_ids": [7]},
    ]
    (fault,) = lint_file(write(tmp_path / "t.jsonl", rows)).faults
    assert (fault.line, "builds on call 0" in fault.reason) == (4, True)
