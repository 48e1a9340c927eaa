"""Blame without an engine: evidence, residency by value, the rule, runs, judges, the assertion."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks._blame_logs import INJECTED, make
from kvmem.blame import (
    ContextFault,
    Turn,
    Verdict,
    assert_not_context_fault,
    judge_of,
    try_turn,
)
from kvmem.blame.evidence import find
from kvmem.blame.judge import tool_call
from kvmem.blame.page import page
from kvmem.blame.residency import residencies
from kvmem.blame.runs import turn_of
from kvmem.blame.scorer import FRESH
from kvmem.blame.words import holds, lines, values
from kvmem.context import ChatRenderer
from kvmem.errors import ConfigError
from kvmem.types import Sampled, Scored
from tests import tiny_tokenizers

USER = {"role": "user", "content": "Collect the settings."}
ASKED = {"role": "user", "content": "What is timeout_ms of billing?"}


def call(service: str, key: str, result: str, number: int = 0) -> list[dict[str, Any]]:
    arguments = json.dumps({"service": service, "key": key})
    name = f"call{number}"
    return [
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": name, "function": {"name": "get_config", "arguments": arguments}}]},
        {"role": "tool", "tool_call_id": name, "content": result},
    ]  # fmt: skip


FULL = [
    USER,
    *call("billing", "timeout_ms", "4300", 1),
    *call("search", "timeout_ms", "900", 2),
    *call("billing", "retry_limit", "7", 3),
]


def turn(
    served: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]] = FULL, **more: Any
) -> Turn:
    more.setdefault("expected", "4300")
    more.setdefault("candidates", ("4300", "900", "7"))
    return turn_of("run/0", ASKED, full, served, **more)


def residency(one: Turn) -> Any:
    (found,) = residencies(one, find(one))
    return found


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "said"),
    [
        ("it is 4300 ms", "4300", True), ("it is 4,300 ms", "4300", True),
        ("it is 14300 ms", "4300", False), ("it is 4300.5", "4300", False),
        ("port 80.", "80", True), ("v1.80", "80", False), ("Alpha is on", "alpha", True),
        ("alphabet", "alpha", False), ("anything", "", False),
    ],
)  # fmt: skip
def test_a_value_is_said_as_a_run_of_its_own(text: str, value: str, said: bool) -> None:
    assert holds(text, value) is said


def test_values_are_what_a_line_tells_beyond_the_question() -> None:
    assert values('{"key": "port", "value": 8080}', but=["the port key value"]) == ("8080",)
    assert values("the owner is Mara and the build v2.1") == ("Mara", "v2.1")
    assert list(lines("a 0.5 b. c\n\nd")) == ["a 0.5 b.", "c", "d"]


# -- evidence and residency ------------------------------------------------------------------------


def test_evidence_is_the_call_whose_arguments_are_asked_for() -> None:
    (found,) = find(turn(FULL))
    assert (found.index, found.why, found.values) == (2, "argument", ("4300",))


def test_two_facts_are_not_taken_for_their_crossing() -> None:
    full = [
        *call("billing", "port", "81", 1), *call("billing", "size", "82", 2),
        *call("search", "port", "83", 3), *call("search", "size", "84", 4),
    ]  # fmt: skip
    asked = {"role": "user", "content": "What is the sum of port of billing and size of search?"}
    found = find(turn_of("r", asked, full, full, expected="165"))
    assert [one.values for one in found] == [("81",), ("84",)]


def test_what_was_never_asked_of_a_tool_is_not_found() -> None:
    without = [USER, *FULL[3:]]
    assert find(turn(without, without)) == []


@pytest.mark.parametrize("service", ["billing", "mailer"])
def test_half_of_what_was_asked_is_not_found(service: str) -> None:
    # "billing" is told of with another key, "mailer" nowhere; the key is told of others.
    full = [USER, *call("search", "port", "search.port = 81", 1),
            *call("billing", "size", "billing.size = 82", 2)]  # fmt: skip
    asked = {"role": "user", "content": f"What is port of {service}?"}
    assert find(turn_of("r", asked, full, full, expected="7")) == []


def test_text_without_calls_is_found_by_its_lines() -> None:
    full = [USER, {"role": "user", "content": "Notes.\nbilling has timeout_ms 4300.\nBye."}]
    (found,) = find(turn(full, full))
    assert (found.index, found.why, found.line) == (1, "lexical", "billing has timeout_ms 4300.")


def test_the_very_message_is_there_by_its_block() -> None:
    found = residency(turn(FULL))
    assert (found.block, found.value, found.cause) == (True, True, "")


def test_a_missing_message_is_lost_and_its_epoch_is_named() -> None:
    from kvmem.blame import Epoch

    found = residency(turn([USER, *FULL[3:]], epochs=(Epoch(3, (1, 2)),)))
    assert (found.value, found.cause, found.epoch) == (False, "lost", 3)


@pytest.mark.parametrize(
    "said",
    [
        "The billing service gives up after 4,300 ms (its timeout).",
        "search: timeout 900 ms; billing: timeout 4300 ms.",
        "Billing was looked at. Its timeout_ms is 4300.",
    ],
)
def test_a_faithful_paraphrase_is_not_lost_though_its_block_is(said: str) -> None:
    found = residency(turn([USER, {"role": "user", "content": f"Summary: {said}"}]))
    assert (found.block, found.value, found.cause) == (False, True, "")


@pytest.mark.parametrize(
    "said",
    [
        "Billing and search were looked at; billing's timeout was noted.",
        "An invoice over 4300 came in.",  # the value, of something else
        "search has a timeout of 900 ms.",
    ],
)
def test_an_unfaithful_summary_is_lost(said: str) -> None:
    found = residency(turn([USER, {"role": "user", "content": f"Summary: {said}"}]))
    assert (found.value, found.cause) == (False, "lost")


def test_a_summary_with_another_value_contradicts() -> None:
    told = {"role": "user", "content": "Summary: billing timeout_ms = 900."}
    found = residency(turn([USER, told]))
    assert (found.value, found.cause, found.said) == (False, "contradicted", told["content"])
    found = residency(turn([*FULL, told]))
    assert (found.value, found.cause) == (True, "contradicted")


def test_a_result_cut_off_before_its_value_is_truncated() -> None:
    full = [USER, *call("billing", "timeout_ms", "billing settings, timeout_ms = 4300", 1)]
    cut = [*full[:2], {**full[2], "content": "billing settings, [truncated]"}]
    assert residency(turn(cut, full)).cause == "truncated"


def test_an_older_value_alone_is_stale() -> None:
    old = call("billing", "timeout_ms", "1200", 0)
    found = residency(turn([USER, *old], [USER, *old, *FULL[1:]]))
    assert (found.value, found.cause) == (False, "stale")


@pytest.mark.parametrize("injected", INJECTED)
def test_generated_logs_have_what_was_injected(injected: str) -> None:
    case = make(injected, 1, 0)
    assert make(injected, 1, 0) == case != make(injected, 2, 0)
    found = residencies(case.turn, find(case.turn))
    there = all(r.value for r in found)
    assert there is (injected not in ("dropped", "truncated", "stale", "both"))
    assert bool(found) is (injected != "never known")
    assert case.turn.candidates.count(case.turn.expected) == 1


# -- the rule, by an engine that knows what it sees ------------------------------------------------


class Reader:
    """Answers as `rule` says of the prompt's text: the candidate it names gets most."""

    def __init__(self, renderer: ChatRenderer, rule: Callable[[str, str], str]) -> None:
        self.renderer, self.rule = renderer, rule
        self.asked: list[tuple[str, str]] = []

    def score(
        self, prefix_ids: Any, candidates: Any, *, kv: str = "served", salt: str = ""
    ) -> Scored:
        text = self.renderer.decode(prefix_ids)
        self.asked.append((kv, text))
        wanted = self.rule(text, kv)
        said = [self.renderer.decode(c).strip() for c in candidates]
        # Among as many wrong ones the right one stands lower where it is not wanted.
        return Scored(
            tuple(-0.1 if s == wanted else -5.0 for s in said), len(prefix_ids), 0, 0.0
        )  # fmt: skip

    def sample(self, prefix_ids: Any, **more: Any) -> Sampled:
        text = self.renderer.decode(prefix_ids)
        return Sampled(tuple(self.renderer.encode(self.rule(text, more["kv"]))), 1, 0, 0.0)


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer.of(tiny_tokenizers.tokenizer())


def looks_up(text: str, kv: str) -> str:
    return "4300" if "4300" in text else "900"


@pytest.mark.parametrize(
    ("served", "rule", "fault", "cause"),
    [
        (FULL, looks_up, "ok", ""),
        ([USER, *FULL[3:]], looks_up, "context", "lost"),
        (FULL, lambda text, kv: "7", "model", ""),
        ([USER, *FULL[3:]], lambda text, kv: "7", "both", "lost"),
        (FULL, lambda text, kv: "4300" if "900" not in text else "900", "context", "buried"),
    ],
)
def test_the_verdict_is_what_the_arms_show(
    renderer: ChatRenderer, served: Any, rule: Any, fault: str, cause: str
) -> None:
    verdict = try_turn(turn(served), renderer, Reader(renderer, rule))
    assert (verdict.fault, verdict.cause) == (fault, cause), verdict.explain()
    assert 0.5 <= verdict.confidence <= 1.0
    if cause == "lost":
        assert verdict.span == 2


def test_what_nobody_ever_knew_is_the_sources_fault(renderer: ChatRenderer) -> None:
    without = [USER, *FULL[3:]]
    verdict = try_turn(turn(without, without), renderer, Reader(renderer, looks_up))
    assert verdict.fault == "source"


def test_lossy_kv_is_at_fault_where_exact_kv_answers(renderer: ChatRenderer) -> None:
    engine = Reader(renderer, lambda text, kv: "900" if kv == "int2" else "4300")
    verdict = try_turn(turn(FULL, kv="int2"), renderer, engine)
    assert (verdict.fault, verdict.changed) == ("cache", True)
    assert [kv for kv, _ in engine.asked][:2] == ["int2", "served"]
    assert "exact KV" in verdict.fix


def test_kv_that_is_only_said_to_be_exact_is_computed_anew_where_asked(
    renderer: ChatRenderer,
) -> None:
    engine = Reader(renderer, lambda text, kv: "4300" if kv == FRESH else "900")
    assert try_turn(turn(FULL), renderer, engine).fault != "cache"
    assert try_turn(turn(FULL), renderer, engine, verify_kv=True).fault == "cache"


def test_attribution_finds_what_no_word_of_the_question_does(renderer: ChatRenderer) -> None:
    full = [USER, {"role": "user", "content": "Oranges, 4300."}, {"role": "user", "content": "Hm."}]
    verdict = try_turn(turn([USER], full), renderer, Reader(renderer, looks_up))
    assert [(e.index, e.why) for e in verdict.evidence] == [(1, "attribution")]
    assert (verdict.fault, verdict.cause) == ("context", "lost")
    assert verdict.influence[1] > 1.0 > abs(verdict.influence[2])


@pytest.mark.parametrize(("given", "fault"), [((), "unknown"), ((1,), "context")])
def test_evidence_by_words_alone_that_one_wording_undoes_is_no_verdict(
    renderer: ChatRenderer, given: tuple[int, ...], fault: str
) -> None:
    full = [USER, {"role": "user", "content": "billing has timeout_ms 4300."}]
    # Enough as notes, not as it was said.
    engine = Reader(renderer, lambda text, kv: "4300" if "Known facts" in text else "900")
    verdict = try_turn(turn([USER], full, evidence=given), renderer, engine)
    assert verdict.fault == fault
    assert (verdict.confidence > 0.5) is (fault != "unknown")


def test_a_judge_decides_where_there_are_no_candidates(renderer: ChatRenderer) -> None:
    one = turn([USER, *FULL[3:]], candidates=(), expected="")
    judge = judge_of("regex:^43")
    verdict = try_turn(one, renderer, Reader(renderer, looks_up), judge=judge)
    assert (verdict.fault, verdict.cause) == ("context", "lost")
    with pytest.raises(ConfigError, match="no judge"):
        try_turn(one, renderer, Reader(renderer, looks_up))


# -- judges, the assertion, the page ---------------------------------------------------------------


def test_tool_calls_are_equal_whatever_their_order_and_form() -> None:
    judge = tool_call("f", {"a": 1, "b": [2]})
    assert judge('<tool_call>{"name": "f", "arguments": {"b": [2], "a": 1}}</tool_call>')
    assert judge('{"function": {"name": "f", "arguments": "{\\"a\\": 1, \\"b\\": [2]}"}}')
    assert not judge('{"name": "f", "arguments": {"a": 1}}')
    assert not judge("f(1)")


@pytest.mark.parametrize("spec", ["", "regex:(", "python:nowhere:f", "guess", "exact", "tool-call"])
def test_a_judge_that_cannot_be_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError):
        judge_of(spec)


def test_judges_are_found_by_name() -> None:
    assert judge_of("exact", "Yes")(" yes\n")
    assert judge_of("contains", "43")("it is 43.")
    assert not judge_of("contains", "43")("it is 430")
    assert judge_of("python:os.path:isabs")("/etc")


def test_a_run_fails_a_test_by_its_context_only() -> None:
    bad = Verdict(turn="r/0", fault="context", cause="buried", confidence=0.9, why="Because.")
    with pytest.raises(ContextFault, match=r"r/0: context \(buried\)"):
        assert_not_context_fault(bad)
    assert_not_context_fault(bad, allow=frozenset({"buried"}))
    assert_not_context_fault(bad, confidence=0.95)
    for fault in ("ok", "model", "source", "unknown"):
        assert_not_context_fault(Verdict(turn="r/0", fault=fault, confidence=1.0))


def test_the_page_shows_arms_and_pieces_and_no_text_as_markup(renderer: ChatRenderer) -> None:
    full = [{"role": "user", "content": "<script>x</script>"}, *FULL]
    one = turn([USER, *FULL[3:]], full)
    verdict = try_turn(one, renderer, Reader(renderer, looks_up))
    text = page([(one, verdict)])
    assert "<script>x" not in text
    assert text.count('<div class="piece') == len(full)
    assert [name for name in "EXFNROP" if f"<tr><td>{name}<td>" not in text] == []
    assert "evidence by argument, lost" in text
