"""`/v1/kvmem/switch`: on vLLM's server, behind its key, for the engine behind it and no other."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from kvmem.engines.vllm import launch
from kvmem.errors import ConfigError
from kvmem.store import Arena, Switch, read_switch, set_switch

pytestmark = pytest.mark.engine

KEY = {"Authorization": "Bearer secret"}
PATH = "/v1/kvmem/switch"


def transfer(engine_id: str, **extra: Any) -> SimpleNamespace:
    """An engine's `kv_transfer_config`."""
    return SimpleNamespace(
        kv_connector="KvmemConnector", engine_id=engine_id, kv_connector_extra_config=extra
    )


def arena_of(name: str) -> Arena:
    return Arena.create(name, n_slots=4, slot_bytes=64, namespace=bytes(32))


@pytest.fixture
def arena(arena_name: str) -> Iterator[Arena]:
    arena = arena_of(arena_name)
    yield arena
    arena.close(unlink=True)


def server(transfer: SimpleNamespace | None, *, engine: bool = True) -> Any:
    """A client of a server with vLLM's own way of adding endpoints, and its own guard."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    from kvmem.engines.vllm.endpoint import SwitchEndpoint

    app, plugin = FastAPI(), SwitchEndpoint()
    plugin.attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    client = SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=transfer))
    asyncio.run(plugin.init_state(client if engine else None, app.state, Namespace()))  # type: ignore[arg-type]
    return TestClient(app, headers=KEY)


@pytest.fixture
def client(arena: Arena, arena_name: str) -> Any:
    return server(transfer("one", arena=arena_name))


# -- what it answers ------------------------------------------------------------------------------


def test_it_is_what_vllm_takes_for_an_endpoint_plugin() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from kvmem.engines.vllm.endpoint import SwitchEndpoint

    assert isinstance(SwitchEndpoint(), EndpointPlugin)


def test_what_is_posted_stands_until_the_next(client: Any, arena: Arena) -> None:
    assert client.get(PATH).json() == {"loads": True, "stores": True}
    for body in ({"loads": False}, {"stores": False}, {"loads": True, "stores": False}):
        told = client.post(PATH, json=body)
        assert told.status_code == 200
        assert told.json() == client.get(PATH).json()
        assert body.items() <= told.json().items()
        assert read_switch(arena.path) == Switch(**told.json())
    assert read_switch(arena.path) == Switch(loads=True, stores=False)


def test_what_the_command_switched_the_endpoint_tells(client: Any, arena: Arena) -> None:
    set_switch(arena.path, loads=False)
    assert client.get(PATH).json() == {"loads": False, "stores": True}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer guess"}])
def test_without_the_servers_key_it_neither_tells_nor_switches(
    client: Any, arena: Arena, method: str, headers: dict[str, str]
) -> None:
    client.headers.pop("Authorization")
    told = client.request(method, PATH, headers=headers, json={"loads": False})
    assert told.status_code == 401
    assert "loads" not in told.json()
    assert read_switch(arena.path) == Switch()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"loads": "off"}', "loads"),
        (b'{"stores": 0}', "stores"),
        (b'{"loads": null}', "loads"),
        (b'{"load": false}', "load"),
        (b"{}", "loads"),
        (b"[]", None),
        (b"", None),
        (b'{"loads": fals', None),
        (b'{"\xff": 1}', None),
    ],
)
def test_a_body_that_is_not_understood_is_answered_400_with_the_field(
    client: Any, arena: Arena, body: bytes, field: str | None
) -> None:
    told = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert told.status_code == 400
    error = told.json()["error"]
    assert (error["param"], error["code"]) == (field, 400)
    assert error["message"]
    assert field is None or field in error["message"]
    assert read_switch(arena.path) == Switch()


def test_a_body_that_a_browser_sends_unasked_is_refused(client: Any, arena: Arena) -> None:
    headers = {"Content-Type": "text/plain"}
    told = client.post(PATH, content=b'{"loads": false}', headers=headers)
    assert told.status_code == 415
    assert read_switch(arena.path) == Switch()


def test_a_damaged_switch_is_told_and_switching_both_mends_it(client: Any, arena: Arena) -> None:
    arena.buffer[arena.header.switch_offset] ^= 0x80
    for told in (client.get(PATH), client.post(PATH, json={"loads": False})):
        assert told.status_code == 503
        assert "damaged" in told.json()["error"]["message"]
    assert client.post(PATH, json={"loads": False, "stores": True}).status_code == 200
    assert client.get(PATH).json() == {"loads": False, "stores": True}


# -- whose switch it is ---------------------------------------------------------------------------


def test_every_server_of_an_engine_finds_its_arena_and_no_other(
    new_arena_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmem.config import Config
    from kvmem.engines.vllm.arenas import arena_name

    first, second = new_arena_name().replace("-", "x"), new_arena_name().replace("-", "x")
    arenas = [arena_of(arena_name(Config(), engine_id)) for engine_id in (first, second)]
    try:
        servers = [server(transfer(first)) for _ in range(2)]
        assert servers[0].post(PATH, json={"loads": False}).status_code == 200
        for one in servers:
            assert one.get(PATH).json() == {"loads": False, "stores": True}
        assert read_switch(arenas[1].path) == Switch()
        inner = {"kv_connector": "KvmemConnector", "kv_role": "kv_both"}
        outer = transfer(second, connectors=[{"kv_connector": "Other"}, inner])
        outer.kv_connector = "MultiConnector"
        assert server(outer).post(PATH, json={"stores": False}).status_code == 200
        assert read_switch(arenas[1].path) == Switch(loads=True, stores=False)
        assert read_switch(arenas[0].path) == Switch(loads=False, stores=True)
    finally:
        for arena in arenas:
            arena.close(unlink=True)


def test_an_engine_id_that_begins_alike_is_another_engine(
    new_arena_name: Callable[[], str],
) -> None:
    from kvmem.config import Config
    from kvmem.engines.vllm.arenas import arena_name, arenas_of

    mine = new_arena_name().replace("-", "x")
    arena = arena_of(arena_name(Config(), f"{mine}2"))
    try:
        assert arenas_of(transfer(f"{mine}2")) == [arena.path]  # type: ignore[arg-type]
        assert arenas_of(transfer(mine)) == []  # type: ignore[arg-type]
    finally:
        arena.close(unlink=True)


@pytest.mark.parametrize("engine_id", ["", "é", "a/../b", "x" * 200, "0f-" * 12])
def test_any_engine_id_makes_a_name_that_an_arena_can_have(engine_id: str) -> None:
    from kvmem.config import Config
    from kvmem.engines.vllm.arenas import arena_name

    Arena.path_of(arena_name(Config(), engine_id))


def test_a_server_without_a_kvmem_engine_says_so(arena_name: str) -> None:
    other = transfer("one")
    other.kv_connector = "Other"
    for told in (
        server(None).get(PATH),
        server(None, engine=False).get(PATH),
        server(other).post(PATH, json={"loads": False}),
        server(transfer("one", arena=arena_name)).get(PATH),  # it ended
    ):
        assert told.status_code == 503
        assert "No engine with kvmem" in told.json()["error"]["message"]


# -- VLLM_PLUGINS ---------------------------------------------------------------------------------


def plugins(monkeypatch: pytest.MonkeyPatch, **groups: list[str]) -> None:
    """Installs nothing but these entry points, by group without its `vllm.` and `_plugins`."""

    def find(*, group: str) -> list[SimpleNamespace]:
        short = group.removeprefix("vllm.").removesuffix("_plugins")
        return [SimpleNamespace(name=name) for name in groups.get(short, [])]

    monkeypatch.setattr(metadata, "entry_points", find)


def test_every_plugin_that_vllm_loads_unasked_is_still_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugins(
        monkeypatch,
        general=["kvmem", "lora_filesystem_resolver"],
        platform=["npu"],
        io_processor=["geo"],
        stat_logger=["log"],
        endpoint=["kvmem_switch", "somebodys_routes"],
    )
    allowed = launch.allowed_plugins({})
    assert allowed is not None
    assert allowed.split(",") == [
        *("geo", "kvmem", "log", "lora_filesystem_resolver", "npu"),
        "kvmem_switch",
    ]


def test_a_plugin_that_does_more_when_it_is_named_is_not_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's lora_hf_hub_resolver downloads adapters, but only if VLLM_PLUGINS names it."""
    plugins(monkeypatch, general=["lora_hf_hub_resolver"], endpoint=["kvmem_switch"])
    assert launch.allowed_plugins({}) == "kvmem_switch"


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("", "kvmem_switch"),
        ("kvmem", "kvmem,kvmem_switch"),
        ("kvmem_switch,other", "kvmem_switch,other"),
    ],
)
def test_a_users_own_choice_gets_the_endpoint_and_nothing_else(given: str, allowed: str) -> None:
    assert launch.allowed_plugins({"VLLM_PLUGINS": given}) == allowed


@pytest.mark.parametrize(
    "groups",
    [
        {"general": ["kvmem"]},
        {"general": ["kvmem", "both"], "endpoint": ["kvmem_switch", "both"]},
    ],
)
def test_nothing_is_set_where_that_would_load_what_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch, groups: dict[str, list[str]]
) -> None:
    plugins(monkeypatch, **groups)
    assert launch.allowed_plugins({}) is None


def test_the_entry_points_of_this_environment_are_all_named_and_lead_somewhere() -> None:
    from vllm.plugins import ENDPOINT_PLUGINS_GROUP

    from kvmem.engines.vllm.endpoint import SwitchEndpoint

    (ours,) = metadata.entry_points(group=ENDPOINT_PLUGINS_GROUP, name="kvmem_switch")
    assert ours.load() is SwitchEndpoint
    allowed = (launch.allowed_plugins({}) or "").split(",")
    assert {"kvmem", "kvmem_switch", "kvmem_dashboard", "lora_filesystem_resolver"} <= set(allowed)
    assert "lora_hf_hub_resolver" not in allowed


def test_a_setting_that_is_wrong_is_no_arena(arena_name: str) -> None:
    from kvmem.engines.vllm.arenas import arenas_of

    with pytest.raises(ConfigError, match="hots_gb"):
        arenas_of(transfer("one", hots_gb=3))  # type: ignore[arg-type]


# -- hints ----------------------------------------------------------------------------------------

HINTS, RECEIPTS = "/v1/kvmem/hints", "/v1/kvmem/receipts"


class Core:
    """Stands for vLLM's client of the engine's process."""

    def __init__(self, told: Any = '{"receipts":[]}') -> None:
        self.asked: list[tuple[str, Any]] = []
        self.told = told

    async def call_utility_async(self, method: str, text: str) -> str:
        self.asked.append((method, json.loads(text)))
        if isinstance(self.told, Exception):
            raise self.told
        return self.told


def hints_server(core: Any) -> Any:
    client = server(None)
    client.app.state.kvmem_core = core
    return client


def test_an_envelope_goes_to_the_engine_and_its_receipts_come_back() -> None:
    core = Core('{"receipts":[{"do":"release","status":"missing"}]}')
    client = hints_server(core)
    actions = [{"do": "release", "session": "s"}]
    told = client.post(HINTS, json={"version": 1, "actions": actions, "cache_salt": "mine"})
    assert told.json() == {"receipts": [{"do": "release", "status": "missing"}]}
    assert client.get(RECEIPTS, params={"cache_salt": "mine"}).status_code == 200
    assert core.asked == [
        ("kvmem_hints", {"envelope": {"version": 1, "actions": actions}, "cache_salt": "mine"}),
        ("kvmem_hints", {"cache_salt": "mine"}),
    ]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"actions": []}', {}, 400),
        (b'{"version": 1, "actions": [], "more": 1}', {}, 400),
        (b'{"version": 1, "actions": []}', {"Content-Type": "text/plain"}, 415),
        (b'{"version": 1, "actions": ["' + b"x" * 70_000 + b'"]}', {}, 413),
        (b'{"version": 1, "actions": []}', {"Authorization": "Bearer guess"}, 401),
    ],
)
def test_what_is_no_envelope_does_not_reach_the_engine(
    content: bytes, headers: dict[str, str], status: int
) -> None:
    core = Core()
    sent = {"Content-Type": "application/json", **headers}
    assert hints_server(core).post(HINTS, content=content, headers=sent).status_code == status
    assert core.asked == []


@pytest.mark.parametrize(
    ("core", "status"),
    [(None, 503), (object(), 503), (Core("{}"), 503), (Core(RuntimeError("dead")), 503)],
)
def test_an_engine_that_takes_no_hints_is_told(core: Any, status: int) -> None:
    client = hints_server(core)
    told = client.post(HINTS, json={"version": 1, "actions": []})
    assert (told.status_code, told.json()["error"]["code"]) == (status, status)


def test_a_flood_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    client = hints_server(core)
    client.app.state.kvmem_asked = 64
    assert client.post(HINTS, json={"version": 1, "actions": []}).status_code == 429
    assert core.asked == []
    client.app.state.kvmem_asked = 0
    assert client.post(HINTS, json={"version": 1, "actions": []}).status_code == 200
    assert client.app.state.kvmem_asked == 0


# -- quotes ---------------------------------------------------------------------------------------


def test_a_quotes_body_has_a_bound(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmem.engines.vllm.endpoint.MOST_BODY", 100)
    assert client.post("/v1/kvmem/quote", content=b'{"prompt": "' + b"x" * 100).status_code == 413
    assert client.post("/v1/kvmem/quote", content=b"[").status_code == 400


def test_no_more_quotes_than_some_are_made_at_once(client: Any) -> None:
    client.app.state.kvmem_quotes = 4
    told = client.post("/v1/kvmem/quote", json={"prompt": [1, 2, 3]})
    assert (told.status_code, told.json()["error"]["code"]) == (429, 429)
    client.app.state.kvmem_quotes = 3
    assert client.post("/v1/kvmem/quote", json={"prompt": [1, 2, 3]}).status_code != 429
    assert client.app.state.kvmem_quotes == 3


def test_an_engine_that_does_not_answer_is_no_engine_without_traffic(client: Any) -> None:
    told = client.get("/v1/kvmem/metrics")  # of an arena whose owner has no desk
    assert told.status_code == 503
