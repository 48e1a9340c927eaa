"""What the gateway does when something fails: clients, the engine, the gateway itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks._fake_engine import Reply, Serving
from kvmem.agents.gateway.app import Gateway
from kvmem.agents.gateway.settings import Settings, pairs
from kvmem.errors import ConfigError
from tests.gateways import SYSTEM, Start, ask, engine_of, streamed, whole

USER = {"role": "user", "content": "a"}
LONG = "one two three four five six seven eight nine ten"


def test_a_client_that_hangs_up_ends_the_engines_request(start: Start, folder: Path) -> None:
    engine = engine_of(folder, say=lambda n, body: Reply(LONG, hold_after=9 if n == 0 else None))
    one = start(engine=engine)
    seen, tokens = "", 0
    with one.client.chat.completions.create(
        model="fake", messages=[SYSTEM, USER], stream=True
    ) as stream:
        for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
            tokens += bool(chunk.choices[0].delta.content)
            if tokens == 9:
                break
    assert engine.aborted.wait(10)
    # What it has seen is committed: going on from there is an extension.
    said = {"role": "assistant", "content": seen}
    usage = ask(one, [SYSTEM, USER, said, {"role": "user", "content": "go on"}]).usage
    assert usage.kvmem["miss"] == "none"
    assert engine.prompts[1][: len(engine.prompts[0])] == engine.prompts[0]


def test_a_client_that_hangs_up_before_the_answer_ends_it_too(start: Start, folder: Path) -> None:
    engine = engine_of(folder, say=lambda n, body: Reply(LONG, hold_after=0))
    one = start(engine=engine)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            one.url + "/v1/chat/completions",
            json={"model": "fake", "messages": [USER], "stream": True},
            timeout=1.0,
        )
    assert engine.aborted.wait(10)
    engine.go_on()


def test_an_engine_that_is_not_there_is_told_and_found_when_it_is_back(
    start: Start, folder: Path
) -> None:
    engine = engine_of(folder)
    with Serving(engine) as behind:
        one = start(engine=engine, upstream=behind.url)
        messages: list[Any] = [SYSTEM, USER]
        said, _ = whole(one, messages)
        messages += [said, {"role": "user", "content": "b"}]
    with pytest.raises(openai.InternalServerError, match="Start the server"):
        ask(one, messages)
    engine.forget()
    with Serving(engine, port=behind.port):
        usage = ask(one, messages).usage
        # The session is as it was; the engine has lost its cache.
        assert usage.kvmem["committed_tokens"] > 0
        assert usage.kvmem["miss"] == "engine_evicted"


def test_an_engine_that_breaks_off_is_an_error_in_the_stream(start: Start, folder: Path) -> None:
    engine = engine_of(folder, say=lambda n, body: Reply(LONG, break_after=3 if n == 0 else None))
    one = start(engine=engine)
    with pytest.raises(openai.APIError, match="closed the connection"):
        streamed(one, [SYSTEM, USER])
    assert streamed(one, [SYSTEM, USER])[0]["content"] == LONG


def test_what_the_engine_refuses_comes_in_its_words(start: Start) -> None:
    one = start()
    one.engine.refuse = (400, "max_tokens is too large")
    with pytest.raises(openai.BadRequestError, match="max_tokens is too large"):
        ask(one, [USER])
    with pytest.raises(openai.NotFoundError, match="The model `other` does not exist"):
        one.client.chat.completions.create(model="other", messages=[USER])  # type: ignore[list-item]


def test_an_engine_that_says_nothing_is_given_up(start: Start, folder: Path) -> None:
    engine = engine_of(folder, say=lambda n, body: Reply(LONG, hold_after=2))
    one = start(engine=engine, timeout_s=0.3)
    with pytest.raises(openai.APIError, match=r"sent nothing for 0\.3 s"):
        streamed(one, [USER])
    engine.go_on()


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": 1}', b'"a"'])
def test_a_body_that_is_none_is_refused(start: Start, body: bytes) -> None:
    told = httpx.post(start().url + "/v1/chat/completions", content=body)
    assert told.status_code == 400
    assert told.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("messages", [None, [], [1], [{"role": 1}], [{"content": "a"}]])
def test_messages_that_are_none_are_the_engines_to_refuse(start: Start, messages: Any) -> None:
    one = start()
    one.engine.refuse = (400, "no such messages")
    body = {"model": "fake", "messages": messages}
    told = httpx.post(one.url + "/v1/chat/completions", json=body)
    assert (told.status_code, told.json()["error"]["message"]) == (400, "no such messages")


ODD = [
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [5]}]},
    {"messages": [{"role": "assistant", "tool_calls": 5}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
    *({name: odd} for name in ("tools", "chat_template_kwargs", "kv_transfer_params")
      for odd in (5, [5], "a")),
    {"stream_options": 5}, {"session_id": 5}, {"prompt_cache_key": {}}, {"cache_salt": []},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_fields_of_other_kinds_are_the_engines_to_refuse(start: Start, odd: Any) -> None:
    one = start()
    one.engine.refuse = (400, "the engine's words")
    body = {"model": "fake", "messages": [USER], **odd}
    told = httpx.post(one.url + "/v1/chat/completions", json=body)
    assert (told.status_code, told.json()["error"]["message"]) == (400, "the engine's words")


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("odd", [{}, {"messages": 5, "input": 5}, {"messages": [5], "input": [5]}])
def test_other_forms_are_refused_by_name(start: Start, path: str, odd: Any) -> None:
    told = httpx.post(start().url + path, json={"model": "fake", "max_tokens": 5, **odd})
    assert told.status_code == 400
    assert told.json()["error"]["type"] == "invalid_request_error"


def test_a_disk_that_fails_costs_no_answer(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmem.context import Ledger

    one = start(sessions=tmp_path)
    said, _ = whole(one, [SYSTEM, USER])
    (before,) = tmp_path.rglob("*.ledger")

    def full(self: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "save", full)
    more = [SYSTEM, USER, said, USER]
    said, usage = whole(one, more)
    assert usage.kvmem["miss"] == "none"
    assert whole(one, [*more, said, USER])[1].kvmem["miss"] == "none"
    assert list(tmp_path.rglob("*.ledger")) == [before]


def test_an_upstream_that_is_no_engine_is_told() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"<html>"})

    with Serving(app) as behind:
        gateway = Gateway(Settings(upstreams=(behind.url,)))
        with Serving(gateway, lifespan="on") as front:
            body = {"model": "fake", "messages": [USER]}
            told = httpx.post(front.url + "/v1/chat/completions", json=body)
    assert told.status_code == 502
    assert "is no list of models" in told.json()["error"]["message"]


def test_a_body_that_is_too_long_is_refused(start: Start) -> None:
    one = start(max_body_mb=0.001)
    for content in (b"a" * 2000, (b"a" * 500 for _ in range(4))):
        told = httpx.post(one.url + "/v1/chat/completions", content=content)
        assert told.status_code == 413
    assert one.engine.bodies == []


def test_a_body_that_does_not_come_is_given_up(start: Start) -> None:
    import socket

    one = start(head_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", int(one.url.rpartition(":")[2]))) as slow:
        slow.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]


def test_more_than_run_and_wait_are_refused(start: Start, folder: Path) -> None:
    engine = engine_of(folder, say=lambda n, body: Reply(LONG, hold_after=1))
    one = start(engine=engine, max_streams=1)
    threads = []
    for waiting in (0, 1):
        threads.append(threading.Thread(target=streamed, args=(one, [USER])))
        threads[-1].start()
        if not waiting:
            assert engine.holding.wait(10)
    # The second waits for the place of the first; asked until it does, the third is refused.
    refused = None
    while refused is None or refused.status_code != 429:
        if refused is not None:
            assert one.gateway._waiting <= 1
        if one.gateway._waiting == 1:
            refused = httpx.post(
                one.url + "/v1/chat/completions", json={"model": "fake", "messages": [USER]}
            )
    assert refused.headers["retry-after"] == "1"
    engine.go_on()
    for thread in threads:
        thread.join()
    assert len(engine.bodies) == 2


def test_a_token_is_asked_for(start: Start) -> None:
    one = start(token="secret", upstream_key="engine's")
    with pytest.raises(openai.AuthenticationError):
        ask(one, [USER])
    with openai.OpenAI(base_url=one.url + "/v1", api_key="secret", max_retries=0) as client:
        client.chat.completions.create(model="fake", messages=[USER])  # type: ignore[list-item]
    assert one.engine.sent[-1]["authorization"] == "Bearer engine's"
    assert httpx.get(one.url + "/health").status_code == 200


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host": "0.0.0.0"}, "KVMEM_GATEWAY_TOKEN"),
        ({"upstreams": ()}, "--upstream"),
        ({"upstreams": ("ftp://a",)}, "--upstream ftp://a"),
        ({"max_streams": 0}, "max_streams"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings(**{"upstreams": ("http://127.0.0.1:1",), **settings}).check()
    Settings(upstreams=("http://127.0.0.1:1",), host="0.0.0.0", token="a").check()


def test_tokenizers_are_given_by_model() -> None:
    assert pairs(["a/b=c=/d"]) == {"a/b=c": Path("/d")}
    with pytest.raises(ConfigError, match="--tokenizer /d names no model"):
        pairs(["/d"])


def test_prompts_are_never_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    one = start()
    secret = "a-word-of-the-prompt"
    with caplog.at_level("DEBUG"):
        ask(one, [{"role": "user", "content": secret}])
        one.gateway.models.get = None  # type: ignore[assignment]
        with pytest.raises(openai.InternalServerError, match="The gateway failed; see its log"):
            ask(one, [{"role": "user", "content": secret}])
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("kvmem")]
    assert any("a request failed" in line for line in ours)
    assert all(secret not in line for line in ours)


def _gateway(upstream: str, sessions: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmem.cli", "gateway", "--upstream", upstream, "--port", "0",
         "--sessions", str(sessions)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("kvmem gateway: http://127.0.0.1:"), line
    return process, line.split()[-1]


def test_a_gateway_killed_in_a_stream_has_lost_no_session(tmp_path: Path, folder: Path) -> None:
    engine = engine_of(folder, say=lambda n, body: Reply(LONG, hold_after=5 if n == 2 else None))
    messages: list[Any] = [SYSTEM, USER]
    with Serving(engine) as behind:
        process, url = _gateway(behind.url, tmp_path)
        try:
            with openai.OpenAI(base_url=url + "/v1", api_key="a", max_retries=0) as client:
                for _ in range(2):
                    told = client.chat.completions.create(model="fake", messages=messages)
                    messages += [told.choices[0].message.model_dump(exclude_none=True), USER]
                broken = client.chat.completions.create(
                    model="fake", messages=messages, stream=True
                )
                next(iter(broken))
                assert engine.holding.wait(10)
                os.kill(process.pid, signal.SIGKILL)
                with pytest.raises(openai.APIConnectionError):
                    list(broken)
        finally:
            process.kill()
            process.communicate()
        engine.go_on()
        process, url = _gateway(behind.url, tmp_path)
        try:
            with openai.OpenAI(base_url=url + "/v1", api_key="a", max_retries=0) as client:
                told = client.chat.completions.create(model="fake", messages=messages)
        finally:
            process.terminate()
            process.communicate()
    assert process.returncode in {0, -signal.SIGTERM}
    usage: Any = told.usage
    assert usage.kvmem["miss"] == "none"
    assert usage.prompt_tokens_details.cached_tokens >= usage.kvmem["ideal_tokens"] > 0
    assert engine.prompts[3] == engine.prompts[2]
