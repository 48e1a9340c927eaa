"""`kvmem serve` as a user runs it: an unmodified client, live stats and switch, no rest after a
kill.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvmem.demo.server import Server
from kvmem.store.arena import Arena
from tests.e2e.host import prompt

pytestmark = pytest.mark.engine

KVMEM = [sys.executable, "-m", "kvmem.cli"]
KEY = "a-secret"
SWITCH = "/v1/kvmem/switch"


def serve(model: str, name: str, log: Path) -> Server:
    command = [
        *KVMEM, "serve", model,
        "--kvmem-host-gb", "0.5", "--kvmem-arena", name,
        "--dtype", "float32", "--block-size", "32", "--max-model-len", "1536",
        "--num-gpu-blocks-override", "64", "--enforce-eager", "--served-model-name", "smol",
        "--api-key", KEY,
    ]  # fmt: skip
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    }
    return Server(command, log=log, environ=environ)


@pytest.fixture(scope="module")
def arena() -> str:
    return f"server-{os.getpid()}"


@pytest.fixture(scope="module")
def server(smollm2: str, arena: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(smollm2, arena, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
    assert not Arena.path_of(arena).exists()  # a server that ends takes its arena with it


def complete(server: Server, tokens: list[int], **kvmem: Any) -> Any:
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        return client.completions.create(
            model="smol",
            prompt=tokens,
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True, "kv_transfer_params": {"kvmem": kvmem}},
        )


def stats(arena: str) -> dict[str, Any]:
    told = subprocess.run(
        [*KVMEM, "stats", "--json"], check=True, capture_output=True, text=True
    ).stdout
    mine = [e for e in json.loads(told) if arena in e["arena"]]
    assert len(mine) == 1, told
    return mine[0]


def test_prompts_pushed_off_the_device_come_back_from_the_host(server: Server) -> None:
    first = complete(server, prompt(1000, 1))
    for seed in (2, 3, 4):  # 63 blocks of 32 tokens: these push the first prompt out
        complete(server, prompt(1000, seed))
    again = complete(server, prompt(1000, 1))
    told = again.kv_transfer_params["kvmem"]
    assert told["tokens"]["host"] == 999 // 32 * 32 - told["tokens"]["device"]
    assert told["tokens"]["host"] > 0
    assert told["miss"] == "none"
    assert again.choices[0].text == first.choices[0].text


def test_a_request_can_leave_kvmem_out(server: Server) -> None:
    told = complete(server, prompt(200, 9), load=False, store=False).kv_transfer_params["kvmem"]
    assert told["miss"] == "load_off"
    assert told["blocks_stored"] == 0


def test_a_running_engine_explains_its_requests(server: Server, arena: str) -> None:
    first = prompt(640, 21)
    complete(server, first)
    changed = [*first[:100], first[100] + 1, *first[101:]]
    answer = complete(server, changed)
    told = answer.kv_transfer_params["kvmem"]["misses"]
    assert told[0]["reason"] == "input_changed"
    assert (told[0]["first"], told[0]["token"]) == (96, 100)
    assert told[0]["ms"] > 0

    def explain(*arguments: str) -> Any:
        command = [*KVMEM, "explain", *arguments, "--json", "--arena", arena]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    (one,) = explain(answer.id)
    assert [run["reason"] for run in one["runs"]] == [run["reason"] for run in told]
    complete(server, prompt(64, 22))  # a second later than the first one, at the least
    assert "first_time" in [cause["reason"] for cause in explain()]


# Token counts of a quote, and of a receipt.
SOURCES = ("prompt", "device", "host", "disk", "far", "computed")


def quoted(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    told = httpx.post(
        f"{server.url}/v1/kvmem/quote", json=body, headers={"Authorization": f"Bearer {KEY}"},
        timeout=120,
    )  # fmt: skip
    assert told.status_code == 200, told.text
    return told.json()


def test_a_quote_is_what_then_happens(server: Server, arena: str, tmp_path: Path) -> None:
    for seed in (41, 42, 43):  # so that some of the first is on the host only
        complete(server, prompt(1000, seed))
    for tokens in (prompt(1000, 41), [*prompt(500, 42), *prompt(300, 44)], prompt(200, 45)):
        told = quoted(server, {"prompt": tokens})
        assert told["prefill_ms"] > 0
        receipt = complete(server, tokens).kv_transfer_params["kvmem"]
        assert {name: told[name] for name in SOURCES} == receipt["tokens"]
        assert [run["reason"] for run in told["misses"]] == [
            run["reason"] for run in receipt["misses"]
        ]
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"prompt": prompt(1000, 41)}))
    command = [*KVMEM, "quote", str(file), "--arena", arena, "--json"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(ran.stdout)["prompt"] == 1000


def test_a_chat_is_quoted_as_it_will_be_rendered(server: Server) -> None:
    words = "All of this is said before, so that there is something to reuse. " * 20
    messages = [{"role": "system", "content": words}, {"role": "user", "content": "Where to?"}]
    body = {"model": "smol", "messages": messages, "session_id": "quoted"}
    for changed in (False, True):
        if changed:
            messages[0]["content"] = words.replace("before", "earlier")
        told = quoted(server, body)
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json={**body, "max_tokens": 4},
            headers={"Authorization": f"Bearer {KEY}"}, timeout=120,
        ).json()  # fmt: skip
        receipt = answer["kv_transfer_params"]["kvmem"]
        assert {name: told[name] for name in SOURCES} == receipt["tokens"]
    assert told["misses"][0]["reason"] == "system_changed"
    assert told["misses"][0]["fix"]


def samples(server: Server, path: str) -> dict[str, float]:
    """kvmem's samples without their engine's labels, of one value each."""
    from prometheus_client.parser import text_string_to_metric_families

    told = httpx.get(server.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
    assert told.status_code == 200
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(told.text):
        for sample in family.samples:
            if sample.name.startswith("kvmem_") and not sample.name.endswith("_created"):
                assert {"model_name", "engine"} <= set(sample.labels)
                labels = sorted(set(sample.labels) - {"model_name", "engine"})
                found["/".join([sample.name, *(sample.labels[n] for n in labels)])] = sample.value
    return found


def test_vllms_metrics_and_kvmems_say_the_same(server: Server) -> None:
    before = samples(server, "/metrics")
    complete(server, prompt(320, 51))
    complete(server, prompt(320, 51))
    theirs, ours = samples(server, "/metrics"), samples(server, "/v1/kvmem/metrics")
    name = "kvmem_prompt_tokens_total/device"
    assert theirs[name] == before.get(name, 0) + 319 // 32 * 32
    assert theirs["kvmem_requests_total"] == before.get("kvmem_requests_total", 0) + 2
    counted = [name for name in theirs if "_tokens_total" not in name and "_total" in name]
    assert len(counted) > 3
    assert {name: theirs[name] for name in counted} == {name: ours[name] for name in counted}
    assert theirs["kvmem_load_seconds_count"] == ours["kvmem_load_seconds_count"] > 0
    assert theirs["kvmem_tier_up/host"] == 1


def test_top_and_inspect_look_at_the_running_engine(server: Server, arena: str) -> None:
    body = {"model": "smol", "prompt": prompt(320, 61), "max_tokens": 4, "session_id": "looked-at"}
    headers = {"Authorization": f"Bearer {KEY}"}
    told = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120)
    assert told.status_code == 200

    def run(*arguments: str) -> Any:
        command = [*KVMEM, *arguments, "--json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    (one,) = run("top", "--once", "--arena", arena)
    assert one["model"] == "smol"
    assert one["sessions"][0]["session"] == "looked-at"
    (session,) = run("inspect", "session", "looked-at", "--arena", arena)
    (branch,) = session["branches"]
    assert (branch["device"], branch["blocks"]) == (320, 10)
    namespaces = run("inspect", "namespace")
    (mine,) = [n for n in namespaces if any(arena in e["arena"] for e in n["engines"])]
    host = next(tier for tier in one["tiers"] if tier["name"] == "host")
    assert sum(e["blocks"] for e in mine["engines"] if arena in e["arena"]) == host["blocks"]


def test_stats_are_of_the_running_engine(server: Server, arena: str) -> None:
    before = stats(arena)["counters"]
    complete(server, prompt(320, 10))
    after = stats(arena)["counters"]
    assert after["requests"] == before["requests"] + 1
    assert after["prompt_tokens"] == before["prompt_tokens"] + 320
    assert after["blocks_stored"] > before["blocks_stored"]
    assert after["failures"] == 0


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_ledger_is_asked_and_answered_by_ids(server: Server, smollm2: str, kind: Any) -> None:
    import transformers

    from kvmem.context import ChatRenderer, Ledger

    renderer = ChatRenderer.of(transformers.AutoTokenizer.from_pretrained(smollm2))
    system = f"You are {kind}, one of a team that plans long journeys by sea. " * 6
    ledger = Ledger.open(renderer, system=system, session_id=f"ledger-{kind}")
    path = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}[kind]
    had = 0
    for turn in range(3):
        ledger.append({"role": "user", "content": f"Question {turn}: where to, and why?"})
        body = ledger.request(kind, model="smol", max_tokens=24, temperature=1.0, seed=turn)
        told = httpx.post(
            server.url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120
        )
        assert told.status_code == 200, told.text
        response = told.json()
        span = ledger.commit(response)  # it compares what the engine was asked
        assert 0 < span.sampled <= 24
        asked = span.stop - span.sampled
        tokens = response["kv_transfer_params"]["kvmem"]["tokens"]
        assert tokens["prompt"] == asked
        # All of the last prompt and reply but its last token, in whole blocks.
        assert tokens["device"] + tokens["host"] == min(had, asked - 1) // 32 * 32
        had = span.stop - 1
    assert [m["role"] for m in ledger.messages()] == ["system", *["user", "assistant"] * 3]


@pytest.fixture
def switch(server: Server) -> Iterator[Callable[..., dict[str, bool]]]:
    """Switches over HTTP, or tells what stands; both are on afterwards."""

    def switch(**change: bool) -> dict[str, bool]:
        with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}) as client:
            url = server.url + SWITCH
            told = client.post(url, json=change) if change else client.get(url)
            assert told.status_code == 200, told.text
            return told.json()

    yield switch
    switch(loads=True, stores=True)


def test_loads_switched_off_are_off_at_the_next_request_and_on_again_without_a_restart(
    server: Server, arena: str, switch: Callable[..., dict[str, bool]]
) -> None:
    # 63 blocks on the device, 32 a prompt: two prompts push off the one before them.
    first, second, _ = (complete(server, prompt(1000, seed)) for seed in (21, 22, 23))
    assert switch(loads=False) == {"loads": False, "stores": True}
    assert stats(arena)["switch"] == {"loads": False, "stores": True}
    off = complete(server, prompt(1000, 21))
    told = off.kv_transfer_params["kvmem"]
    assert told["tokens"] == {
        "prompt": 1000,
        "device": 0,
        "host": 0,
        "disk": 0,
        "far": 0,
        "computed": 1000,
    }
    assert (told["miss"], told["off"]) == ("load_off", {"load": "switch"})
    assert off.choices[0].text == first.choices[0].text

    assert switch(loads=True) == {"loads": True, "stores": True}
    on = complete(server, prompt(1000, 22))
    told = on.kv_transfer_params["kvmem"]
    assert told["tokens"]["host"] == 999 // 32 * 32 - told["tokens"]["device"]
    assert told["tokens"]["host"] > 0
    assert told["miss"] == "none"
    assert "off" not in told
    assert on.choices[0].text == second.choices[0].text


def test_stores_switched_off_by_the_command_are_off_at_the_next_request(
    server: Server, arena: str, switch: Callable[..., dict[str, bool]]
) -> None:
    for state, stored in (("off", 0), ("on", 320 // 32)):
        command = [*KVMEM, "switch", "--arena", arena, "--stores", state]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert f"stores {state}" in told
        assert switch() == {"loads": True, "stores": state == "on"}
        receipt = complete(server, prompt(320, 31)).kv_transfer_params["kvmem"]
        assert receipt["blocks_stored"] == stored
        assert receipt.get("off") == ({"store": "switch"} if state == "off" else None)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_switch_wants_the_servers_key(server: Server, method: str) -> None:
    for headers in ({}, {"Authorization": "Bearer guess"}):
        told = httpx.request(method, server.url + SWITCH, headers=headers, json={"loads": False})
        assert told.status_code == 401
    with_key = httpx.get(server.url + SWITCH, headers={"Authorization": f"Bearer {KEY}"})
    assert with_key.json() == {"loads": True, "stores": True}


def test_a_switch_that_is_not_understood_names_the_field(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    told = httpx.post(server.url + SWITCH, headers=headers, json={"loads": "off"})
    assert told.status_code == 400
    assert told.json()["error"]["param"] == "loads"


def test_a_killed_engine_frees_its_memory_and_leaves_no_name(
    smollm2: str, arena: str, server: Server, tmp_path: Path
) -> None:
    path = Arena.path_of(f"killed-{os.getpid()}")
    dead = Arena.path_of(f"dead-{os.getpid()}")
    dead.symlink_to("/proc/4194305/fd/7")  # above the kernel's highest pid: an owner that is gone
    with serve(smollm2, f"killed-{os.getpid()}", tmp_path / "log") as killed:
        assert not dead.is_symlink()  # a start removes the names of the dead
        complete(killed, prompt(200, 11))
        pid = stats(f"killed-{os.getpid()}")["pid"]
        assert path.stat().st_nlink == 0  # no name holds the bytes: the kernel frees them
        os.kill(pid, signal.SIGKILL)
    assert not path.is_symlink()  # `kvmem serve` outlived its engine, and swept
    assert stats(arena)["pid"] != pid  # the engine beside them was not touched
