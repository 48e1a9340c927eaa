"""The scenarios of the engine matrix over HTTP, and those that end at the flags.

vLLM's own `serve` starts several API servers in front of one engine; as packaged for the CPU it
looks for metadata of a package named vllm and dies, so it is given some.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks import _models
from benchmarks._matrix import Cell, Outcome, Setup, WrongError, is_refusal
from benchmarks._matrix_engine import BLOCK, Turn, options_of
from benchmarks._matrix_host import ENVIRON
from benchmarks._matrix_judge import agree, expect, from_host
from kvmem.demo.server import Server, ServerFailed
from kvmem.engines.vllm import interface, launch

__all__ = ["SCENARIOS", "run"]

_MODEL = "tiny"
_FOUR = 4  # requests on connections of their own, so that each server gets some


def run(setup: Setup, folder: Path) -> list[Outcome]:
    """What each of the setup's cells came to."""
    if setup.kind == "flags":
        return [
            _timed(setup, scenario, lambda: _refused(setup, folder)) for scenario in setup.cells
        ]
    log = folder / "server.log"
    try:
        with Server(_command(setup, folder), log=log, environ=_environ(setup, folder)) as server:
            return [
                _timed(setup, scenario, lambda s=SCENARIOS[scenario]: ("right", s(server)))
                for scenario in setup.cells
            ]
    except ServerFailed as error:
        text = log.read_text(encoding="utf-8", errors="replace")
        refused = [line for line in text.splitlines() if is_refusal(line)]
        what, detail = ("refused", refused[0]) if refused else ("wrong", str(error)[:300])
        return [Outcome(Cell(setup, c).name, what, detail) for c in setup.cells]


def _timed(setup: Setup, scenario: str, do: Callable[[], tuple[Any, str]]) -> Outcome:
    begin = time.monotonic()
    try:
        verdict, detail = do()
    except (WrongError, httpx.HTTPError) as error:
        verdict, detail = "wrong", f"{type(error).__name__}: {error}"
    return Outcome(Cell(setup, scenario).name, verdict, detail, time.monotonic() - begin)


def _flags(setup: Setup, folder: Path) -> list[str]:
    options = options_of(
        setup, folder / setup.model, arena="matrix-server", kvmem=False, broken=False
    )
    del options["model"], options["skip_tokenizer_init"], options["disable_log_stats"]
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def _command(setup: Setup, folder: Path) -> list[str]:
    transfer = msgspec.json.encode(launch.transfer_config({"host_gb": 0.25})).decode()
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / setup.model)),
        *("--kv-transfer-config", transfer, "--served-model-name", _MODEL, "--host", "127.0.0.1"),
        *("--shutdown-timeout", "10", *_flags(setup, folder)),
    ]


def _environ(setup: Setup, folder: Path) -> dict[str, str]:
    metadata = folder / "metadata" / f"vllm-{interface.installed_version()}+cpu.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {interface.installed_version()}+cpu\n"
    )
    here = str(Path(__file__).resolve().parent.parent)
    return {
        **ENVIRON,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": f"{here}:{metadata.parent}",
        **setup.environ,
    }


def _ask(server: Server, prompt: list[int], **body: Any) -> Turn:
    """One completion on a connection of its own."""
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={
            "model": _MODEL,
            "prompt": prompt,
            "max_tokens": 8,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            **body,
        },
        timeout=120.0,
    ).raise_for_status()
    found = answer.json()
    choice = found["choices"][0]
    return Turn(
        tokens=choice["token_ids"],
        logprobs=choice["logprobs"]["token_logprobs"],
        cached=0,
        report=(found.get("kv_transfer_params") or {}).get("kvmem", {}),
    )


def _reset(server: Server, *, external: bool) -> None:
    httpx.post(
        f"{server.url}/reset_prefix_cache",
        params={"reset_external": str(external).lower()},
        timeout=60.0,
    ).raise_for_status()


def two_servers(server: Server) -> str:
    """What came in through one API server is found through the other."""
    prompt = _models.prompt(6 * BLOCK + 3, 4000)
    cold = _ask(server, prompt)
    expect(cold.host == 0, "a new prompt came from the host tier")
    hosts = []
    for _ in range(_FOUR):
        _reset(server, external=False)
        restored = _ask(server, prompt)
        from_host(restored, "through any of the servers")
        agree(restored, cold, "through any of the servers")
        hosts.append(restored.host)
    return f"from host {hosts[0]} each of {_FOUR} times"


def reset_endpoint(server: Server) -> str:
    """/reset_prefix_cache keeps what kvmem has; with reset_external=true nothing answers."""
    prompt = _models.prompt(6 * BLOCK + 3, 4100)
    cold = _ask(server, prompt)
    _reset(server, external=False)
    kept = _ask(server, prompt)
    from_host(kept, "after a plain reset")
    _reset(server, external=True)
    again = _ask(server, prompt)
    cached = again.host + again.device
    expect(cached == 0, f"{cached} tokens from before reset_external")
    agree(again, cold, "after reset_external")
    return f"from host {kept.host}, then {cached} after reset_external"


SCENARIOS: dict[str, Callable[[Server], str]] = {
    scenario.__name__: scenario for scenario in (two_servers, reset_endpoint)
}


def _refused(setup: Setup, folder: Path) -> tuple[str, str]:
    """`kvmem serve` looks at the flags and says no before an engine is started."""
    command = launch.command(str(folder / setup.model), {"host_gb": 0.25}, _flags(setup, folder))
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    last = (done.stderr.splitlines() or [""])[-1]
    if done.returncode == 2 and is_refusal(last):
        return "refused", last.removeprefix("kvmem: ")
    return "wrong", f"exit code {done.returncode}: {last}"
