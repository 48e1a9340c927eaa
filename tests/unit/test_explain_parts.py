"""The explainer's parts: earlier prompts, departures, sums, outlines, the thread, the texts."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmem._core import HostTier, pack_tokens
from kvmem.explain.misses.behind import EVERY, MANY, MOST, Behind
from kvmem.explain.misses.gone import Departure, Gone
from kvmem.explain.misses.naming import Broken, Namer, name
from kvmem.explain.misses.outline import Outline, OutlineSpan, compare, digests_of
from kvmem.explain.misses.past import Pasts, Prompt, common_blocks, first_difference
from kvmem.explain.misses.reasons import NAMES, REASONS, fix_of
from kvmem.explain.misses.runs import OF_FATE, Run, known_of
from kvmem.explain.misses.sums import Pace, Sums
from kvmem.explain.misses.texts import parts_of

BLOCK = 16


def key(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def chain(n: int, seed: int = 0) -> list[bytes]:
    return [key(seed, i) for i in range(n)]


def prompt(n_blocks: int, seed: int = 0, *, session: str = "", salt: bytes = b"") -> Prompt:
    ids = [seed * 1000 + i for i in range(n_blocks * BLOCK + 3)]
    return Prompt(f"r{seed}", session, salt, b"", b"", b"", chain(n_blocks, seed), ids, len(ids))


# -- earlier prompts -----------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_shared_blocks_are_those_before_the_first_difference(a: int, b: int, same: int) -> None:
    same = min(same, a, b)
    one = chain(same) + chain(a - same, seed=1)
    other = chain(same) + chain(b - same, seed=2)
    assert common_blocks(b"".join(one), other) == same


@given(st.lists(st.integers(0, 3), max_size=300), st.lists(st.integers(0, 3), max_size=300))
def test_the_first_difference_is_found(a: list[int], b: list[int]) -> None:
    n = min(len(a), len(b))
    expected = next((i for i in range(n) if a[i] != b[i]), n)
    assert first_difference(pack_tokens(a), pack_tokens(b), 0) == expected


def test_a_prompt_that_goes_on_takes_the_place_of_the_one_before() -> None:
    pasts = Pasts(BLOCK)
    for n in (3, 5, 9):
        one = prompt(n, session="s")
        past, shared = pasts.find(one)
        pasts.keep(one, past, shared, [], one.n_tokens, None)
    assert len(pasts) == 1
    assert pasts.find(prompt(12, session="s"))[1] == 9


@pytest.mark.parametrize("session", ["s", ""])
def test_the_table_stays_within_its_bounds(session: str) -> None:
    pasts = Pasts(BLOCK, most=8, most_keys_bytes=32 * 60, most_tokens_bytes=4 * BLOCK * 30)
    for seed in range(50):
        one = prompt(10, seed, session=session and f"{session}{seed}")
        pasts.keep(one, *pasts.find(one), [], one.n_tokens, None)
        held = list(pasts._all.values())
        assert len(held) <= 8
        assert pasts.keys_bytes == sum(len(past.keys) for past in held) <= 32 * 60
        assert pasts.tokens_bytes == sum(len(past.tokens) for past in held) <= 4 * BLOCK * 30
    assert len(pasts._by_end) + len(pasts._by_mark) <= 8 * 8
    assert len(pasts._named) <= 8
    assert len(pasts._salts) <= 8


def test_a_session_has_its_last_branches_only() -> None:
    pasts = Pasts(BLOCK)
    for seed in range(9):
        one = prompt(4, seed, session="s")
        pasts.keep(one, *pasts.find(one), [], one.n_tokens, None)
    assert len(pasts) == 4


def test_tokens_that_were_let_go_come_back_with_the_next_prompt() -> None:
    pasts = Pasts(BLOCK, most_tokens_bytes=0)
    one = prompt(4, session="s")
    pasts.keep(one, None, 0, [], one.n_tokens, None)
    assert pasts.tokens_bytes == 0
    pasts._most_tokens = 1 << 20
    longer = prompt(6, session="s")
    past, shared = pasts.find(longer)
    pasts.keep(longer, past, shared, [7, 8], longer.n_tokens + 1, None)
    assert past is not None
    assert past.tokens == pack_tokens([*(longer.tokens or []), 7, 8])


def test_nameless_prompts_with_one_long_head_are_told_apart() -> None:
    """Each goes on from its own, however much of the head all of them share."""
    pasts = Pasts(BLOCK)
    head = chain(64)
    ids = list(range(64 * BLOCK))

    def of(seed: int, n: int) -> Prompt:
        keys = [*head, *chain(n, seed)]
        tokens = [*ids, *(seed * 1000 + i for i in range(n * BLOCK + 1))]
        return Prompt(f"r{seed}", "", b"", b"", b"", b"", keys, tokens, len(tokens))

    for turn in (2, 4, 6):
        for seed in range(1, 9):
            one = of(seed, turn)
            past, shared = pasts.find(one)
            if turn > 2:
                assert past is not None
                assert (past.request_id, shared) == (f"r{seed}", 64 + turn - 2)
            pasts.keep(one, past, shared, [], one.n_tokens, None)


# -- what became of blocks -----------------------------------------------------------------------


class Words:
    """What became of blocks, by their place in `chain`."""

    def __init__(self, *words: str) -> None:
        self.of = dict(zip(chain(len(words)), words, strict=True))
        self.asked = 0

    def fate(self, group: int, one: bytes) -> str:
        self.asked += 1
        return self.of.get(one, "unknown")


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 10))
def test_runs_of_one_fate_end_where_they_end(evicted: int, quarantined: int, more: int) -> None:
    fates = Words(*["evicted"] * evicted, *["quarantined"] * quarantined)
    n = evicted + quarantined + more
    known = known_of(chain(n), 0, n, fates, Gone(), no_boundary=False)
    expected = [("evicted", evicted), ("quarantined", evicted + quarantined)]
    expected = [one for i, one in enumerate(expected) if (evicted, quarantined)[i]]
    assert [(one.reason, one.stop) for one in known] == expected


def test_a_long_run_costs_few_questions() -> None:
    fates = Words(*["evicted"] * 4000)
    known_of(chain(4000), 0, 4000, fates, Gone(), no_boundary=False)
    assert fates.asked < 60


def test_every_fate_of_the_tiers_has_a_reason() -> None:
    assert set(OF_FATE.values()) <= set(NAMES)
    told = {"published", "pending", "evicted", "quarantined", "cleared", "abandoned"}
    assert told | {"demoted", "tier_off"} == set(OF_FATE)


def test_departures_are_remembered_up_to_a_bound() -> None:
    gone = Gone(most=10)
    for n in range(8):
        gone.add(b"".join(chain(3, n)), Departure(float(n), "host", "lru", f"r{n}", b""))
    assert len(gone) == 10
    assert gone.find(key(0, 0)) is None
    left = gone.find(key(7, 2))
    assert left is not None
    assert left.request_id == "r7"


def test_the_tier_tells_the_keys_that_it_evicted_once() -> None:
    import numpy as np

    tier = HostTier(2, "lru")
    for one in chain(4):
        _, slots, generations, _ = tier.reserve([one], 0, 1)
        tier.publish(slots, generations, np.ones(1, np.uint64))
    assert tier.take_evicted() == b"".join(chain(4)[:2])
    assert tier.take_evicted() == b""


@pytest.mark.parametrize("bad", [-1, 1 << 31, "a", True])
def test_tokens_that_are_none_are_not_packed(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        pack_tokens([1, bad])
    assert pack_tokens([1, 2], 1) == (2).to_bytes(4, "little")
    with pytest.raises(ValueError, match="start"):
        pack_tokens([1], 2)


# -- sums ----------------------------------------------------------------------------------------


def test_the_dearest_causes_of_the_last_hour_come_first() -> None:
    sums = Sums()
    for n in range(20):
        sums.add(Run("evicted", 0, 10, ms=float(n), tier=f"tier{n}"), 100.0)
    sums.add(Run("system_changed", 0, 1, ms=500.0, role="system"), 200.0)
    top = sums.top(3000.0)
    assert len(top) == 10
    assert (top[0].reason, top[0].ms, top[0].requests) == ("system_changed", 500.0, 1)
    assert top[1].tier == "tier19"
    assert [cause.reason for cause in sums.top(3750.0)] == ["system_changed"]
    assert sums.top(4000.0) == []


def test_causes_beyond_the_bound_are_summed_by_reason() -> None:
    sums = Sums()
    for n in range(500):
        sums.add(Run("evicted", 0, 1, ms=1.0, role=f"role{n}"), 1.0)
    assert len(sums._minutes[0][1]) <= 65
    assert sum(cause.tokens for cause in sums.top(1.0, 1000)) == 500


def test_a_cause_that_was_named_later_is_not_counted_twice() -> None:
    sums = Sums()
    run = Run("input_changed", 0, 10, ms=1.0)
    sums.add(run, 1.0)
    sums.add(run, 2.0, times=-1)
    sums.add(Run("retokenized", 0, 10, ms=1.0), 2.0)
    assert [cause.reason for cause in sums.top(2.0)] == ["retokenized"]


def test_the_pace_is_that_of_prefill_steps() -> None:
    pace = Pace()
    pace.step(1000, 10.0)
    pace.step(4, 12.0)  # so the first took 2 s
    assert pace.s_per_token == pytest.approx(0.002)
    pace.step(4, 50.0)  # decoding says nothing of it
    assert pace.s_per_token == pytest.approx(0.002)
    pace.step(0, 51.0)
    pace.step(1000, 99.0)  # nor does a pause
    assert pace.s_per_token == pytest.approx(0.002)


def test_every_reason_says_what_it_is() -> None:
    assert all(reason.what for reason in REASONS)
    assert len(set(NAMES)) == len(NAMES)
    with pytest.raises(KeyError):
        fix_of("bad luck")


# -- outlines ------------------------------------------------------------------------------------


def outline(*spans: OutlineSpan, epoch: int = 0, system: str = "s", tools: tuple = ()) -> Outline:
    head = OutlineSpan("head", 10, b"....", b"....")
    return Outline.make(epoch=epoch, system=system, tools=tools, spans=[head, *spans])


def span(stop: int, said: bytes = b"said", form: bytes = b"form", **more: Any) -> OutlineSpan:
    return OutlineSpan(more.pop("role", "user"), stop, said, form, **more)


def test_an_outline_is_read_as_it_was_made() -> None:
    one = outline(span(20), span(30, b"else", role="tool", sampled=True), epoch=3)
    again = Outline.read(one.text())
    assert again == one
    assert again.epoch == 3
    assert again.spans()[1:] == [span(20), span(30, b"else", role="tool", sampled=True)]
    assert len(one.packed) < 16 * 4


@pytest.mark.parametrize("text", ["?", "AAAA", "A" * 40, outline(span(20)).text()[:-4]])
def test_what_is_no_outline_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="outline"):
        Outline.read(text)


@pytest.mark.parametrize(
    ("old", "new", "token", "reason"),
    [
        (outline(), outline(system="t"), 3, "system_changed"),
        (outline(), outline(tools=({"name": "f"},)), 3, "tools_changed"),
        (outline(), outline(), 3, "template_rewrote_history"),
        (outline(span(20)), outline(span(20), epoch=1), 12, "context_compacted"),
        (outline(span(20)), outline(span(20, b"else")), 12, "input_changed"),
        (outline(span(20)), outline(span(20, form=b"else")), 12, "tool_args_reserialized"),
        (outline(span(20, sampled=True)), outline(span(20)), 12, "retokenized"),
        (outline(span(20)), outline(span(20)), 12, "template_rewrote_history"),
        (outline(), outline(span(20)), 12, None),
    ],
)
def test_two_outlines_tell_what_changed(
    old: Outline, new: Outline, token: int, reason: str | None
) -> None:
    verdict = compare(old, new, token)
    assert (verdict.reason if verdict is not None else None) == reason


def test_arguments_written_otherwise_are_said_the_same() -> None:
    def call(arguments: str) -> bytes:
        function = f'{{"name":"f","arguments":{arguments}}}'
        return f'{{"role":"assistant","tool_calls":[{{"function":{function}}}]}}'.encode()

    one, other = digests_of(call(r'"{\"a\":1}"')), digests_of(call(r'"{ \"a\": 1 }"'))
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert digests_of(call(r'"{\"a\":2}"'))[0] != one[0]
    assert digests_of(b"")[0] == digests_of(b"")[0]


# -- the threads ---------------------------------------------------------------------------------


def test_jobs_are_done_in_order_whoever_does_them() -> None:
    done: list[int] = []
    behind = Behind("test", pytest.fail)
    for n in range(300):
        behind.add(lambda n=n: done.append(n))
        if n % 7 == 0:
            behind.wake()
        if n % 31 == 0:
            behind.finish()
            assert done == list(range(n + 1))
    behind.finish()
    assert done == list(range(300))
    behind.close()


def test_the_thread_does_jobs_without_being_waited_for() -> None:
    behind, done = Behind("test", pytest.fail), threading.Event()
    behind.add(done.set, soon=True)
    for _ in range(EVERY):
        assert behind._thread is None
        behind.wake()
    assert done.wait(10)
    behind.close()
    assert not behind.add(done.set)


def test_jobs_that_may_wait_are_done_when_there_are_many() -> None:
    behind, done = Behind("test", pytest.fail), threading.Event()
    behind.add(done.set)
    behind.wake()
    assert behind._thread is None  # nobody was woken for it
    for _ in range(MANY):
        behind.add(lambda: None)
    behind.wake()
    assert done.wait(10)
    behind.close()


def test_a_job_that_raises_is_told_and_the_next_one_done() -> None:
    failed: list[Exception] = []
    done: list[int] = []
    behind = Behind("test", failed.append)
    behind.add(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    behind.add(lambda: done.append(1))
    behind.finish()
    assert [type(error) for error in failed] == [ZeroDivisionError]
    assert done == [1]


def test_jobs_have_a_bound() -> None:
    behind = Behind("test", pytest.fail)
    assert all(behind.add(lambda: None) for _ in range(MOST))
    assert not behind.add(lambda: None)
    behind.close()


def broken() -> Broken:
    return Broken(pack_tokens([1, 2]), pack_tokens([1, 3]), 1, 2, meant=True)


@pytest.mark.parametrize(("meant", "reason"), [(True, "input_changed"), (False, "input_changed")])
def test_a_change_in_plain_text_is_a_change(meant: bool, reason: str) -> None:
    one = Broken(pack_tokens([1, 2]), pack_tokens([1, 3]), 1, 2, meant=meant)
    assert name(one, lambda ids: "".join("abcd"[i] for i in ids)).reason == reason


def test_two_chats_that_share_their_head_only_are_two() -> None:
    texts = ["<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n", "U", "V", "<|im_end|>\n"]
    for meant, reason in ((False, "first_time"), (True, "input_changed")):
        one = Broken(pack_tokens([0, 1, 3]), pack_tokens([0, 2, 3]), 1, 3, meant=meant)
        assert name(one, lambda ids: "".join(texts[i] for i in ids)).reason == reason


def test_a_tokenizer_that_fails_costs_a_name() -> None:
    failed: list[str] = []

    def load() -> Any:
        raise OSError("no such file")

    namer, one = Namer(load, failed.append), broken()
    namer.submit(one)
    namer.join()
    assert (one.done, one.verdict) == (True, None)
    assert failed == ["OSError: no such file"]
    later = broken()
    namer.submit(later)  # and it is not loaded again for each
    namer.join()
    assert later.done
    assert len(failed) == 1
    namer.close()


def test_breaks_that_wait_have_a_bound() -> None:
    gate = threading.Event()

    def load() -> Any:
        gate.wait(10)

    namer = Namer(load)
    many = [broken() for _ in range(60)]
    for one in many:
        namer.submit(one)
    assert any(one.done for one in many)  # given up, not waited for
    gate.set()
    namer.join()
    assert all(one.done for one in many)
    namer.close()


# -- texts ---------------------------------------------------------------------------------------

FORMS = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    "<|im_start|>assistant\nA",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA",
    "harmony": "<|start|>system<|message|>S<|end|><|start|>user<|message|>U<|end|>"
    "<|start|>assistant<|channel|>final<|message|>A",
    "phi": "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_is_cut_into_its_messages(form: str) -> None:
    parts = parts_of(FORMS[form])
    assert [(p.role, p.text) for p in parts] == [("system", "S"), ("user", "U"), ("assistant", "A")]


def test_tools_thinking_calls_and_results_are_seen() -> None:
    parts = parts_of(
        "<|im_start|>system\nS<tools>\n{}\n</tools><|im_end|>\n<|im_start|>assistant\n<think>\nT\n"
        '</think>\n\nC<tool_call>\n{"name": 1}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>R</tool_response><|im_end|>\n"
    )
    assert [part.kind for part in parts] == ["system", "tools", "message", "message"]
    assert parts[1].pieces == ("{}",)
    assert (parts[2].thinking.strip(), parts[2].pieces) == ("T", ('{"name": 1}',))
    assert parts[3].role == "tool"


def test_text_of_another_form_is_one_part() -> None:
    assert [part.kind for part in parts_of("plain text")] == ["text"]
    assert parts_of("") == []
