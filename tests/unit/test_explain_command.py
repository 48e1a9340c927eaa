"""`kvmem explain`, and what a ledger sends along for it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from kvmem.cli import explaining, live, switching
from kvmem.explain.misses.explainer import Explained
from kvmem.explain.misses.runs import Run
from kvmem.explain.misses.sums import Cause

ONE = Explained(
    "cmpl-1-0-ab", "planner", 2787, 1.0,
    (
        Run("system_changed", 16, 2672, ms=870.1, token=21, role="system", rule="volatile-time"),
        Run("evicted", 2688, 64, tier="host", policy="lru", at_s=1.0, for_request="cmpl-2"),
        Run("block_floor", 2752, 35),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    causes = tuple(Cause("evicted", tier="host", requests=n, tokens=n, ms=float(n))
                   for n in range(1, 14))  # fmt: skip
    page = SimpleNamespace(arena="kvmem-0-a", explained=(ONE,), causes=causes)
    monkeypatch.setattr(live, "pages", lambda: [page])
    path = SimpleNamespace(name="kvmem-0-a")
    monkeypatch.setattr(switching, "engines", lambda name: [SimpleNamespace(path=path)])


@pytest.mark.parametrize("who", ["cmpl-1-0-ab", "cmpl-1", "planner"])
def test_a_request_is_explained_by_its_id_or_its_session(
    who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explaining.show(None, who, as_json=False)
    told = capsys.readouterr().out
    assert "cmpl-1-0-ab, session planner: 2,771 of 2,787 tokens computed" in told
    assert "2,672 tokens about 870 ms  system_changed (system, first differing token 21" in told
    assert "rule volatile-time" in told
    assert "Keep it for the whole session" in told
    assert "for cmpl-2" in told


def test_what_nobody_knows_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert explaining.show(None, "someone", as_json=False) is False
    assert capsys.readouterr().out == ""


def test_no_engine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switching, "engines", lambda name: [])
    assert explaining.show(None, None, as_json=False) is None


def test_the_ten_dearest_causes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert explaining.show(None, None, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [cause["ms"] for cause in told] == [float(n) for n in range(13, 3, -1)]
    assert explaining.show(None, None, as_json=False)
    assert "evicted" in capsys.readouterr().out


def test_machines_get_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert explaining.show(None, "planner", as_json=True)
    (one,) = json.loads(capsys.readouterr().out)
    assert [run["reason"] for run in one["runs"]] == ["system_changed", "evicted", "block_floor"]


# -- a ledger's outline --------------------------------------------------------------------------


@pytest.fixture
def opened() -> Any:
    pytest.importorskip("transformers")
    from kvmem.context import ChatRenderer, Ledger
    from tests.tiny_tokenizers import tokenizer

    renderer = ChatRenderer.of(tokenizer())

    def make(system: str = "Be exact.", tools: tuple[Any, ...] = ({"name": "f"},)) -> Ledger:
        return Ledger.open(renderer, system=system, tools=tools, session_id="s")

    return make


def test_a_ledger_outlines_each_message_and_no_text(opened: Any) -> None:
    from kvmem.explain.misses.outline import Outline
    from kvmem.explain.misses.outlining import outline_of

    one = opened()
    one.append({"role": "user", "content": "a secret question"})
    one.append({"role": "tool", "content": "a secret result"})
    outline = Outline.read(outline_of(one))
    assert [span.role for span in outline.spans()] == ["head", "user", "tool"]
    assert [span.stop for span in outline.spans()] == [span.stop for span in one.spans]
    assert b"secret" not in outline.packed


def test_two_ledgers_tell_what_changed_between_them(opened: Any) -> None:
    from kvmem.context import Drop
    from kvmem.explain.misses.outline import Outline, compare
    from kvmem.explain.misses.outlining import outline_of

    def verdict(one: Any, other: Any) -> Any:
        a, b = one.tokens(), other.tokens()
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
        return compare(Outline.read(outline_of(one)), Outline.read(outline_of(other)), at)

    one = opened()
    one.append({"role": "user", "content": "first"}, {"role": "user", "content": "second"})
    other = opened(system="Be brief.")
    assert verdict(one, other).reason == "system_changed"
    assert verdict(one, opened(tools=({"name": "g"},))).reason == "tools_changed"
    edited = opened()
    edited.append({"role": "user", "content": "fourth"}, {"role": "user", "content": "second"})
    assert (verdict(one, edited).reason, verdict(one, edited).message) == ("input_changed", 0)
    compacted = verdict(one, one.rewrite(Drop(1, 1)))
    assert (compacted.reason, compacted.epoch) == ("context_compacted", 1)
