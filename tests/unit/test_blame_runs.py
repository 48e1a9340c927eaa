"""What blame reads and whom it asks: runs of messages and of ledgers, and a server over HTTP."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvmem.blame import read_run, try_turn
from kvmem.blame.ledgers import is_ledgers
from kvmem.blame.runs import runs_in
from kvmem.blame.scorer import FRESH
from kvmem.blame.served import ServedScorer
from kvmem.context import BlobStore, ChatRenderer, Ledger, Replace
from kvmem.errors import ConfigError, EngineError
from tests import tiny_tokenizers
from tests.unit.test_blame import ASKED, FULL, USER, Reader, looks_up


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer.of(tiny_tokenizers.tokenizer())


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_of_messages_is_read(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    told = {"question": ASKED["content"], "served": [USER], "expected": "4300", "kv": "int2"}
    path.write_text(json.dumps({"blame": 1, "session": "s", "history": FULL, "turns": [told]}))
    (one,) = read_run(path)
    assert (one.name, len(one.full), len(one.served), one.kv) == ("s/0", 7, 1, "int2")
    assert one.full[2].arguments == ("billing", "timeout_ms")
    assert runs_in(tmp_path) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"blame": 2, "turns": []}', '{"blame": 1}', '{"blame": 1, "turns": [{}]}',
        '{"blame": 1, "turns": [{"question": "?", "evidence": [3]}]}',
        '{"blame": 1, "turns": [{"question": "?", "history": [{"content": "x"}]}]}',
        '{"blame": 1, "turns": [{"question": "?", "epochs": [{"number": 1, "removed": [9]}]}]}',
        '{"blame": 1, "turns": [], "more": 1}', '{"blame": 1, "turns": ' + "[" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused_with_the_page_that_says_why(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"docs/blame\.md"):
        read_run(path)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        runs_in(tmp_path)


def answered(ledger: Ledger, text: str, renderer: ChatRenderer) -> list[int]:
    sent = ledger.request()["prompt"]
    ids = renderer.encode(text)
    ledger.commit({"prompt_token_ids": sent, "choices": [{"token_ids": ids}]})
    return list(sent)


def test_ledgers_give_the_very_prompt_the_undone_epoch_and_the_restored_span(
    tmp_path: Path, renderer: ChatRenderer
) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    first = Ledger.open(renderer, system="Be brief.", session_id="s")
    stub = blobs.put("billing timeout_ms = 4300", preview_chars=4)
    first.append(USER, {"role": "tool", "content": stub.text}, {"role": "user", "content": "Hm?"})
    first.save(tmp_path / "0.ledger")
    second = first.rewrite(Replace(2, 3, {"role": "user", "content": "Summary: nothing."}))
    second.append(ASKED)
    sent = answered(second, "900", renderer)
    second.save(tmp_path / "1.ledger")
    (tmp_path / "expect.json").write_text(
        json.dumps({"0": {"expected": "4300", "candidates": ["900"]}})
    )
    assert is_ledgers(tmp_path)
    (one,) = read_run(tmp_path, renderer)
    assert list(one.served_ids) == sent
    assert (one.answered, one.expected, one.asked) == ("900", "4300", ASKED["content"])
    assert [p.text for p in one.served] == [USER["content"], "Summary: nothing."]
    assert [p.text for p in one.full] == [USER["content"], "billing timeout_ms = 4300", "Hm?"]
    assert one.epochs[0].removed == (1, 2)
    verdict = try_turn(one, renderer, Reader(renderer, looks_up))
    assert (verdict.fault, verdict.cause, verdict.epoch) == ("context", "lost", 1)
    (tmp_path / "0.ledger").unlink()
    with pytest.raises(ConfigError, match="supersedes"):
        read_run(tmp_path, renderer)
    with pytest.raises(ConfigError, match="renderer"):
        read_run(tmp_path)


def test_a_question_that_is_asked_again_knows_what_came_before_it(
    tmp_path: Path, renderer: ChatRenderer
) -> None:
    one = Ledger.open(renderer, system="Be brief.", session_id="s")
    sent = []
    for said in ("900", "7"):
        one.append(ASKED)
        sent.append(answered(one, said, renderer))
    one.save(tmp_path / "0.ledger")
    first, second = read_run(tmp_path, renderer)
    assert [list(first.served_ids), list(second.served_ids)] == sent
    assert (first.full, first.answered, second.answered) == ((), "900", "7")
    assert [p.text for p in second.full] == [p.text for p in second.served]
    assert [p.text for p in second.full] == [ASKED["content"], "900"]


# -- the server ------------------------------------------------------------------------------------


class Server:
    """/v1/completions of a model whose next token's logprob is minus its id over ten."""

    def __init__(self, **change: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.change = change

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "smol"}]})
        body = json.loads(request.content)
        self.bodies.append(body)
        top = {f"token_id:{t}": -t / 10 for t in body.get("logprob_token_ids", ())}
        choices = [
            {"index": i, "logprobs": {"top_logprobs": [top]}, "token_ids": [5, 6]}
            for i in range(len(body["prompt"]))
        ]
        told = {"choices": choices[::-1], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}}
        return httpx.Response(self.change.get("status", 200), json={**told, **self.change})

    def scorer(self) -> ServedScorer:
        return ServedScorer("http://engine/v1", transport=httpx.MockTransport(self))


def test_candidates_are_forced_token_by_token_and_what_they_share_once() -> None:
    server = Server()
    told = server.scorer().score([1, 2], [[10, 20], [10, 30, 40], [50]])
    assert told.logprobs == pytest.approx((-3.0, -8.0, -5.0))
    assert (told.prompt_tokens, told.cached_tokens) == (2, 2)
    root, rest = server.bodies
    assert (root["prompt"], root["logprob_token_ids"]) == ([[1, 2]], [10, 50])
    assert rest["prompt"] == [[1, 2, 10], [1, 2, 10, 30]]
    assert "prompt_logprobs" not in root  # it turns the reading of the prefix cache off


def test_fresh_kv_is_asked_under_a_salt_that_is_nobody_elses() -> None:
    server, other = Server(), Server()
    one = server.scorer()
    one.score([1], [[2]], salt="tenant")
    one.score([1], [[2]], kv=FRESH, salt="tenant")
    one.score([1], [[2]], kv=FRESH)
    other.scorer().score([1], [[2]], kv=FRESH)
    salts = [b.get("cache_salt") for b in (*server.bodies, *other.bodies)]
    assert salts[0] == "tenant"
    assert salts[1] == salts[2] != salts[3]
    assert not set(salts[1]) & set("@/\\\0")  # vLLM refuses those, and more than 128 characters
    assert len(salts[1]) <= 128


@pytest.mark.parametrize(
    "change", [{"status": 400}, {"choices": []}, {"choices": [{"index": 0, "logprobs": None}]}]
)
def test_an_answer_that_is_none_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        Server(**change).scorer().score([1], [[2]])


def test_a_server_serves_no_codec_on_demand_and_scores_nothing_empty() -> None:
    one = Server().scorer()
    with pytest.raises(ConfigError, match="int2"):
        one.score([1], [[2]], kv="int2")
    for prefix, candidates in (([], [[1]]), ([1], []), ([1], [[]])):
        with pytest.raises(ConfigError):
            one.score(prefix, candidates)
    with pytest.raises(ConfigError, match="address"):
        ServedScorer("engine:8000")


def test_a_long_list_of_branches_is_asked_in_parts() -> None:
    server = Server()
    many = [[i] for i in range(300)]
    told = server.scorer().score([1], many)
    assert told.logprobs == pytest.approx([-i / 10 for i in range(300)])
    assert [len(b["logprob_token_ids"]) for b in server.bodies] == [128, 128, 44]
    assert math.isfinite(sum(told.logprobs))
