"""The soak's rounds on a server of the tests' own, which keeps what it should give back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from benchmarks.soak import rounds
from benchmarks.soak.client import Client
from benchmarks.soak.plan import ROUNDS, Plan
from benchmarks.soak.rounds import Soak
from benchmarks.soak.traffic import library
from kvmem.cli.live import Counters, Host, Page


class Server:
    """Answers at once, counts what kvmem would, and can be told to misbehave."""

    def __init__(self) -> None:
        self.leased = 0
        self.allowed = {"loads": True, "stores": True}
        self.obeys = True
        self.resets_at_rest = True
        self.refuses: Callable[[dict[str, Any]], bool] = lambda body: False
        self.counters = Counters()
        self.asked: list[dict[str, Any]] = []
        self.running = 0

    # -- what Soak wants of an engine --------------------------------------------------------

    def client(self) -> Client:
        return Client("http://engine", transport=httpx.MockTransport(self._handle))

    def page(self) -> Page:
        host = Host(64, 9, self.leased, 0, 1, 0)
        return Page("model", 4711, time.time(), host, self.counters)

    def pids(self) -> list[int]:
        return []

    def check(self) -> None:
        pass

    # -- HTTP --------------------------------------------------------------------------------

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/metrics":
            names = ("num_requests_running", "num_requests_waiting", "num_preemptions_total")
            return httpx.Response(200, text="".join(f'vllm:{n}{{e="0"}} 0.0\n' for n in names))
        if path == "/reset_prefix_cache":
            return httpx.Response(200, json={"success": self.resets_at_rest})
        body = json.loads(request.content)
        if path == "/v1/kvmem/switch":
            self.allowed = body
            return httpx.Response(200, json=body)
        self.asked.append(body)
        await asyncio.sleep(0)
        if self.refuses(body):
            return httpx.Response(500, text="on purpose")
        if self.allowed["loads"] or not self.obeys:
            more = {"blocks_loaded": self.counters.blocks_loaded + 1}
            self.counters = msgspec.structs.replace(self.counters, **more)
        return _answer(body)


def _answer(body: dict[str, Any]) -> httpx.Response:
    tokens = [sum(body["prompt"]) % 977 + i for i in range(body["max_tokens"])]
    choice = {
        "token_ids": tokens,
        "finish_reason": "length",
        "logprobs": {
            "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": [{f"token_id:{t}": -0.5} for t in tokens],
        },
    }
    if not body["stream"]:
        return httpx.Response(200, json={"choices": [choice]})
    line = json.dumps({"choices": [choice]})
    return httpx.Response(200, text=f"data: {line}\n\ndata: [DONE]\n\n")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(rounds, "_GIVEN_BACK_WITHIN_S", 0.0)
    return Plan(minutes=0.01, folder=tmp_path, streams=4, least_asks=2, step_tokens=8)


def played(server: Server, plan: Plan) -> Soak:
    soak = Soak(server, library(range(40_000), plan), plan, lambda line: None)  # type: ignore[arg-type]
    asyncio.run(soak.play())
    return soak


def test_every_round_is_played_and_a_good_server_has_no_fault(plan: Plan) -> None:
    soak = played(Server(), plan)
    assert (soak.failed, soak.held) == ([], [])
    assert soak.happened["rest"] == len(plan.rounds) == len(ROUNDS) == len(soak.memory)
    for what in (
        "reset of device at rest",
        "reset of everything amid",
        "reset of everything under running requests",
        "switched off",
        "switched on",
    ):
        assert soak.happened[what] == 1
    assert len(soak.calls) >= len(ROUNDS) * plan.streams * plan.least_asks


def test_the_warm_up_has_steps_of_every_size_and_is_no_traffic(plan: Plan) -> None:
    server = Server()
    soak = played(server, plan)
    assert [len(body["prompt"]) for body in server.asked[:8]] == list(range(1, 9))
    assert all(call.ask.kind != "warm-up" for call in soak.calls)


def test_a_lease_that_is_never_given_back_is_found_at_every_rest(plan: Plan) -> None:
    server = Server()
    server.leased = 1
    held = played(server, plan).held
    assert len(held) == len(plan.rounds)
    assert held[0] == "at rest after round 1: 1 leases"


def test_a_reset_that_the_engine_refuses_at_rest_is_found(plan: Plan) -> None:
    server = Server()
    server.resets_at_rest = False
    held = played(server, plan).held
    n_resets = sum(round_.at_rest is not None for round_ in plan.rounds)
    assert sum(what.endswith("blocks of the device") for what in held) == n_resets > 0
    assert sum("under running requests" in what for what in held) == 1


def test_a_load_while_loads_are_off_is_found(plan: Plan) -> None:
    server = Server()
    server.obeys = False
    (failure,) = played(server, plan).failed
    assert failure.startswith("switched off: blocks loaded")


def test_it_is_found_however_late_the_rounds_are(plan: Plan) -> None:
    server = Server()
    server.obeys = False
    late = msgspec.structs.replace(plan, minutes=1e-6)  # every round's time is over as it begins
    (failure,) = played(server, late).failed
    assert failure.startswith("switched off: blocks loaded")


def test_a_request_that_fails_is_found_and_the_traffic_goes_on(plan: Plan) -> None:
    server = Server()
    server.refuses = lambda body: body.get("cache_salt") == "tenant-a" and len(server.asked) < 60
    soak = played(server, plan)
    assert soak.failed
    assert all("500 on purpose" in failure for failure in soak.failed)
    assert soak.happened["rest"] == len(plan.rounds)


def test_a_server_that_fails_everything_ends_the_soak(plan: Plan) -> None:
    server = Server()
    server.refuses = lambda body: body["max_tokens"] > 1
    with pytest.raises(ExceptionGroup):
        played(server, plan)
