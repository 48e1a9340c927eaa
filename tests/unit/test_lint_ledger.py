"""kvmem's own ledgers through the linter."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from kvmem.context import ChatRenderer, Drop, Ledger
from kvmem.explain.lint.lint import lint_file
from kvmem.explain.lint.readers import reader_of
from kvmem.explain.lint.values import Call, Fault
from tests.tiny_tokenizers import tokenizer

RENDERER = ChatRenderer.of(tokenizer())


def conversation() -> Ledger:
    one = Ledger.open(RENDERER, system="You are exact.", session_id="planner")
    for i in range(4):
        one.append({"role": "user", "content": f"question {i}"})
        sent = one.request()["prompt"]
        one.commit(
            {"prompt_token_ids": sent, "choices": [{"token_ids": RENDERER.encode("a<|e|>")}]}
        )
    return one


def test_a_ledger_is_read_call_by_call(tmp_path: Path) -> None:
    one = conversation()
    path = tmp_path / "planner.ledger"
    one.save(path)
    reader = reader_of(path)
    assert reader is not None
    assert reader.name == "ledger"
    calls = [call for call in reader.calls(path) if isinstance(call, Call)]
    assert len(calls) == 4
    for before, after in itertools.pairwise(calls):
        assert before.ids is not None
        assert after.ids is not None
        assert after.ids[: len(before.ids)] == before.ids
        assert after.known_ids == len(before.ids)
    assert calls[0].session == "planner"


def test_a_damaged_ledger_is_a_fault_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "planner.ledger"
    conversation().save(path)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    reader = reader_of(path)
    assert reader is not None
    (fault,) = reader.calls(path)
    assert isinstance(fault, Fault)
    assert "checksum differs" in str(fault)


def test_a_ledger_has_no_break_and_its_cached_tokens_are_predicted(tmp_path: Path) -> None:
    one = conversation()
    path = tmp_path / "planner.ledger"
    for ledger in (one, one.rewrite(Drop(1, 2))):
        ledger.save(path)
        report = lint_file(path, block_tokens=2, with_requests=True)
        assert (report.n_breaks, report.n_faults) == (0, 0)
        sampled = [span for span in ledger.spans if span.sampled]
        asked = [span.stop - span.sampled for span in sampled]
        assert [r.prompt for r in report.requests] == asked
        # All whole blocks of the last prompt and its answer, whose last token was never computed.
        told = [r.cached for r in report.requests[1:]]
        computed = [span.stop - 1 for span in sampled[:-1]]
        ideal = [min(a, b - 1) // 2 * 2 for a, b in zip(computed, asked[1:], strict=True)]
        assert told == ideal
        assert told != [n // 2 * 2 for n in asked[:-1]]
