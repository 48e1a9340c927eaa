"""`kvmem serve` as a user runs it: an unmodified client, live stats, no rest after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmem.demo.server import Server
from kvmem.store.arena import Arena
from tests.e2e.host import prompt

pytestmark = pytest.mark.engine

KVMEM = [sys.executable, "-m", "kvmem.cli"]


def serve(model: str, name: str, log: Path) -> Server:
    command = [
        *KVMEM, "serve", model,
        "--kvmem-host-gb", "0.25", "--kvmem-arena", name,
        "--dtype", "float32", "--block-size", "32", "--max-model-len", "1536",
        "--num-gpu-blocks-override", "64", "--enforce-eager", "--served-model-name", "smol",
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

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
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


def test_stats_are_of_the_running_engine(server: Server, arena: str) -> None:
    before = stats(arena)["counters"]
    complete(server, prompt(320, 10))
    after = stats(arena)["counters"]
    assert after["requests"] == before["requests"] + 1
    assert after["prompt_tokens"] == before["prompt_tokens"] + 320
    assert after["blocks_stored"] > before["blocks_stored"]
    assert after["failures"] == 0


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
