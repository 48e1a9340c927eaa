"""What the soak's streams ask for, and how its client tells whole answers from others."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.soak.asks import Ask
from benchmarks.soak.client import Client, RequestFailed
from benchmarks.soak.plan import DEVICE, EVERYTHING, Plan
from benchmarks.soak.traffic import KINDS, Library, library, script


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(minutes=5, folder=tmp_path, adapters=2)


@pytest.fixture
def shelf(plan: Plan) -> Library:
    return library(range(40_000), plan)


def reply(ask: Ask) -> list[int]:
    """The same for the same request, and a hang-up for nobody."""
    return [sum(ask.prompt) % 977 + i for i in range(ask.n_tokens)]


def played(plan: Plan, shelf: Library, stream: int, n: int, *, patient: bool = True) -> list[Ask]:
    one = script(stream, shelf, plan)
    asks = [next(one)]
    while len(asks) < n:
        hangs_up = asks[-1].gives_up and not patient
        asks.append(one.send(None if hangs_up else reply(asks[-1])))
    return asks


def starts_with(ask: Ask, begun: tuple[int, ...]) -> bool:
    return ask.prompt[: len(begun)] == begun


# -- what is asked ---------------------------------------------------------------------------------


def test_a_seed_asks_the_same_again(plan: Plan, shelf: Library) -> None:
    assert played(plan, shelf, 3, 60) == played(plan, library(range(40_000), plan), 3, 60)
    assert played(plan, shelf, 3, 60) != played(plan, shelf, 4, 60)


def test_a_session_only_appends(plan: Plan, shelf: Library) -> None:
    asks = [ask for ask in played(plan, shelf, 0, 300) if ask.kind == "session"]
    turns = [
        (before, after)
        for before, after in itertools.pairwise(asks)
        if len(after.prompt) > len(before.prompt) and starts_with(after, before.prompt)
    ]
    assert len(turns) > 50
    for before, after in turns:
        begun = (*before.prompt, *reply(before))
        assert starts_with(after, begun)
        assert (after.adapter, after.salt) == (before.adapter, before.salt)


def test_who_hung_up_asks_again_and_waits(plan: Plan, shelf: Library) -> None:
    asks = played(plan, shelf, 0, 300, patient=False)
    hasty = [i for i, ask in enumerate(asks[:-1]) if ask.gives_up]
    assert len(hasty) > 20
    for i in hasty:
        assert asks[i + 1] == asks[i].patient()


def test_every_kind_and_every_wish_comes(plan: Plan, shelf: Library) -> None:
    asks = [ask for stream in range(16) for ask in played(plan, shelf, stream, 40)]
    assert {ask.kind for ask in asks} == set(KINDS)
    for wish in (
        lambda ask: ask.adapter == "adapter-1",
        lambda ask: ask.salt is not None,
        lambda ask: not ask.load,
        lambda ask: not ask.store,
        lambda ask: ask.stream and ask.gives_up,
        lambda ask: not ask.stream and ask.gives_up,
    ):
        assert any(map(wish, asks))


def test_no_prompt_is_too_long_for_the_engine(plan: Plan, shelf: Library) -> None:
    asks = [ask for stream in range(16) for ask in played(plan, shelf, stream, 200)]
    assert max(len(ask.prompt) + ask.n_tokens for ask in asks) < plan.max_model_len


def test_the_oracle_has_a_bounded_number_of_requests(plan: Plan, shelf: Library) -> None:
    def distinct(n: int) -> set[bytes]:
        asks = (ask for stream in range(16) for ask in played(plan, shelf, stream, n))
        return {ask.digest for ask in asks}

    assert len(distinct(1_500)) < 1.1 * len(distinct(1_000))


def test_without_adapters_nobody_asks_for_one(plan: Plan, tmp_path: Path) -> None:
    plain = Plan(minutes=5, folder=tmp_path, adapters=0)
    asks = played(plain, library(range(40_000), plain), 0, 200)
    assert {ask.adapter for ask in asks} == {None}


def test_the_digest_is_of_what_decides_the_answer() -> None:
    ask = Ask(kind="short", prompt=(1, 2), n_tokens=3)
    others = [
        Ask(kind="short", prompt=(1, 3), n_tokens=3),
        Ask(kind="short", prompt=(1, 2), n_tokens=4),
        Ask(kind="short", prompt=(1, 2), n_tokens=3, adapter="adapter-0"),
    ]
    assert len({ask.digest, *(other.digest for other in others)}) == 4
    same = Ask(kind="long", prompt=(1, 2), n_tokens=3, salt="a", load=False, stream=True)
    assert same.digest == ask.digest


# -- how it is asked -------------------------------------------------------------------------------

Handler = Callable[[httpx.Request], httpx.Response]


def choice(tokens: list[int], end: str | None = "length") -> dict[str, Any]:
    return {
        "token_ids": tokens,
        "finish_reason": end,
        "logprobs": {
            "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": [{f"token_id:{t}": -0.5, "token_id:9": -0.75} for t in tokens],
        },
    }


def ask_of(handler: Handler, ask: Ask) -> Any:
    async def one() -> Any:
        transport = httpx.MockTransport(handler)
        async with Client("http://engine", transport=transport) as client:
            return await client.ask(ask)

    return asyncio.run(one())


def stream_of(*chunks: dict[str, Any]) -> httpx.Response:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))


ASK = Ask(kind="short", prompt=(1, 2, 3), n_tokens=2, salt="tenant-a", load=False)


def test_a_whole_answer_is_read() -> None:
    sent: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [choice([7, 8])]})

    given = ask_of(handler, ASK)
    assert (given.tokens, given.logprobs) == ([7, 8], [-0.5, -0.5])
    assert given.best[1] == {8: -0.5, 9: -0.75}
    assert sent[0]["prompt"] == [1, 2, 3]
    assert sent[0]["cache_salt"] == "tenant-a"
    assert sent[0]["kv_transfer_params"] == {"kvmem": {"load": False, "store": True}}


def test_a_streamed_answer_is_the_same() -> None:
    whole = ask_of(lambda _: httpx.Response(200, json={"choices": [choice([7, 8])]}), ASK)
    streamed = Ask(kind="short", prompt=(1, 2, 3), n_tokens=2, stream=True)
    chunks = ({"choices": [choice([7], None)]}, {"choices": [choice([8])]})
    assert ask_of(lambda _: stream_of(*chunks), streamed) == whole


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(500, text="EngineCore encountered an issue"),
        httpx.Response(200, json={"choices": [choice([7, 8], "error")]}),
        httpx.Response(200, json={"choices": [choice([7, 8], "abort")]}),
        httpx.Response(200, json={"choices": [choice([7])]}),
    ],
)
def test_any_other_answer_is_a_failure(response: httpx.Response) -> None:
    with pytest.raises(RequestFailed):
        ask_of(lambda _: response, ASK)


@pytest.mark.parametrize(
    "chunks",
    [
        ({"choices": [choice([7], None)]},),  # it broke off
        ({"error": {"message": "gone"}},),
        ({"choices": [choice([7], None)]}, {"choices": [choice([8], "error")]}),
    ],
)
def test_a_stream_that_breaks_off_is_a_failure(chunks: tuple[dict[str, Any], ...]) -> None:
    streamed = Ask(kind="short", prompt=(1, 2, 3), n_tokens=2, stream=True)
    with pytest.raises(RequestFailed):
        ask_of(lambda _: stream_of(*chunks), streamed)


def test_a_connection_that_breaks_is_a_failure() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset by peer")

    with pytest.raises(RequestFailed, match="reset by peer"):
        ask_of(handler, ASK)


def test_a_client_that_gives_up_has_no_answer() -> None:
    streamed = Ask(kind="short", prompt=(1,), n_tokens=3, stream=True, give_up_tokens=2)
    chunks = [{"choices": [choice([t], None)]} for t in (7, 8)]
    assert ask_of(lambda _: stream_of(*chunks, {"choices": [choice([9])]}), streamed) is None

    async def waits() -> Any:
        async def handler(request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()  # for ever
            raise AssertionError

        hasty = Ask(kind="short", prompt=(1,), n_tokens=3, give_up_s=0.01)
        transport = httpx.MockTransport(handler)
        async with Client("http://engine", transport=transport) as client:
            return await client.ask(hasty)

    assert asyncio.run(waits()) is None


@pytest.mark.parametrize(("what", "external"), [(DEVICE, "false"), (EVERYTHING, "true")])
def test_a_reset_says_what_it_empties(what: str, external: str) -> None:
    seen: list[httpx.URL] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url)
        return httpx.Response(200, json={"success": False})

    async def one() -> bool:
        transport = httpx.MockTransport(handler)
        async with Client("http://engine", transport=transport) as client:
            return await client.reset(what)

    assert asyncio.run(one()) is False
    assert seen[0].params["reset_external"] == external


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(503, json={"error": {"message": "no engine"}}),
        httpx.Response(200, json={"loads": True, "stores": False}),
    ],
)
def test_a_switch_that_does_not_switch_is_a_failure(response: httpx.Response) -> None:
    async def one() -> None:
        transport = httpx.MockTransport(lambda _: response)
        async with Client("http://engine", transport=transport) as client:
            await client.switch(on=False)

    with pytest.raises(RequestFailed, match="switch"):
        asyncio.run(one())
