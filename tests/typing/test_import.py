from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "vllm", "transformers", "lmcache", "numpy", "matplotlib", "openai", "httpx"}
# CPU time of the import alone, in a process of its own: the interpreter's start is not in it.
PROBE = """
import json, sys, time
start = time.process_time()
import {module}
spent = time.process_time() - start
print(json.dumps([spent, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def import_alone(module: str) -> tuple[float, set[str]]:
    """CPU seconds that importing `module` takes in a fresh process, and what it brings along."""
    out = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    spent, modules = json.loads(out)
    return spent, set(modules)


def test_import_kvmem_brings_no_heavy_library() -> None:
    _, modules = import_alone("kvmem")
    assert "kvmem" in modules
    assert modules & HEAVY == set()


def test_probe_sees_a_heavy_library() -> None:
    _, modules = import_alone("numpy")
    assert "numpy" in modules & HEAVY


def test_import_kvmem_takes_under_a_fifth_of_a_second_of_cpu() -> None:
    assert min(import_alone("kvmem")[0] for _ in range(5)) < 0.2


def test_cli_answers_help_without_an_engine() -> None:
    _, modules = import_alone("kvmem.cli")
    assert modules & {"torch", "vllm", "transformers", "matplotlib"} == set()
