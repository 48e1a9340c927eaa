"""A vLLM that lacks what kvmem needs: one clear line, and the engine runs as if it were alone.

`tests/versions/matrix.py` runs this file with a release that is such a one. With any other, the
table of what kvmem needs is given one thing that nothing has, in every process of the engine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvmem.demo.server import Server
from kvmem.engines.vllm import interface
from tests.conftest import files_left
from tests.e2e.host import Engine, EngineHost, Turn, assert_same, prompt

pytestmark = pytest.mark.engine

BREAK = """
from kvmem.engines.vllm import interface
gone = interface.Need("name", "vllm.v1.core.sched.output", "SchedulerOutput.gone")
interface.NEEDS = (*interface.NEEDS, gone)
"""
SMALL = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
}


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What makes the engine lack something, where it lacks nothing by itself."""
    if interface.why_off() is not None:
        return {}
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(BREAK)
    return {"PYTHONPATH": str(folder)}


def started(model: str, environ: dict[str, str], **options: Any) -> EngineHost:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        return EngineHost(model, kvmem=None, **options)


def turns(engine: Engine, tokens: list[int]) -> list[Turn]:
    """The same prompt twice, and again after the device's cache was emptied."""
    first = [engine.generate([tokens])[0] for _ in range(2)]
    engine.forget_device()
    return [*first, engine.generate([tokens])[0]]


def resets(engine: Engine) -> bool:
    engine.settle()
    return bool(engine.scheduler.reset_prefix_cache(reset_connector=True))


def connectors(engine: Engine) -> set[str]:
    if engine.connector is None:
        return set()
    return {type(c).__name__ for c in (engine.connector, engine.worker_connector)}


def lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if "kvmem: off: " in line]


def assert_line(line: str) -> None:
    assert f"vLLM {interface.installed_version()} lacks " in line
    assert line.endswith(f"vLLM runs without kvmem, which is known to work with {interface.KNOWN}.")


def run_through(
    model: str, environ: dict[str, str], tokens: list[int], **options: Any
) -> tuple[set[str], list[Turn], bool]:
    host = started(model, environ, **options)
    try:
        return host.run(connectors), host.run(turns, tokens), host.run(resets)
    finally:
        host.close()


def test_an_engine_runs_as_without_kvmem(
    smollm2: str, environ: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    transfer = {
        "kv_connector": "KvmemConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"host_gb": 0.5},
    }
    tokens = prompt(300, 1)
    names, with_it, reset = run_through(smollm2, environ, tokens, kv_transfer_config=transfer)
    assert names == {"InertConnector"}
    assert reset
    told = lines(capfd.readouterr().err)
    assert len(told) == 1
    assert_line(told[0])
    _, without, _ = run_through(smollm2, {}, tokens)
    for mine, plain in zip(with_it, without, strict=True):
        assert_same(mine, plain)
        assert (mine.cached, mine.receipt) == (plain.cached, None)


def test_one_command_runs_vllm_without_kvmem(
    smollm2: str, environ: dict[str, str], tmp_path: Path
) -> None:
    name = f"off-{os.getpid()}"
    command = [
        *(sys.executable, "-m", "kvmem.cli", "serve", smollm2, "--kvmem-arena", name),
        *("--max-model-len", "512", "--enforce-eager", "--served-model-name", "smol"),
    ]
    with Server(command, log=tmp_path / "log", environ={**SMALL, **environ}) as server:
        asked = {"model": "smol", "prompt": prompt(100, 2), "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120).json()
        assert answer["usage"]["completion_tokens"] == 4
        assert not answer.get("kv_transfer_params")
        assert files_left(name) == []
    told = lines((tmp_path / "log").read_text())
    assert len(told) == 1
    assert_line(told[0])
    assert told[0].startswith("kvmem: off: ")
