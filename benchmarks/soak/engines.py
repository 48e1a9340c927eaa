"""The two servers: `kvmem serve` under test, and vLLM alone, the oracle, of the same flags."""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import _arms
from benchmarks._process import Child, free_port
from benchmarks.soak.client import MODEL, Client
from benchmarks.soak.plan import Plan
from kvmem.cli.live import Page, pages

__all__ = ["Engine", "oracle", "under_test"]

_DTYPE = "float32"
_START_S = 600.0
_STOP_S = 120.0
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # resets over HTTP
    "OMP_WAIT_POLICY": "PASSIVE",  # beside other work a spinning thread holds up the one it awaits
}
_ORACLE_TOKENS = 65_536  # of KV on its device: enough that a shared prefix is computed once


class Engine(Child):
    """A server in a process group of its own; a context manager that ends the group."""

    def __init__(self, command: Sequence[str], *, log: Path, arena: str | None) -> None:
        self.port = free_port()
        self.arena = arena
        super().__init__(
            [sys.executable, "-m", *command, "--port", str(self.port)],
            log=log,
            env={**_arms.environment_of(), **_ENVIRONMENT},
        )

    def wait_ready(self) -> None:
        """Returns when it takes requests.

        Raises:
            ChildError: it ended, or was not ready in ten minutes.
        """
        self.until(self._answers, seconds=_START_S, what="the server")

    def stop(self) -> None:
        """Ends it as its user would, with a signal to the server alone, which ends the others.

        Raises:
            subprocess.TimeoutExpired: it does not end.
        """
        os.kill(self.group, signal.SIGTERM)
        self._process.wait(_STOP_S)

    def client(self) -> Client:
        """A client of it."""
        return Client(f"http://127.0.0.1:{self.port}")

    def pids(self) -> list[int]:
        """The processes that it consists of."""
        return self._members()

    def page(self) -> Page | None:
        """What kvmem in it says of itself, or None."""
        if self.arena is None:
            return None
        return next((page for page in pages() if page.arena.endswith(f"-{self.arena}")), None)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as told:
                return bool(told.status == 200)
        except OSError:
            return False


def under_test(plan: Plan, model: Path, adapters: Mapping[str, Path], *, arena: str) -> Engine:
    """`kvmem serve` with little room on the device and in the host tier."""
    ours = ["--kvmem-host-gb", str(plan.host_gb), "--kvmem-arena", arena]
    command = ["kvmem.cli", "serve", str(model), *ours, "--host", "127.0.0.1"]
    device_bytes = plan.device_blocks * _block_bytes(plan, model)
    return Engine(
        [*command, *_flags(plan, device_bytes, adapters)],
        log=plan.folder / "kvmem.log",
        arena=arena,
    )


def oracle(plan: Plan, model: Path, adapters: Mapping[str, Path]) -> Engine:
    """vLLM alone, with room for everything."""
    command = ["vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    device_bytes = _ORACLE_TOKENS // plan.block_tokens * _block_bytes(plan, model)
    return Engine(
        [*command, *_flags(plan, device_bytes, adapters)],
        log=plan.folder / "oracle.log",
        arena=None,
    )


def _flags(plan: Plan, device_bytes: int, adapters: Mapping[str, Path]) -> list[str]:
    flags = [
        *("--served-model-name", MODEL, "--dtype", _DTYPE, "--enforce-eager"),
        *("--block-size", str(plan.block_tokens), "--max-model-len", str(plan.max_model_len)),
        *("--max-num-seqs", str(plan.streams), "--max-num-batched-tokens", str(plan.step_tokens)),
        *("--kv-cache-memory-bytes", str(device_bytes), "--disable-uvicorn-access-log"),
    ]
    if adapters:
        named = [f"{name}={folder}" for name, folder in adapters.items()]
        flags += ["--enable-lora", "--max-loras", str(len(adapters) + 1), "--lora-modules", *named]
    return flags


def _block_bytes(plan: Plan, model: Path) -> int:
    return _arms.kv_bytes_per_token(model, _DTYPE) * plan.block_tokens
