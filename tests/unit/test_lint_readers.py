"""Every form of log is read as the calls that it holds, tool calls and all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kvmem.errors import ConfigError
from kvmem.explain.lint import Call, lint_file
from kvmem.explain.lint.readers import FORMATS, reader_of
from tests.logs import Body, conversation, next_turn, write


def calls(path: Path) -> list[Call]:
    reader = reader_of(path)
    assert reader is not None
    found = list(reader.calls(path))
    assert all(isinstance(call, Call) for call in found), found
    return found  # type: ignore[return-value]


def roles(call: Call) -> list[str]:
    return [part.role for part in call.parts]


def test_chat_completions_keep_tools_and_tool_calls(tmp_path: Path) -> None:
    (call,) = calls(write(tmp_path / "log.jsonl", [conversation()]))
    assert roles(call)[:4] == ["system", "tools", "user", "assistant"]
    assert '"name": "search", "arguments": {"path": "src"' in call.parts[3].text
    assert "They may be many." in call.parts[3].thinking


@pytest.mark.parametrize("holder", ["request", "body", "kwargs", "input"])
def test_a_body_is_found_in_what_holds_it(holder: str, tmp_path: Path) -> None:
    record = {"timestamp": "2026-01-01", "session_id": 7, "model": "m", holder: conversation()}
    (call,) = calls(write(tmp_path / "log.jsonl", [record]))
    assert (call.session, len(call.parts)) == ("7", 9)


def test_responses_items_are_messages_calls_and_outputs(tmp_path: Path) -> None:
    body = {
        "model": "m",
        "instructions": "Be exact.",
        "tools": [{"type": "function", "name": "f"}],
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]},
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
            {"type": "function_call_output", "call_id": "c", "output": "42"},
        ],
    }
    (call,) = calls(write(tmp_path / "log.jsonl", [body]))
    assert roles(call) == ["system", "tools", "user", "assistant", "assistant", "tool"]
    assert [part.text for part in call.parts][-2:] == ['{"name": "f", "arguments": {}}', "42"]


def anthropic() -> Body:
    return {
        "model": "claude",
        "max_tokens": 10,
        "system": [{"type": "text", "text": "Be exact.", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "f", "input_schema": {}}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "x"},
                {"type": "text", "text": "I call f."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1",
                 "content": [{"type": "text", "text": "42"}]},
            ]},
        ],
    }  # fmt: skip


def test_anthropic_requests_keep_their_order_and_blocks(tmp_path: Path) -> None:
    (call,) = calls(write(tmp_path / "log.jsonl", [anthropic()]))
    assert roles(call) == ["tools", "system", "user", "assistant", "user"]
    assert (
        call.parts[3].text
        == '<think>\nHm\n</think>\nI call f.\n{"name": "f", "arguments": {"a":1}}'
    )
    assert call.parts[4].text == "42"


def test_a_moved_cache_breakpoint_is_no_break(tmp_path: Path) -> None:
    first, second = anthropic(), anthropic()
    second["messages"][-1]["content"][0]["cache_control"] = {"type": "ephemeral"}
    second["messages"] += [
        {"role": "assistant", "content": "42."},
        {"role": "user", "content": "?"},
    ]
    assert lint_file(write(tmp_path / "log.jsonl", [first, second])).n_breaks == 0


def entry(uuid: str, parent: str | None, role: str, content: Any, **more: Any) -> Body:
    message = {"role": role, "content": content}
    if role == "assistant":
        message |= {"id": f"msg_{more.pop('reply', uuid)}", "model": "claude"}
    return {"type": role, "uuid": uuid, "parentUuid": parent, "sessionId": "s", "message": message,
            "isSidechain": False, **more}  # fmt: skip


def claude_code() -> list[Body]:
    use = [{"type": "tool_use", "id": "t", "name": "Read", "input": {"path": "a"}}]
    result = [{"type": "tool_result", "tool_use_id": "t", "content": "contents of a"}]
    return [
        {"type": "summary", "summary": "About a ledger", "leafUuid": "7"},
        {"type": "file-history-snapshot", "messageId": "x", "snapshot": {}},
        entry("1", None, "user", "Read a"),
        entry("2", "1", "assistant", [{"type": "text", "text": "I read."}], reply="r"),
        entry("3", "2", "assistant", use, reply="r"),
        entry("4", "3", "user", result),
        entry("5", "4", "assistant", [{"type": "text", "text": "Done."}]),
        entry("6", "5", "user", "And b?"),
        entry("7", "6", "assistant", [{"type": "text", "text": "None."}]),
    ]


def test_claude_codes_replies_are_calls_however_many_lines_they_take(tmp_path: Path) -> None:
    found = calls(write(tmp_path / "t.jsonl", claude_code()))
    assert [call.line for call in found] == [4, 7, 9]
    assert [len(call.parts) for call in found] == [1, 4, 6]
    report = lint_file(tmp_path / "t.jsonl")
    assert (report.format, report.n_breaks) == ("claude-code", 0)


def test_claude_codes_compaction_is_seen(tmp_path: Path) -> None:
    entries = [
        *claude_code(),
        {"type": "system", "subtype": "compact_boundary", "uuid": "8", "parentUuid": None,
         "logicalParentUuid": "7", "sessionId": "s", "content": "Conversation compacted"},
        entry("9", "8", "user", "Summary: b.", isCompactSummary=True),
        entry("10", "9", "assistant", "On with it."),
    ]  # fmt: skip
    (found,) = lint_file(write(tmp_path / "t.jsonl", entries)).breaks
    assert (found.name, found.line, found.turn) == ("history-compacted", 12, 3)


def test_claude_codes_rewind_is_seen(tmp_path: Path) -> None:
    entries = [
        *claude_code(),
        entry("8", "5", "user", "Rather c."),
        entry("9", "8", "assistant", "As you like."),
    ]
    (found,) = lint_file(write(tmp_path / "t.jsonl", entries)).breaks
    assert (found.name, found.message, found.line) == ("history-edited", 5, 11)


def test_claude_codes_parallel_tools_cut_nothing(tmp_path: Path) -> None:
    def use(name: str) -> list[Body]:
        return [{"type": "tool_use", "id": name, "name": "Read", "input": {"path": name}}]

    def result(name: str) -> list[Body]:
        return [{"type": "tool_result", "tool_use_id": name, "content": f"contents of {name}"}]

    entries = [
        entry("1", None, "user", "Read a and b"),
        entry("2", "1", "assistant", use("a"), reply="r"),
        entry("3", "2", "assistant", use("b"), reply="r"),
        entry("4", "2", "user", result("a")),
        entry("5", "3", "user", result("b")),
        {"type": "progress", "uuid": "p", "parentUuid": None, "sessionId": "s"},
        entry("6", "4", "assistant", "Both are read."),
        entry("7", "6", "user", "Thanks."),
        entry("8", "7", "assistant", "Gladly."),
    ]
    found = calls(write(tmp_path / "t.jsonl", entries))
    assert [len(call.parts) for call in found] == [1, 5, 7]
    assert lint_file(tmp_path / "t.jsonl").n_breaks == 0


def test_a_reply_that_claude_code_made_up_is_no_call(tmp_path: Path) -> None:
    entries = [
        *claude_code(),
        entry("8", "7", "user", "More"),
        entry("9", "8", "assistant", "Error"),
    ]
    entries[-1]["message"]["model"] = "<synthetic>"
    assert len(calls(write(tmp_path / "t.jsonl", entries))) == 3


def test_claude_codes_sub_agents_have_prompts_of_their_own(tmp_path: Path) -> None:
    entries = [
        *claude_code()[:5],
        entry("a1", None, "user", "You look for b", isSidechain=True),
        entry("a2", "a1", "assistant", "I look.", isSidechain=True),
        *claude_code()[5:],
        entry("a3", "a2", "user", "Go on", isSidechain=True),
        entry("a4", "a3", "assistant", "Found.", isSidechain=True),
    ]
    found = calls(write(tmp_path / "t.jsonl", entries))
    assert [call.agent for call in found] == ["main", "sidechain-1", "main", "main", "sidechain-1"]
    assert lint_file(tmp_path / "t.jsonl").n_breaks == 0


def codex() -> list[Body]:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix a"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "name": "shell", "arguments": '{"cmd":"ls"}', "call_id": "c"},
        {"type": "function_call_output", "call_id": "c", "output": "a b"},
        {"type": "message", "role": "assistant",
         "content": [{"type": "output_text", "text": "Ok"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And b"}]},
        {"type": "message", "role": "assistant",
         "content": [{"type": "output_text", "text": "Ok"}]},
    ]  # fmt: skip
    meta = {"id": "thread", "instructions": "You are Codex."}
    return [
        {"timestamp": "t", "type": "session_meta", "payload": meta},
        {"timestamp": "t", "type": "turn_context", "payload": {"model": "m"}},
        *({"timestamp": "t", "type": "response_item", "payload": item} for item in items),
    ]


def test_codexs_calls_begin_where_the_model_answers(tmp_path: Path) -> None:
    found = calls(write(tmp_path / "rollout.jsonl", codex()))
    assert [(call.line, len(call.parts)) for call in found] == [(4, 2), (7, 5), (9, 7)]
    assert found[0].session == "thread"
    report = lint_file(tmp_path / "rollout.jsonl")
    assert (report.format, report.n_breaks) == ("codex", 0)


def test_codexs_old_rollouts_hold_the_items_bare(tmp_path: Path) -> None:
    lines = [{"id": "old", "timestamp": "t", "instructions": None}]
    lines += [line["payload"] for line in codex()[2:]]
    assert len(calls(write(tmp_path / "rollout.jsonl", lines))) == 3


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        ({"type": "compacted", "payload": {"message": "Summary: b."}}, "history-compacted"),
        (
            {"type": "event_msg", "payload": {"type": "thread_rolled_back", "num_turns": 1}},
            "turn-undone",
        ),
    ],
)
def test_codexs_compaction_and_rollback_are_seen(payload: Body, name: str, tmp_path: Path) -> None:
    answer = {"type": "message", "role": "assistant", "content": "Ok"}
    lines = [*codex(), {"timestamp": "t", **payload}, {"type": "response_item", "payload": answer}]
    (found,) = lint_file(write(tmp_path / "rollout.jsonl", lines)).breaks
    assert (found.name, found.line) == (name, 11)


def sharegpt() -> Body:
    return {"id": "c", "system": "Be exact.", "tools": '[{"name": "f"}]', "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f"}'},
        {"from": "observation", "value": "42"}, {"from": "gpt", "value": "It is 42."},
    ]}  # fmt: skip


@pytest.mark.parametrize("form", ["lines", "array", "indented"])
def test_sharegpt_is_read_as_lines_or_as_one_array(form: str, tmp_path: Path) -> None:
    records = [sharegpt(), sharegpt()]
    texts = {
        "lines": "\n".join(map(json.dumps, records)),
        "array": json.dumps(records),
        "indented": json.dumps(records, indent=2),
    }
    path = tmp_path / "data.json"
    path.write_text(texts[form])
    found = calls(path)
    assert [roles(call) for call in found[:2]] == [
        ["system", "tools", "user"],
        ["system", "tools", "user", "assistant", "tool"],
    ]
    assert len({call.session for call in found}) == 2
    assert lint_file(path).n_breaks == 0


def test_a_request_over_several_lines_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(
        json.dumps(conversation(), indent=2) + "\n" + json.dumps(conversation(), indent=2)
    )
    found = calls(path)
    assert [len(call.parts) for call in found] == [9, 9]
    assert found[1].line == json.dumps(conversation(), indent=2).count("\n") + 2


def test_a_trace_of_messages_is_put_together_from_what_it_builds_on(tmp_path: Path) -> None:
    rows = [
        {"kvtrace": 1, "kind": "messages", "order": "by_session"},
        {"id": 0, "session": "s", "messages": conversation()["messages"]},
        {
            "id": 1,
            "session": "s",
            "base": 0,
            "keep": 2,
            "messages": [{"role": "user", "content": "?"}],
        },
    ]
    found = calls(write(tmp_path / "t.jsonl", rows))
    assert [len(call.parts) for call in found] == [8, 3]
    assert found[1].parts[:2] == found[0].parts[:2]


def test_a_trace_of_text_is_one_span_a_call(tmp_path: Path) -> None:
    rows = [
        {"kvtrace": 1, "kind": "text"},
        {"id": 0, "session": "s", "text": "one two three"},
        {"id": 1, "session": "s", "base": 0, "keep": 13, "text": " four"},
        {"id": 2, "session": "s", "base": 1, "keep": 7, "text": " five six"},
    ]
    (found,) = lint_file(write(tmp_path / "t.jsonl", rows)).breaks
    assert (found.at, found.line, found.name) == (8, 4, "history-edited")


def test_gzip_is_seen_by_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    body = conversation()
    path.write_bytes(
        gzip.compress((json.dumps(body) + "\n" + json.dumps(next_turn(body))).encode())
    )
    assert lint_file(path).n_calls == 2


@pytest.mark.parametrize("form", FORMATS)
def test_a_form_can_be_named(form: str, tmp_path: Path) -> None:
    reader = reader_of(write(tmp_path / "log", [{}]), form)
    assert reader is not None
    assert reader.name == form


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give one of ledger, kvtrace/1, mooncake, sharegpt"):
        reader_of(tmp_path / "log", "yaml")
