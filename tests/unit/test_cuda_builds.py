"""Where there is nvcc, the CUDA sources compile for every architecture and refuse wrong batches."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine"),
]


def tool(name: str) -> str:
    beside = TOOLS / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"no {name}"
    return found


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder with the CUDA library in it."""
    folder = tmp_path_factory.mktemp("cuda")
    options = ["-DKVMEM_CUDA=ON", "-DKVMEM_PYTHON=OFF", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
    run(tool("cmake"), "--build", folder, "--target", "kvmem_cuda")
    return folder


def test_the_library_has_code_for_each_architecture(built: Path) -> None:
    rules = (built / "build.ninja").read_text()
    for architecture in ("80", "90", "100"):
        assert f"arch=compute_{architecture}" in rules
    assert b"CopyPieces" in (built / "libkvmem_cuda.a").read_bytes()


def test_wrong_batches_are_refused_without_a_gpu(built: Path) -> None:
    source = ROOT / "tests" / "native" / "cuda" / "refusals.cc"
    program = built / "refusals"
    include = ROOT / "csrc"
    run("nvcc", "-std=c++20", "-I", include, source, built / "libkvmem_cuda.a", "-o", program)
    run(program)
