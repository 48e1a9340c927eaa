"""A conversation that only grows never breaks; one edit of its past always does, and there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmem.explain.lint import Break, Call, Characters, Linter, PrefixCache, Tokens
from kvmem.explain.lint.lint import lint_file
from kvmem.explain.lint.readers.parts import message_part
from tests.logs import write

Messages = list[dict[str, Any]]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
thoughts = st.one_of(st.none(), texts)
replies = st.builds(
    lambda text, thought, arguments: {
        "role": "assistant",
        "content": text,
        **({"reasoning_content": thought} if thought else {}),
        **(
            {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
            if arguments
            else {}
        ),
    },
    texts,
    thoughts,
    st.sampled_from(["", "{}", '{"a": 1, "b": [2]}']),
)
others = st.builds(
    lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "tool"]), texts
)
turns = st.lists(st.tuples(others, replies), min_size=2, max_size=8)
heads = st.lists(st.builds(lambda text: {"role": "system", "content": text}, texts), max_size=1)


def prompts(head: Messages, turns: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Messages]:
    """Each prompt of the conversation: all up to a message that waits for a reply."""
    sent, so_far = [], list(head)
    for asked, reply in turns:
        so_far = [*so_far, asked]
        sent.append(so_far)
        so_far = [*so_far, reply]
    return sent


def breaks(sent: list[Messages], measure: Characters | Tokens) -> tuple[Break, ...]:
    linter = Linter("log", measure)
    for line, messages in enumerate(sent, 1):
        parts = [message_part(message, i) for i, message in enumerate(messages)]
        linter.call(Call(line, "s", "main", parts=parts))
    return linter.tally.report("log").breaks


def measures() -> list[Characters | Tokens]:
    return [Characters(), Tokens(lambda text: list(text.encode()))]


@given(heads, turns)
def test_a_conversation_that_is_appended_to_never_breaks(
    head: Messages, turns: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    for measure in measures():
        assert breaks(prompts(head, turns), measure) == ()


@given(heads, turns, st.data())
def test_one_edit_is_one_break_at_its_place(
    head: Messages, turns: list[tuple[dict[str, Any], dict[str, Any]]], data: st.DataObject
) -> None:
    sent = copy.deepcopy(prompts(head, turns))
    turn = data.draw(st.integers(1, len(sent) - 1), label="turn")
    index = data.draw(st.integers(0, len(sent[turn - 1]) - 1), label="message")
    old = sent[turn][index]["content"]
    at = data.draw(st.integers(0, len(old)), label="at")
    new = old[:at] + data.draw(st.sampled_from("ab \n{é"), label="inserted") + old[at:]
    for later in sent[turn:]:
        later[index] = {**later[index], "content": new}
    for measure in measures():
        (found,) = breaks(sent, measure)
        assert (found.turn, found.message, found.line) == (turn, index, turn + 1)
        assert found.at == first_difference(sent[turn - 1], sent[turn], measure)


def first_difference(before: Messages, now: Messages, measure: Characters | Tokens) -> int:
    """The first unit that differs, found the slow way."""
    one, other = (
        [unit for i, m in enumerate(messages) for unit in measure.units(message_part(m, i))]
        for messages in (before, now)
    )
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


@given(data=st.data())
def test_an_edited_trace_of_tokens_breaks_at_the_edit(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=60))
    more = data.draw(st.lists(st.integers(0, 9), max_size=9))
    at = data.draw(st.integers(0, len(tokens) - 1))
    edited = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :], *more]
    folder: Path = tmp_path_factory.mktemp("trace")
    rows = [
        {"id": 0, "session": "s", "token_ids": tokens},
        {"id": 1, "session": "s", "base": 0, "keep": at, "token_ids": edited[at:]},
        {"id": 2, "session": "s", "base": 1, "keep": len(edited), "token_ids": [1]},
    ]
    path = write(folder / "t.jsonl", [{"kvtrace": 1, "kind": "token_ids"}, *rows])
    (found,) = lint_file(path).breaks
    assert (found.at, found.line) == (at, 3)


@given(st.lists(st.lists(st.integers(0, 1), max_size=40), max_size=12), st.integers(1, 8))
def test_predicted_tokens_are_those_of_an_engine_that_forgets_nothing(
    sent: list[list[int]], block_tokens: int
) -> None:
    cache = PrefixCache(block_tokens)
    blocks: set[tuple[int, ...]] = set()
    for prompt in sent:
        longest = 0
        for end in range(block_tokens, len(prompt), block_tokens):
            if tuple(prompt[:end]) not in blocks:
                break
            longest = end
        assert cache.find(prompt) == longest
        blocks |= {
            tuple(prompt[:end]) for end in range(block_tokens, len(prompt) + 1, block_tokens)
        }
