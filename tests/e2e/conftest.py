"""What several modules here share: one `kvmem serve` of the real model, for as long as they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from kvmem.demo.server import Server
from tests.e2e.host import BLOCK


@pytest.fixture(scope="session")
def served(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The model is "smol", in float32; tests tell their prompts apart from one another's."""
    command = [
        sys.executable, "-m", "kvmem.cli", "serve", smollm2,
        "--kvmem-host-gb", "0.25", "--kvmem-arena", f"served-{os.getpid()}",
        "--kvmem-eviction", "agents",
        "--dtype", "float32", "--block-size", str(BLOCK), "--max-model-len", "4096",
        "--num-gpu-blocks-override", "512", "--enforce-eager", "--served-model-name", "smol",
        "--enable-prompt-tokens-details", "--enable-auto-tool-choice",
        "--tool-call-parser", "hermes",
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]  # fmt: skip
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    }
    log = tmp_path_factory.mktemp("served") / "log"
    with Server(command, log=log, environ=environ) as server:
        yield server
