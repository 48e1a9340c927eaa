"""Predicted cached tokens: whole blocks, never the last token, an engine that forgets nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvmem.explain.lint import PrefixCache, Tokens, lint_file, predict_cached_tokens
from kvmem.explain.lint.cached import IdCache
from tests.logs import conversation, linted, next_turn, write


def test_only_whole_blocks_are_found() -> None:
    first, second = list(range(40)), [*range(40), 7, 8]
    assert list(predict_cached_tokens([first, second], block_tokens=16)) == [0, 32]


def test_the_last_token_is_never_found() -> None:
    prompt = list(range(32))
    assert list(predict_cached_tokens([prompt, prompt, [*prompt, 1]])) == [0, 16, 32]


def test_a_reply_fills_blocks_but_for_its_last_token() -> None:
    for n_reply, cached in ((4, 0), (5, 16)):
        cache = PrefixCache(16)
        cache.find(list(range(12)), output=list(range(12, 12 + n_reply)))
        assert cache.find([*range(16), 99]) == cached


def test_the_least_lately_used_leaf_leaves_first() -> None:
    cache = PrefixCache(2, most_blocks=4)
    cache.find([1, 2, 3, 4, 5, 6])
    cache.find([7, 8, 9, 10])  # five blocks: the last of the first prompt leaves
    assert cache.find([1, 2, 3, 4, 5, 6, 7]) == 4


def test_ids_are_forgotten_by_scope_when_there_are_too_many() -> None:
    cache = IdCache(most_ids=4)
    for scope in "ab":
        assert cache.find([1, 2, 3], known=0, scope=scope, tokens=None, per_id=16) == 0
    assert cache.find([1, 2, 3, 4], known=3, scope="b", tokens=None, per_id=16) == 48
    assert cache.find([1, 2, 3, 4], known=3, scope="a", tokens=None, per_id=16) == 0


def test_a_traces_blocks_are_found_within_their_scope(tmp_path: Path) -> None:
    def rows(scope: str) -> list[object]:
        header = {"kvtrace": 1, "kind": "blocks", "block_size": 64, "hash_scope": scope}
        calls = [
            {"id": 0, "session": "a", "block_hashes": [1, 2, 3], "input_len": 192},
            {"id": 1, "session": "b", "block_hashes": [1, 2, 3], "input_len": 193},
        ]
        return [header, *calls]

    for scope, cached in (("session", 0), ("global", 192)):
        path = write(tmp_path / f"{scope}.jsonl", rows(scope))
        assert lint_file(path).cached == cached


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("block_tokens", [1, 16, 128])
def test_a_log_of_messages_is_predicted_as_its_token_ids(block_tokens: int, tmp_path: Path) -> None:
    bodies = [conversation()]
    for _ in range(3):
        bodies.append(next_turn(bodies[-1]))
    bodies[3]["messages"][4]["content"] = "Three."
    for body in bodies:
        del body["tools"], body["messages"][2]["tool_calls"]
        del body["messages"][2]["reasoning_content"]
    prompts = [
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in body["messages"])
        + "<|im_start|>assistant\n"
        for body in bodies
    ]
    report = linted(
        tmp_path, *bodies, measure=Tokens(encode), block_tokens=block_tokens, with_requests=True
    )
    expected = list(predict_cached_tokens(map(encode, prompts), block_tokens=block_tokens))
    assert [request.cached for request in report.requests] == expected
    assert [request.prompt for request in report.requests] == [len(p.encode()) for p in prompts]
    (found,) = report.breaks
    last = prompts[3].encode()
    assert found.at == next(
        i for i, (a, b) in enumerate(zip(prompts[2].encode(), last, strict=False)) if a != b
    )
    reach = min(len(prompts[2]) - len("<|im_start|>assistant\n"), len(last) - 1)
    assert found.lost_tokens == reach // block_tokens * block_tokens - expected[3]


def test_what_another_model_or_salt_was_sent_is_not_found(tmp_path: Path) -> None:
    def request(session: str, **more: Any) -> str:
        message = {"role": "user", "content": "one two three four five six seven " * 9}
        return json.dumps({"session_id": session, "request": {"messages": [message], **more}})

    log = tmp_path / "log.jsonl"
    lines = [
        request("a", model="g"), request("b", model="h"), request("c", model="g", cache_salt="x"),
        request("d", model="g"), request("e", model="g", cache_salt="x"),
    ]  # fmt: skip
    log.write_text("\n".join(lines) + "\n")
    found = [one.cached for one in lint_file(log, with_requests=True).requests]
    assert found[:3] == [0, 0, 0]
    assert found[3] == found[4] > 100
    cache = PrefixCache(4)
    assert cache.find(list(range(9)), place="g") == 0
    assert cache.find(list(range(9)), place="h") == 0
    assert cache.find(list(range(9))) == 0
    assert cache.find(list(range(9)), place="g") == 8
