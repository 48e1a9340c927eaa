"""Stubs for large results, recitals, wordings and Anthropic's marks."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import TypeAdapter

from kvmem.context.offload import BlobStore
from kvmem.context.tail import Recital, anthropic_breakpoints, openai_breakpoints, vary
from kvmem.errors import CapacityError, ConfigError, CorruptBlock


def test_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    for content in (b"", b"\x00\xff\xfe", "größe 🙂\n".encode(), b"x" * 1_000_000):
        stub = store.put(content)
        assert store.get(stub.uri) == content
        assert stub.n_bytes == len(content)
        assert store.put(content) == stub
    files = list((tmp_path / "blobs").iterdir())
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "blobs").stat().st_mode) == 0o700


def test_a_stub_is_the_same_text_for_the_same_bytes_and_short(tmp_path: Path) -> None:
    one, other = BlobStore(tmp_path / "a"), BlobStore(tmp_path / "b")
    content = "line of a log\n" * 10_000
    assert one.put(content).text == other.put(content).text
    assert len(one.put(content).text) < 700
    assert one.put(content).uri in one.put(content).text


def test_only_large_messages_become_stubs(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    small = {"role": "tool", "content": "ok"}
    assert store.message(small) is small
    large = {"role": "tool", "tool_call_id": "1", "content": "y" * 9000}
    stubbed = store.message(large)
    assert stubbed["tool_call_id"] == "1"
    uri = str(stubbed["content"]).split(" as ")[1].split(";")[0]
    assert store.get(uri) == b"y" * 9000


def test_a_damaged_or_unknown_blob_is_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    stub = store.put(b"abc")
    (tmp_path / stub.uri.rpartition("/")[2]).write_bytes(b"abd")
    with pytest.raises(CorruptBlock):
        store.get(stub.uri)
    with pytest.raises(ConfigError, match="Nothing is kept"):
        store.get("kvmem:blob/" + "0" * 64)
    for uri in ("kvmem:blob/../../etc/passwd", "file:///etc/passwd", "kvmem:blob/abc"):
        with pytest.raises(ConfigError, match="is no blob"):
            store.get(uri)


def test_a_plan_is_said_again_only_when_it_changed_and_within_its_budget() -> None:
    recital = Recital(budget_chars=25)
    assert recital.next("1. look") == "1. look"
    assert recital.next("1. look") is None
    assert recital.next("1. done 2. go") == "1. done 2. go"
    with pytest.raises(CapacityError, match="has 5 characters left"):
        recital.next("1. look")


def test_a_wording_is_the_same_for_a_seed_and_turn() -> None:
    choices = ["a", "b", "c", "d"]
    drawn = [vary(choices, seed="s", turn=i) for i in range(40)]
    assert drawn == [vary(choices, seed="s", turn=i) for i in range(40)]
    assert set(drawn) == set(choices)


def marks(messages: list[dict[str, object]]) -> list[int]:
    return [
        i for i, m in enumerate(messages)
        if any("cache_control" in block for block in m["content"])  # type: ignore[attr-defined]
    ]  # fmt: skip


def test_marks_are_at_most_four_and_the_latest() -> None:
    messages = [{"role": "user", "content": f"m{i}"} for i in range(9)]
    assert marks(anthropic_breakpoints(messages)) == [7, 8]
    assert marks(anthropic_breakpoints(messages, stable=[0, 3])) == [0, 3, 7, 8]
    assert marks(anthropic_breakpoints(messages, stable=[0, 1, 2, 3])) == [2, 3, 7, 8]
    assert marks(anthropic_breakpoints(messages[:1])) == [0]
    assert anthropic_breakpoints([]) == []
    told = anthropic_breakpoints([{"role": "user", "content": [{"type": "text", "text": "x"}]}])
    assert told[0]["content"] == [
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    ]
    assert messages[8]["content"] == "m8"


def test_openais_marks_are_at_most_three_and_on_nothing_the_model_said() -> None:
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    messages = [{"role": r, "content": f"m{i}", "tool_call_id": "c"} for i, r in enumerate(roles)]
    for stable, wanted in (([], [3, 5]), ([0], [0, 3, 5]), ([0, 2], [1, 3, 5]), ([-3, 99], [3, 5])):
        told = openai_breakpoints(messages, stable=stable)
        assert [i for i, m in enumerate(told) if isinstance(m["content"], list)] == wanted
        checked = TypeAdapter(list[ChatCompletionMessageParam]).validate_python(told, strict=False)
        assert len(checked) == len(told)
        for i in wanted:
            mark = {"prompt_cache_breakpoint": {"mode": "explicit"}}
            assert told[i]["content"] == [{"type": "text", "text": f"m{i}", **mark}]
        assert [told[i] for i in range(7) if i not in wanted] == [
            messages[i] for i in range(7) if i not in wanted
        ]
    assert openai_breakpoints([]) == []
    assert openai_breakpoints([{"role": "assistant", "content": "x"}], stable=[0]) == [
        {"role": "assistant", "content": "x"}
    ]
