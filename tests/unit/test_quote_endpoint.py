"""`/v1/kvmem/quote` and `/v1/kvmem/metrics` on vLLM's own server; `kvmem quote` before them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from typer.testing import CliRunner

from kvmem.cli import app
from kvmem.store import Arena
from kvmem.store.desk import Desk
from kvmem.telemetry.live import Sample, Snapshot, Tier
from kvmem.telemetry.quote import Quote
from tests.unit.test_endpoint import arena_of, server, transfer

pytestmark = pytest.mark.engine

QUOTE, METRICS = "/v1/kvmem/quote", "/v1/kvmem/metrics"
TOLD = Quote(
    prompt=4, device=1, host=1, disk=0, computed=2, ms=3.0, ms_cold=9.0, disk_ms=0.0, load_ms=1.0,
    prefill_ms=2.0, running=1, off={"stores": "switch"}, exact=False,
    misses=({"reason": "evicted", "first": 2, "tokens": 2, "ms": 2.0, "tier": "host",
             "fix": "A larger host_gb or disk_gb."},),
)  # fmt: skip


@pytest.fixture
def asked() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def arena(arena_name: str, asked: list[dict[str, Any]]) -> Iterator[Arena]:
    """An arena with a desk that answers the same to everybody."""
    arena = arena_of(arena_name)
    tier = Tier(name="host", on=True, blocks=0, bytes=0, capacity_bytes=1)
    now = Snapshot(
        at_s=0.0, model="m", pid=7, arena=arena.path.name, block_tokens=16, block_bytes=1,
        prefill_s_per_token=0.0, tiers=(tier,), samples=(Sample("kvmem_sessions", (), 3.0),),
    )  # fmt: skip

    def quote(fields: dict[str, Any]) -> Quote:
        tokens = array("i", fields.pop("tokens")).tolist()
        if len(tokens) > 100:
            raise ValueError("too long")
        asked.append({"tokens": tokens, **fields})
        return TOLD

    desk = Desk(arena.path, {"quote": quote, "live": lambda fields: now}, lambda error: None)
    yield arena
    desk.close()
    arena.close(unlink=True)


@pytest.fixture
def client(arena: Arena, arena_name: str) -> Any:
    """With vLLM's /tokenize as far as it is asked: it makes ids of a request's letters."""
    client = server(transfer("one", arena=arena_name))

    async def tokenize(request: Request) -> JSONResponse:
        body = await request.json()
        text = body.get("prompt") or json.dumps(body["messages"]) + json.dumps(body.get("tools"))
        if "refuse" in text:
            return JSONResponse({"error": {"message": "no such role", "code": 400}}, 400)
        return JSONResponse({"tokens": [ord(letter) for letter in text][:50]})

    client.app.add_api_route("/tokenize", tokenize, methods=["POST"], response_model=None)
    return client


@pytest.mark.parametrize(
    "body", [{"prompt": [1, 2, 3]}, {"kv_transfer_params": {"prompt_token_ids": [1, 2, 3]}}]
)
def test_token_ids_are_asked_as_they_are(
    client: Any, asked: list[dict[str, Any]], body: dict[str, Any]
) -> None:
    told = client.post(QUOTE, json={**body, "session_id": "s", "cache_salt": "a"})
    assert told.status_code == 200
    assert msgspec.convert(told.json(), Quote) == TOLD
    assert asked == [{"tokens": [1, 2, 3], "session": "s", "salt": "a"}]


def test_messages_are_rendered_by_the_server(client: Any, asked: list[dict[str, Any]]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "tools": [{"a": 1}], "max_tokens": 8, "stream": True}
    told = client.post(QUOTE, json=body, headers={"X-Session-ID": "from the header"})
    assert told.status_code == 200
    text = json.dumps(messages) + json.dumps([{"a": 1}])
    assert asked[0]["tokens"] == [ord(letter) for letter in text][:50]
    assert asked[0]["session"] == "from the header"
    assert client.post(QUOTE, json={"prompt": "abc"}).status_code == 200
    assert asked[1]["tokens"] == [97, 98, 99]


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        (b"", 400, ""),
        (b"[]", 400, "Expected `object`"),
        (b"{}", 400, "messages"),
        (b'{"prompt": [1, "a"]}', 400, "Expected `int`"),
        (b'{"prompt": [1e99]}', 400, ""),
        (b'{"prompt": [99999999999]}', 400, "32 bits"),
        (b'{"prompt": [1], "session_id": 4}', 400, "string"),
        (b'{"prompt": [1], "cache_salt": {}}', 400, ""),
        (b'{"prompt": [1], "kv_transfer_params": 1}', 400, ""),
        (b'{"messages": [{"role": "refuse"}]}', 400, "no such role"),
        (b'{"prompt": [1], "model": "an-adapter"}', 404, "adapters"),
        (json.dumps({"prompt": [1] * 101}).encode(), 400, "too long"),
    ],
)
def test_what_is_no_request_is_answered_with_what_is_wrong(
    client: Any, asked: list[dict[str, Any]], body: bytes, code: int, told: str
) -> None:
    answer = client.post(QUOTE, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == code
    assert told in answer.json()["error"]["message"]
    assert asked == []


@pytest.mark.parametrize(("method", "path"), [("POST", QUOTE), ("GET", METRICS)])
def test_without_the_servers_key_nothing_is_told(client: Any, method: str, path: str) -> None:
    client.headers.pop("Authorization")
    told = client.request(method, path, json={"prompt": [1]})
    assert told.status_code == 401


def test_a_server_without_an_engine_says_so() -> None:
    client = server(transfer("nobody"))
    assert client.post(QUOTE, json={"prompt": [1]}).status_code == 503
    assert client.get(METRICS).text == "" or "kvmem_sessions{" not in client.get(METRICS).text


def test_metrics_are_those_of_the_engine_behind_the_server(client: Any) -> None:
    told = client.get(METRICS)
    assert told.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'kvmem_sessions{engine="7",model_name="m"} 3.0' in told.text


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    def run(body: Any, *arguments: str) -> Any:
        file = tmp_path / "request.json"
        file.write_text(body if isinstance(body, str) else json.dumps(body))
        return CliRunner().invoke(app, ["quote", str(file), *arguments])

    return run


@pytest.mark.parametrize("body", [[1, 2, 3], {"prompt": [1, 2, 3]}])
def test_the_command_asks_for_token_ids_on_the_engines_host(
    arena: Arena, arena_name: str, asked: list[dict[str, Any]], run: Callable[..., Any], body: Any
) -> None:
    ran = run(body, "--arena", arena_name, "--session", "s", "--salt", "a", "--json")
    assert msgspec.json.decode(ran.stdout, type=Quote) == TOLD
    assert asked == [{"tokens": [1, 2, 3], "session": "s", "salt": "a"}]


def test_the_command_says_what_breaks_and_the_fix(
    arena: Arena, arena_name: str, run: Callable[..., Any]
) -> None:
    told = run([1], "--arena", arena_name).stdout
    for part in ("4 tokens: 2 would be reused (50%)", "about 3 ms", "9 if nothing",
                 "stores are off, by switch", "approximate", "1 requests are under way",
                 "from 2  2 tokens about 2 ms  evicted (tier host)",
                 "A larger host_gb"):  # fmt: skip
        assert part in told


@pytest.mark.parametrize("body", ["{", "{}", "3", '{"messages": 1'])
def test_the_command_refuses_what_is_no_request(
    arena: Arena, arena_name: str, run: Callable[..., Any], body: str
) -> None:
    ran = run(body, "--arena", arena_name)
    assert ran.exit_code != 0
    assert ran.stdout == ""


def test_the_command_says_that_no_server_answers(run: Callable[..., Any]) -> None:
    ran = run({"messages": [{"role": "user", "content": "x"}]}, "--url", "http://127.0.0.1:9")
    assert ran.exit_code != 0
    assert "does not answer" in str(ran.exception)
