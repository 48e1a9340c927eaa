"""The engines that are compared, and what all of them share.

Every arm gets the same model, block size, device bytes and OpenMP binding. vLLM's CPU build runs
one thread without a connector and two with one unless VLLM_CPU_OMP_THREADS_BIND says which, so it
is always set. LMCache runs as its documentation's multiprocess server with shared memory, in an
environment of its own that holds the same vLLM.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._process import Child, free_port

__all__ = [
    "BLOCK_TOKENS",
    "Engine",
    "EngineAnswer",
    "environment_of",
    "kv_bytes_per_token",
    "kvmem_transfer",
    "lmcache_python",
    "lmcache_server",
    "lmcache_transfer",
]

BLOCK_TOKENS = 128
_PROJECT = Path(__file__).resolve().parent.parent
_START_S = 300.0
_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


def environment_of(cores: str | None = None) -> dict[str, str]:
    """What every engine's environment gets. `cores` as OMP_PLACES ranges; None for all."""
    bind = cores or _ranges(sorted(os.sched_getaffinity(0)))
    return {
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(_PROJECT), *_given("PYTHONPATH")]),
    }


def kv_bytes_per_token(model: Path, dtype: str) -> int:
    """K and V of all layers, from the checkpoint's config.json."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    return int(values * _DTYPE_BYTES[dtype])


def kvmem_transfer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's kv_transfer_config for kvmem with these settings."""
    return {
        "kv_connector": "KvmemConnector",
        "kv_connector_module_path": "kvmem.engines.vllm.connector",
        "kv_role": "kv_both",
        # No arm computes what it could load, to compare it.
        "kv_connector_extra_config": {"shadow_share": 0.0, **settings},
    }


def lmcache_transfer(port: int) -> dict[str, Any]:
    """vLLM's kv_transfer_config for the LMCache server at `port`."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": port,
        },
    }


def lmcache_python(given: Path | None) -> Path | None:
    """The Python that has LMCache and vLLM: `given`, else .venv-lmcache's, else None.

    Raises:
        SystemExit: `given` has no LMCache.
    """
    python = given or _PROJECT / ".venv-lmcache" / "bin" / "python"
    if not python.exists():
        if given is not None:
            raise SystemExit(f"no Python at {given}: --lmcache-python names one with LMCache")
        return None
    probe = [str(python), "-c", "import importlib.metadata as m; print(m.version('lmcache'))"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        if given is not None:
            raise SystemExit(f"no LMCache in {given}: {found.stderr.strip().splitlines()[-1]}")
        return None
    return python


@contextlib.contextmanager
def lmcache_server(python: Path, *, host_bytes: int, log: Path) -> Iterator[int]:
    """LMCache's server with an L1 of `host_bytes` in shared memory; yields its port."""
    port, http = free_port(), free_port()
    name = f"lmcache_bench_{os.getpid()}_{port}"
    command = [
        *(str(python.parent / "lmcache"), "server", "--host", "127.0.0.1"),
        *("--port", str(port), "--http-port", str(http)),
        *("--chunk-size", str(BLOCK_TOKENS), "--eviction-policy", "LRU"),
        *("--l1-size-gb", f"{host_bytes / 2**30:.6f}", "--no-l1-use-lazy"),
        *("--supported-transfer-mode", "auto", "--shm-name", name),
    ]
    try:
        with Child(command, log=log, env=environment_of()) as server:
            url = f"http://127.0.0.1:{http}/"
            server.until(lambda: _answers(url), seconds=120, what="LMCache's server")
            yield port
    finally:
        (Path("/dev/shm") / name).unlink(missing_ok=True)


class EngineAnswer(msgspec.Struct, frozen=True):
    """One request of one token: seconds to it, prompt tokens not computed, kvmem's receipt."""

    ttft_s: float
    cached: int
    token: int
    report: dict[str, Any] | None


class Engine(Child):
    """benchmarks/_engine.py in a child; a context manager."""

    def __init__(self, python: Path, settings: Mapping[str, Any], *, log: Path) -> None:
        super().__init__(
            [str(python), "-m", "benchmarks._engine", json.dumps(settings)],
            log=log,
            env=environment_of(),
            cwd=_PROJECT,
            pipes=True,
        )

    def wait_ready(self) -> None:
        """Returns when the engine takes requests.

        Raises:
            ChildError: it ended instead.
        """
        self._answer()

    def generate(self, ids: list[int], params: Mapping[str, Any] | None = None) -> EngineAnswer:
        """One token after `ids`; the engine has been quiet before."""
        self.settle()
        return msgspec.convert(self._ask(op="generate", ids=ids, params=params), EngineAnswer)

    def reset(self) -> None:
        """Empties the device's prefix cache; what a connector keeps stays."""
        self.settle()
        if not self._ask(op="reset")["done"]:
            raise RuntimeError(f"the engine kept its prefix cache; its log ends:\n{self.tail()}")

    def _ask(self, **command: Any) -> dict[str, Any]:
        self.check()
        self.stdin.write(json.dumps(command).encode() + b"\n")
        self.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.stdout.readline()
        if not line:
            self.fail()
        answer: dict[str, Any] = json.loads(line)
        return answer


def _given(name: str) -> list[str]:
    return [os.environ[name]] if os.environ.get(name) else []


def _ranges(cores: list[int]) -> str:
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
