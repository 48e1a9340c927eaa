"""The gateway before an engine that computes nothing: sessions, and the reasons of misses."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from benchmarks._fake_engine import Serving
from kvmem.agents.gateway.app import Gateway
from kvmem.agents.gateway.settings import Settings
from kvmem.errors import ConfigError
from tests.gateways import SYSTEM, TOOLS, Start, ask, engine_of, streamed, whole


@pytest.mark.parametrize("how", [whole, streamed])
@pytest.mark.parametrize("named", [{}, {"session_id": "s"}, {"prompt_cache_key": "k"}])
def test_every_turn_of_a_tool_loop_extends_the_last_by_ids(
    start: Start, how: Any, named: dict[str, str]
) -> None:
    one = start()
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "What is there?"}]
    before: list[int] = []
    for turn in range(6):
        message, usage = how(one, messages, tools=TOOLS, extra_body=named)
        prompt = one.engine.prompts[-1]
        told = usage.kvmem
        if turn:
            assert prompt[: len(before)] == before
            assert told["miss"] == "none"
            assert told["committed_tokens"] == len(before)
            assert usage.prompt_tokens_details.cached_tokens == told["ideal_tokens"] > 0
            assert told["found_by"] == (next(iter(named)) if named else "prefix")
        else:
            assert told["miss"] == "new_session"
        said = one.engine.say(turn, {"tools": TOOLS}).text
        before = [*prompt, *one.engine.encode(said), one.engine.end]
        messages.append(message)
        for call in message.get("tool_calls") or ():
            arguments = json.loads(call["function"]["arguments"])
            # As many frameworks do: other blanks, an id of their own.
            call["function"]["arguments"] = json.dumps(arguments, separators=(",", ":"))
            call["id"] = f"mine-{turn}"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "a chair"})
        if not message.get("tool_calls"):
            message["content"] = message["content"].strip()
            messages.append({"role": "user", "content": [{"type": "text", "text": "Go on."}]})
    assert len(one.gateway.sessions) == 1


def test_the_first_prompt_is_the_servers_own_rendering(start: Start) -> None:
    one = start()
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}
    messages: list[Any] = [
        SYSTEM,
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "größe"},
    ]
    ask(one, messages, tools=TOOLS)
    assert one.engine.prompts[0] == one.engine.render(json.loads(json.dumps(messages)), TOOLS)


def test_an_edited_history_is_answered_and_told(start: Start) -> None:
    one = start()
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "First?"}]
    for _ in range(2):
        said, _ = whole(one, messages, extra_body={"session_id": "s"})
        messages += [said, {"role": "user", "content": "And then?"}]
    edited = [*messages[:3], {"role": "user", "content": "Something else?"}]
    answer, usage = whole(one, edited, extra_body={"session_id": "s"})
    assert answer["content"]
    told = usage.kvmem
    assert (told["miss"], told["message"], told["fields"]) == ("messages_changed", 3, ["content"])
    # What stands before the edit is still the sampled ids, and is found.
    assert told["committed_tokens"] > 0
    assert usage.prompt_tokens_details.cached_tokens >= told["ideal_tokens"] > 0
    # It reads what was asked now: the same as the server would render, but for what was sampled.
    assert one.engine.prompts[-1] == one.engine.render(edited)


@pytest.mark.parametrize(
    ("change", "miss"),
    [
        ({"messages": [{"role": "system", "content": "Other."}]}, "system_changed"),
        ({"tools": TOOLS[:1]}, "tools_changed"),
        ({"messages": [SYSTEM, {"role": "user", "content": "Other?"}]}, "messages_changed"),
    ],
)
def test_a_named_session_says_what_broke_it(
    start: Start, change: dict[str, Any], miss: str
) -> None:
    one = start()
    first: dict[str, Any] = {"messages": [SYSTEM, {"role": "user", "content": "a"}], "tools": TOOLS}
    more = {"model": "fake", "extra_headers": {"X-Session-ID": "s"}}
    one.client.chat.completions.create(**first, **more)
    changed = {**first, **change}
    changed["messages"] = [*changed["messages"], {"role": "user", "content": "b"}]
    usage = one.client.chat.completions.create(**changed, **more).usage
    assert usage.kvmem["miss"] == miss
    assert one.engine.bodies[-1]["session_id"] == "s"


def test_hints_in_a_header_go_where_the_engine_takes_them(start: Start) -> None:
    one = start()
    headers = {"X-Session-ID": "s", "X-Agent-Hint": "retain; for_s=60, session_end"}
    messages = [SYSTEM, {"role": "user", "content": "a"}]
    ask(one, messages, extra_headers=headers)
    body = one.engine.bodies[-1]
    assert body["session_id"] == "s"
    assert body["kv_transfer_params"]["kvmem"]["hints"] == {
        "version": 1, "actions": [{"do": "retain", "for_s": 60}, {"do": "session_end"}],
    }  # fmt: skip
    mine = {"kvmem": {"hints": {"version": 1, "actions": []}, "load": False}}
    ask(one, messages, extra_headers=headers, extra_body={"kv_transfer_params": mine})
    assert one.engine.bodies[-1]["kv_transfer_params"]["kvmem"] == mine["kvmem"]


def test_the_same_request_again_is_no_miss(start: Start) -> None:
    one = start()
    messages = [SYSTEM, {"role": "user", "content": "a"}]
    ask(one, messages)
    usage = ask(one, messages).usage
    assert usage.kvmem["miss"] == "none"
    assert usage.kvmem["committed_tokens"] > 0


def test_parallel_turns_of_one_session_are_branches(start: Start) -> None:
    one = start()
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "a"}]
    said, _ = whole(one, messages)
    both = [[*messages, said, {"role": "user", "content": text}] for text in ("b", "c")]
    for branch in both:
        answer, _ = whole(one, branch)
        branch += [answer, {"role": "user", "content": "more"}]
    for branch in both:
        assert whole(one, branch)[1].kvmem["miss"] == "none"


def test_every_choice_can_be_gone_on_from(start: Start) -> None:
    one = start()
    turn_messages: list[Any] = [SYSTEM, {"role": "user", "content": "a"}]
    told = ask(one, turn_messages, n=2, extra_body={"fake_choices": ["x y", "z"]})
    assert [c.message.content for c in told.choices] == ["x y", "z"]
    for choice in told.choices:
        said = {"role": "assistant", "content": choice.message.content}
        usage = ask(one, [*turn_messages, said, {"role": "user", "content": "b"}]).usage
        assert usage.kvmem["miss"] == "none"


def test_an_evicted_prefix_is_the_engines_miss(start: Start) -> None:
    one = start()
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "a"}]
    said, _ = whole(one, messages)
    one.engine.forget()
    usage = ask(one, [*messages, said, {"role": "user", "content": "b"}]).usage
    assert usage.kvmem["miss"] == "engine_evicted"
    assert usage.prompt_tokens_details.cached_tokens == 0 < usage.kvmem["ideal_tokens"]


def test_salts_and_keys_share_nothing(start: Start) -> None:
    one = start()
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "a"}]
    said, _ = whole(one, messages)
    more = [*messages, said, {"role": "user", "content": "b"}]
    usage = ask(one, more, extra_body={"cache_salt": "mine"}).usage
    assert usage.kvmem["miss"] == "new_session"
    assert one.engine.bodies[-1]["cache_salt"] == "mine"
    with OpenAI(base_url=one.url + "/v1", api_key="another", max_retries=0) as other:
        told = other.chat.completions.create(model="fake", messages=more).usage
    assert told.kvmem["miss"] == "new_session"
    assert one.engine.sent[-1]["authorization"] == "Bearer another"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.mark.parametrize(
    ("more", "content", "miss"),
    [
        ({}, [IMAGE], "media"),
        ({"continue_final_message": True}, "a", "template_fields"),
        ({"chat_template_kwargs": {"loud": True}}, "a", "new_session"),
    ],
)
def test_what_cannot_be_a_ledger_is_handed_on(
    start: Start, more: dict[str, Any], content: Any, miss: str
) -> None:
    one = start()
    one.engine.render = lambda messages, tools=None, _real=one.engine.render, **t: (
        [1, 2, 3] if messages[-1]["content"] == [IMAGE] else _real(messages, tools, **t)
    )
    usage = ask(one, [{"role": "user", "content": content}], extra_body=more).usage
    assert usage.kvmem["miss"] == miss


def test_an_engine_that_renders_for_itself_is_right_and_told(start: Start, folder: Path) -> None:
    one = start(engine=engine_of(folder, ignores_ids=True))
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "a"}]
    said, _ = whole(one, messages)
    assert said["content"]
    said["content"] = said["content"].strip()  # so that its rendering is not what was sampled
    messages += [said, {"role": "user", "content": "b"}]
    _, usage = whole(one, messages)
    assert usage.kvmem["miss"] == "engine_ignores_ids"
    assert one.engine.prompts[-1] == one.engine.render(messages)


def test_an_engine_without_token_ids_is_told(start: Start, folder: Path) -> None:
    one = start(engine=engine_of(folder, tells_ids=False))
    assert ask(one, [SYSTEM]).usage.kvmem["miss"] == "no_token_ids"
    assert len(one.gateway.sessions) == 0


def test_another_template_at_the_server_is_seen(start: Start, folder: Path) -> None:
    engine = engine_of(folder)
    real = engine.render
    engine.render = lambda messages, tools=None, **t: [*real(messages, tools, **t), 7]
    one = start(engine=engine)
    usage = ask(one, [SYSTEM, {"role": "user", "content": "a"}]).usage
    assert usage.kvmem["miss"] == "template_differs"
    assert one.engine.prompts[-1][-1] == 7


def test_a_model_without_tokenizer_here_is_handed_on(start: Start) -> None:
    one = start()
    one.engine.folder = "some/name"
    usage = ask(one, [SYSTEM]).usage
    assert usage.kvmem["miss"] == "no_tokenizer"
    assert "--tokenizer fake=FOLDER" in usage.kvmem["detail"]


def test_ids_are_only_told_where_they_were_asked_for(start: Start) -> None:
    one = start()
    messages = [SYSTEM, {"role": "user", "content": "a"}]
    plain = ask(one, messages).model_dump()
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]
    asked = ask(one, messages, extra_body={"return_token_ids": True}).model_dump()
    assert asked["prompt_token_ids"] == one.engine.prompts[-1]


def test_usage_is_streamed_only_where_it_was_asked_for(start: Start) -> None:
    one = start()
    with one.client.chat.completions.create(model="fake", messages=[SYSTEM], stream=True) as stream:
        assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_sessions_on_disk_are_private_and_found_again(start: Start, tmp_path: Path) -> None:
    one = start(sessions=tmp_path / "kept")
    messages: list[Any] = [SYSTEM, {"role": "user", "content": "a"}]
    said, _ = whole(one, messages, tools=TOOLS)
    one.front.stop()
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "kept").rglob("*") if p.is_dir()} == {
        0o700
    }
    two = start(engine=one.engine, sessions=tmp_path / "kept")
    call = said["tool_calls"][0]
    messages += [said, {"role": "tool", "tool_call_id": call["id"], "content": "b"}]
    usage = ask(two, messages, tools=TOOLS).usage
    assert usage.kvmem["miss"] == "none"
    assert usage.prompt_tokens_details.cached_tokens == usage.kvmem["ideal_tokens"] > 0


def test_the_longest_unused_session_goes_first(start: Start, tmp_path: Path) -> None:
    one = start(max_sessions=2, sessions=tmp_path)
    for name in "abc":
        ask(one, [{"role": "user", "content": name}])
    assert len(one.gateway.sessions) == 2
    assert len(list(tmp_path.rglob("*.ledger"))) == 2
    said = {"role": "assistant", "content": " The answer, number 0. "}
    gone = [{"role": "user", "content": "a"}, said, {"role": "user", "content": "more"}]
    assert ask(one, gone).usage.kvmem["miss"] == "new_session"


def test_two_gateways_do_not_share_a_folder(start: Start, tmp_path: Path) -> None:
    start(sessions=tmp_path)
    with pytest.raises(ConfigError, match="Another gateway has --sessions"):
        Gateway(Settings(upstreams=("http://127.0.0.1:1",), sessions=tmp_path))


def test_other_endpoints_are_handed_on(start: Start) -> None:
    one = start()
    told = httpx.post(one.url + "/v1/completions", json={"model": "fake", "prompt": "a"}).json()
    assert told == {"echo": {"model": "fake", "prompt": "a"}}
    assert [card.id for card in one.client.models.list()] == ["fake"]
    assert one.client.models.retrieve("fake").id == "fake"


def test_each_model_goes_to_the_upstream_that_has_it(folder: Path) -> None:
    first, second = (engine_of(folder, models=[name]) for name in ("first", "second"))
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(Serving(one)).url for one in (first, second)]
        gateway = Gateway(Settings(upstreams=(*urls, "http://127.0.0.1:1")))  # one is down
        front = stack.enter_context(Serving(gateway, lifespan="on"))
        client = stack.enter_context(OpenAI(base_url=front.url + "/v1", api_key="a", max_retries=0))
        assert [card.id for card in client.models.list()] == ["first", "second"]
        messages: Any = [SYSTEM, {"role": "user", "content": "a"}]
        for engine, name in ((second, "second"), (first, "first"), (second, "second")):
            usage: Any = client.chat.completions.create(model=name, messages=messages).usage
            assert engine.bodies[-1]["model"] == name
            assert usage.kvmem["miss"] == ("none" if len(second.bodies) == 2 else "new_session")
        assert (len(first.bodies), len(second.bodies)) == (1, 2)
