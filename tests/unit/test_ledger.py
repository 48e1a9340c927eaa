"""A ledger only grows; what it sends is what it sent, what was sampled, and what is new."""

from __future__ import annotations

import math
import re
import stat
from array import array
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from kvmem.context import (
    BlobStore,
    ChatRenderer,
    Drop,
    Ledger,
    Replace,
    Undo,
    find_volatile,
    move_to_tail,
    probe,
)
from kvmem.errors import ConfigError, PrefixBroken
from kvmem.hints import Supersede, read_hints
from tests.tiny_tokenizers import CHATML, TOOLS_FIRST, tokenizer

TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
RENDERER = ChatRenderer.of(tokenizer())
END = RENDERER.encode("<|e|>")


def ledger(**options: Any) -> Ledger:
    settings = {"system": "You are exact.", "tools": TOOLS, "session_id": "planner", **options}
    return Ledger.open(RENDERER, **settings)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(one: Ledger, text: str, *, end: bool = True) -> dict[str, Any]:
    """What an engine would say to the ledger's request."""
    body = one.request(model="m")
    sampled = RENDERER.encode(text) + (END if end else [])
    message = {"role": "assistant", "content": text}
    return {
        "prompt_token_ids": body["prompt"],
        "choices": [{"token_ids": sampled, "message": message}],
    }


def turn(one: Ledger, question: str, said: str, *, end: bool = True) -> None:
    one.append(user(question))
    one.commit(answer(one, said, end=end))


@pytest.mark.parametrize("end", [True, False], ids=["with its end", "cut off"])
def test_the_ids_are_those_of_the_whole_conversation(end: bool) -> None:
    one = ledger()
    turn(one, "größe?", "2 🙂", end=end)
    turn(one, "and?", "3", end=end)
    messages = [{"role": "system", "content": "You are exact."}, user("größe?"),
                {"role": "assistant", "content": "2 🙂"}, user("and?"),
                {"role": "assistant", "content": "3"}, user("last")]  # fmt: skip
    one.append(user("last"))
    whole = RENDERER.encode(RENDERER.text(messages, tools=TOOLS, generation=True))
    assert one.request()["prompt"] == whole
    assert one.messages() == messages


def test_a_request_begins_with_all_that_was_sent_and_sampled() -> None:
    one = ledger()
    before: list[int] = []
    for i in range(4):
        one.append(user(f"question {i}"))
        response = answer(one, f"sampled  {i}\n", end=i % 2 == 0)
        sent = response["prompt_token_ids"]
        assert sent[: len(before)] == before
        one.commit(response)
        before = sent + response["choices"][0]["token_ids"]
        assert one.tokens() == before


def test_examples_of_answers_can_be_given_and_an_empty_answer_is_ended() -> None:
    one = ledger()
    one.append(user("2+2?"), {"role": "assistant", "content": "4"}, user("3+3?"))
    one.commit(answer(one, "", end=False))
    one.append(user("and?"))
    wanted = [{"role": "system", "content": "You are exact."}, user("2+2?"),
              {"role": "assistant", "content": "4"}, user("3+3?"),
              {"role": "assistant", "content": ""}, user("and?")]  # fmt: skip
    assert one.messages() == wanted
    whole = RENDERER.encode(RENDERER.text(wanted, tools=TOOLS, generation=True))
    assert one.request()["prompt"] == whole


def test_bodies_carry_ids_session_and_salt() -> None:
    one = ledger(cache_salt="s")
    one.append(user("hello"))
    plain = one.request(model="m", max_tokens=5)
    assert plain["prompt"][: one.n_tokens] == one.tokens()
    wanted = {"model": "m", "max_tokens": 5, "session_id": "planner", "cache_salt": "s"}
    assert wanted.items() <= plain.items()
    assert plain["return_token_ids"] is True
    chat = one.request("chat", model="m", kv_transfer_params={"kvmem": {"load": True}})
    assert chat["kv_transfer_params"]["prompt_token_ids"] == plain["prompt"]
    assert chat["kv_transfer_params"]["kvmem"] == {"load": True}
    assert chat["messages"] == one.messages()
    assert chat["tools"] == TOOLS


def test_an_engine_that_was_asked_something_else_is_found_out() -> None:
    one = ledger()
    one.append(user("hello"))
    response = answer(one, "yes")
    before = one.tokens()
    wrong = {**response, "prompt_token_ids": [*response["prompt_token_ids"]]}
    wrong["prompt_token_ids"][7] += 1
    with pytest.raises(PrefixBroken, match="differ from token 7 on") as raised:
        one.commit(wrong)
    assert raised.value.at == 7
    with pytest.raises(PrefixBroken, match="no token ids"):
        one.commit({"choices": [{"text": "yes"}]})
    for none in ({"error": {"message": "overloaded"}}, {"choices": []}, {"choices": None}):
        with pytest.raises(PrefixBroken, match="has no choice 0"):
            one.commit(none)
    for ids in ([-1], [1 << 40], [True], ["7"], [1.5]):
        chosen = {**response["choices"][0], "token_ids": ids}
        with pytest.raises(PrefixBroken, match="token ids are none"):
            one.commit({**response, "choices": [chosen]})
    assert one.tokens() == before
    assert one.commit(response).sampled == 4  # it can still be committed
    with pytest.raises(PrefixBroken, match="Nothing was asked"):
        one.commit(response)


def test_while_a_request_is_out_nothing_is_added() -> None:
    one = ledger()
    one.append(user("hello"))
    one.request()
    for change in (
        lambda: one.append(user("more")),
        lambda: one.append_ids([1, 2], role="user"),
        lambda: one.fork("other"),
        lambda: one.rewrite(Undo()),
        lambda: one.save(Path("/nowhere")),
    ):
        with pytest.raises(PrefixBroken, match="whose request is out"):
            change()
    one.retract()
    one.append(user("more"))
    assert len(one.spans) == 3


def test_a_message_that_is_refused_leaves_the_ledger_as_it_was() -> None:
    one = ledger()
    with pytest.raises(PrefixBroken, match="'critic' is not known"):
        one.append(user("fine"), {"role": "critic", "content": "x"})
    assert len(one.spans) == 1
    bare = "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}"
    strict = Ledger.open(ChatRenderer.of(tokenizer(bare)), accept=["boundary", "rewritten"])
    with pytest.raises(PrefixBroken, match="refuses this conversation"):
        strict.append(user("fine"), {"role": "user"})
    assert len(strict.spans) == 1


def test_committed_spans_and_tokens_have_no_setter() -> None:
    one = ledger()
    turn(one, "a", "b")
    for name in ("spans", "n_tokens", "digest"):
        with pytest.raises(AttributeError):
            setattr(one, name, None)
    with pytest.raises(AttributeError):
        one.spans[1].stop = 3  # type: ignore[misc]
    copy = one.tokens()
    copy[0] = 99
    assert one.tokens()[0] != 99


def test_a_fork_shares_the_past_and_nothing_of_the_future() -> None:
    one = ledger()
    turn(one, "plan", "done")
    other = one.fork("worker")
    assert other._last is one._last
    turn(one, "left", "l")
    turn(other, "right", "r")
    common = one.spans[:3]
    assert other.spans[:3] == common
    assert one.tokens()[: common[-1].stop] == other.tokens()[: common[-1].stop]
    assert one.tokens() != other.tokens()
    assert other.session_id == "worker"
    early = one.fork("early", at=2)
    assert early.spans == one.spans[:2]
    with pytest.raises(PrefixBroken, match="There are 5 spans, not 9"):
        one.fork("x", at=9)


def test_given_ids_are_added_as_they_are() -> None:
    one = ledger()
    turn(one, "a", "b", end=False)
    n = one.n_tokens
    one.append_ids([5, 6, 7], role="tool", message={"role": "tool", "content": "x"})
    assert one.tokens()[n:] == [*END, *RENDERER.encode("\n"), 5, 6, 7]
    assert one.spans[-1].lead == 2


def test_a_rewritten_history_is_told_message_by_message() -> None:
    one = ledger()
    turn(one, "a", "b")
    told = one.messages()
    assert one.check(told) == []
    assert [(c.index, c.kind) for c in one.check([*told, user("new")])] == [(3, "new")]
    changed = [told[0], {**told[1], "content": "A", "name": "x"}]
    assert [(c.index, c.kind, c.fields) for c in one.check(changed)] == [
        (1, "changed", ("content", "name")),
        (2, "missing", ()),
    ]
    assert one.check([{**m, "tool_calls": []} for m in told]) == []


THINKING = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'].split('</think>')[-1] if not loop.last and m['role'] == 'assistant'"
    " else m['content'] }}",
)
BROKEN = {
    "thinking": THINKING,
    "trimmed": CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"),
    "empty": CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages if m['content'] or m.get('tool_calls') or m['role'] == 'user' %}",
    ),
    "rewritten": CHATML.replace("{{ m['role'] }}", "{{ m['role'] }} of {{ messages | length }}"),
    "refused": CHATML + "{% if messages | length > 3 %}{{ raise_exception('long') }}{% endif %}",
}  # fmt: skip


def test_a_template_that_keeps_history_passes_the_probe() -> None:
    assert probe(RENDERER) == ()
    assert probe(ChatRenderer.of(tokenizer(CHATML))) == ()


@pytest.mark.parametrize("rule", BROKEN)
def test_a_template_that_rewrites_history_is_refused_by_its_rule(rule: str) -> None:
    renderer = ChatRenderer.of(tokenizer(BROKEN[rule]))
    found = {b.rule for b in probe(renderer)}
    assert rule in found
    with pytest.raises(PrefixBroken, match=rule) as raised:
        Ledger.open(renderer, system="s")
    assert rule in raised.value.rules


def test_tokens_that_grow_together_are_a_broken_boundary() -> None:
    template = "{% for m in messages %}{{ '\n' + m['role'] + ': ' }}"
    template += "{{ m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    renderer = ChatRenderer.of(tokenizer(template, merge_newlines=True))
    assert "boundary" in {b.rule for b in probe(renderer)}


def test_an_accepted_rule_keeps_what_was_sent() -> None:
    renderer = ChatRenderer.of(tokenizer(THINKING))
    one = Ledger.open(renderer, system="s", accept=["thinking"])
    one.append(user("why?"))
    sent = one.request()["prompt"]
    said = renderer.encode("<think>because</think>So.<|e|>")
    one.commit({"prompt_token_ids": sent, "choices": [{"token_ids": said}]})
    one.append(user("and?"))
    assert one.request()["prompt"][: len(sent) + len(said)] == sent + said
    with pytest.raises(ConfigError, match="no rule speed"):
        Ledger.open(renderer, accept=["speed"])


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("timestamp", "2026-11-26T10:00:00Z"), ("date", "November 26, 2026"), ("clock", "10:42 am"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000"), ("epoch", "1764150000"),
        ("path", "/tmp/run-7/out"), ("id", "3f2a9c81d04b5e67"), ("id", "sess_a81bcD22"),
        ("counter", "Turn 3 of 10"),
    ],
)  # fmt: skip
def test_a_volatile_head_is_refused_with_the_place(rule: str, text: str) -> None:
    system = f"You are exact. Now: {text}. Be brief."
    (found,) = find_volatile(system)
    assert (found.rule, found.text) == (rule, text)
    assert system[found.start : found.stop] == text
    with pytest.raises(PrefixBroken, match="append it at the tail"):
        ledger(system=system)
    assert ledger(system=system, seal=False).n_tokens > 0


def test_a_stable_head_is_sealed() -> None:
    text = "You are one of 5 agents. Version 2.1. Answer in at most 300 words; see RFC 8949."
    assert find_volatile(text, TOOLS) == ()
    (found,) = find_volatile(None, [{"name": "t", "enum": {"b", "a"}}])
    assert (found.rule, found.where) == ("unordered", "tools.0")


def test_a_volatile_head_is_made_stable_and_its_pieces_are_said_at_the_tail() -> None:
    day = "You are exact. Today is 2026-11-26, turn 3 of 9. Be brief."
    next_day = day.replace("26,", "27,").replace("turn 3", "turn 4")
    (first, said), (second, _) = move_to_tail(day), move_to_tail(next_day)
    assert first == second
    assert find_volatile(first) == ()
    assert said == "date 1: 2026-11-26\ncounter 2: turn 3 of 9"
    assert move_to_tail("Be brief.") == ("Be brief.", "")


def test_what_was_left_out_comes_back_byte_for_byte(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    one = ledger()
    result = "größe\r\n" * 4000
    one.append(user("run"), store.message({"role": "tool", "content": result}))
    assert one.n_tokens < 2000
    stub = store.put(result)
    assert stub.uri in one.messages()[-1]["content"]
    one.restore(store, stub.uri, tool_call_id="1")
    assert one.messages()[-1] == {"role": "tool", "tool_call_id": "1", "content": result}
    with pytest.raises(PrefixBroken, match="no UTF-8 text"):
        one.restore(store, store.put(b"\xff").uri)


def long_ledger() -> Ledger:
    one = ledger()
    for i in range(6):
        turn(one, f"question {i} " * 5, f"answer {i} " * 5)
    return one


def test_an_edit_is_priced_before_it_is_made() -> None:
    one = long_ledger()
    before = one.tokens()
    price = one.quote(Drop(3, 6), prefill_tokens_s=1000, block_tokens=16)
    new = one.rewrite(Drop(3, 6))
    assert price.tokens_before == len(before)
    assert price.tokens_after == new.n_tokens
    kept = one.spans[2].stop
    # What follows begins the same way: the end of the model's turn, then the role.
    assert kept <= price.tokens_kept <= kept + 20
    assert before[: price.tokens_kept] == new.tokens()[: price.tokens_kept]
    assert before[price.tokens_kept] != new.tokens()[price.tokens_kept]
    assert price.blocks_kept == price.tokens_kept // 16
    assert price.tokens_to_prefill == new.n_tokens - 16 * price.blocks_kept
    assert price.seconds == price.tokens_to_prefill / 1000
    saved = 0.1 * (price.tokens_before - price.tokens_after)
    assert price.break_even_turns == pytest.approx(0.9 * price.tokens_to_prefill / saved)
    assert one.tokens() == before
    assert "pays from turn" in price.explain()


def test_an_epoch_shares_what_is_before_it_and_keeps_what_was_sampled() -> None:
    one = long_ledger()
    new = one.rewrite(Drop(5, 6))
    assert (new.epoch, new.supersedes) == (1, one.digest)
    assert [a for a in new.spans if a in one.spans] == list(one.spans[:5])
    assert new.messages() == [*one.messages()[:5], *one.messages()[7:]]
    whole = RENDERER.encode(RENDERER.text(new.messages(), tools=TOOLS))
    assert whole[: new.n_tokens] == new.tokens()  # it ends as the model ended


def test_a_summary_stands_where_it_replaced_and_undo_takes_turns_back() -> None:
    one = long_ledger()
    new = one.rewrite(Replace(1, 8, user("summary")), Undo(1))
    assert [m["content"] for m in new.messages()[:2]] == ["You are exact.", "summary"]
    assert len(new.spans) == 1 + 1 + 2
    whole = RENDERER.encode(RENDERER.text(new.messages(), tools=TOOLS))
    assert whole[: new.n_tokens] == new.tokens()


def test_one_message_put_for_another_is_an_edit_too() -> None:
    one = long_ledger()
    for index in (1, 5, 11):
        new = one.rewrite(Replace(index, index, user("other")))
        wanted = one.messages()
        wanted[index] = user("other")
        assert new.messages() == wanted
        whole = RENDERER.encode(RENDERER.text(wanted, tools=TOOLS))
        assert whole[: new.n_tokens] == new.tokens()
        assert new.spans[:index] == one.spans[:index]


def test_what_a_turn_was_made_to_begin_with_survives_an_edit() -> None:
    one = ledger()
    turn(one, "a", "b")
    one.append(user("call"))
    sent = one.request(prefill="<call>")["prompt"]
    assert sent[-6:] == RENDERER.encode("<call>")
    one.commit(
        {"prompt_token_ids": sent, "choices": [{"token_ids": RENDERER.encode("f</call>") + END}]}
    )
    assert one.messages()[-1]["content"] == "<call>f</call>"
    new = one.rewrite(Drop(1, 2))
    whole = RENDERER.encode(RENDERER.text(new.messages(), tools=TOOLS))
    assert whole[: new.n_tokens] == new.tokens()


def test_pinned_spans_survive_every_edit() -> None:
    one = ledger()
    turn(one, "a", "b")
    one.append({"role": "tool", "content": "Error: no such file"}, pin=True)
    turn(one, "c", "d")
    for edit in (Drop(1, 5), Undo(2), Replace(1, 5, user("short"))):
        left = [m["content"] for m in one.rewrite(edit).messages()]
        assert "Error: no such file" in left
        assert "c" not in left


@pytest.mark.parametrize("mark", [{"is_error": True}, {"status": "error"}])
def test_a_tool_s_error_is_pinned_by_itself(mark: dict[str, Any]) -> None:
    one = ledger()
    one.append(user("run"), {"role": "tool", "content": "no such file", **mark},
               {"role": "tool", "content": "fine"})  # fmt: skip
    assert [span.pinned for span in one.spans] == [False, False, True, False]
    assert [m["content"] for m in one.rewrite(Drop(1, 3)).messages()][1:] == ["no such file"]


@pytest.mark.parametrize(
    "edits",
    [[Drop(0, 1)], [Drop(2, 1)], [Drop(1, 99)], [Undo(9)], [Undo(0)], [Drop(1, 2), Drop(2, 3)]],
)  # fmt: skip
def test_an_edit_of_what_is_not_there_is_refused(edits: list[Any]) -> None:
    one = long_ledger()
    with pytest.raises(PrefixBroken):
        one.rewrite(*edits)


def test_an_edit_that_saves_nothing_never_pays() -> None:
    price = long_ledger().quote(Replace(1, 1, user("longer " * 50)), prefill_tokens_s=1000)
    assert math.isinf(price.break_even_turns)
    assert "never pays" in price.explain()


def test_a_saved_ledger_comes_back_and_equal_ones_are_equal_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        one = ledger(cache_salt="s")
        turn(one, "a", "b", end=False)
        one.append({"role": "tool", "content": "x"}, pin=True)
        one.save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o600
    back = Ledger.load(paths[0], RENDERER)
    assert (back.tokens(), back.spans, back.digest) == (one.tokens(), one.spans, one.digest)
    assert (back.session_id, back.cache_salt) == ("planner", "s")
    turn(one, "c", "d")
    turn(back, "c", "d")
    assert back.tokens() == one.tokens()


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    one = ledger()
    turn(one, "a", "b")
    path = tmp_path / "l"
    one.save(path)
    whole = path.read_bytes()
    other = ChatRenderer.of(tokenizer(CHATML))
    with pytest.raises(ConfigError, match="another tokenizer"):
        Ledger.load(path, other)
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=r"is damaged|no ledger") as raised:
            Ledger.load(path, RENDERER)
        assert str(path) in str(raised.value)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ConfigError):
            Ledger.load(path, RENDERER)


def test_the_head_is_the_templates_own_with_and_without_system_and_tools() -> None:
    for system in ("You are exact.", None):
        for tools in (TOOLS, []):
            one = Ledger.open(RENDERER, system=system, tools=tools)
            one.append(user("x"))
            first = [] if system is None else [{"role": "system", "content": system}]
            whole = RENDERER.text([*first, user("x")], tools=tools, generation=True)
            assert one.request()["prompt"] == RENDERER.encode(whole)
    assert "tools" in TOOLS_FIRST


def test_the_file_is_what_the_formats_page_says(tmp_path: Path) -> None:
    import msgpack
    import xxhash

    page = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text()
    grammar = page.partition("## A ledger, version 1")[2].partition("```\n\n")[0]
    fields = re.findall(r"^  (\w+)  ", grammar, re.MULTILINE)
    one = ledger()
    turn(one, "a", "b")
    one.save(tmp_path / "l")
    data = (tmp_path / "l").read_bytes()
    assert f'"{data[:8].decode()}"' in grammar
    assert int.from_bytes(data[8:16], "little") == xxhash.xxh3_64_intdigest(data[16:])
    told = msgpack.unpackb(data[16:])
    assert list(told) == fields
    span_fields = re.search(r"spans +array of maps: ([\w, ]+)", grammar)
    assert span_fields is not None
    assert [list(span) for span in told["spans"]] == [span_fields[1].split(", ")] * 3
    ids = array("I")
    ids.frombytes(told["ids"])
    assert ids.tolist() == one.tokens()


def test_the_first_request_of_an_epoch_says_that_the_one_before_is_superseded() -> None:
    told = {"version": 1, "actions": [{"do": "supersede", "session": ""}]}
    one = ledger()
    turn(one, "first", "yes")
    turn(one, "second", "no")
    one.append(user("third"))
    assert "kv_transfer_params" not in one.request(model="m")
    one.retract()
    two = one.rewrite(Drop(1, 2)).fork("planner")  # a turn is asked on a fork of its own
    body = two.request(model="m", kv_transfer_params={"kvmem": {"load": True}})
    assert body["kv_transfer_params"] == {"kvmem": {"load": True, "hints": told}}
    assert [type(action) for action in read_hints(told).actions] == [Supersede]
    two.retract()
    mine = {"kvmem": {"hints": {"version": 1, "actions": []}}}
    assert two.request(model="m", kv_transfer_params=mine)["kv_transfer_params"] == mine
    two.retract()
    assert two.request("chat", model="m")["kv_transfer_params"]["kvmem"]["hints"] == told
    two.retract()
    assert "kv_transfer_params" not in two.fork("another").request(model="m")
    two.commit(answer(two, "done"))
    two.append(user("fourth"))
    assert "kv_transfer_params" not in two.request(model="m")
