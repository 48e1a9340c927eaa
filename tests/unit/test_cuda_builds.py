"""Where there is nvcc, the CUDA sources compile for every architecture, and import anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvmem.store.scratch import Scratch

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
    run(tool("cmake"), "--build", folder, "--target", "kvmem_cuda", "kvmem_core")
    return folder


def test_the_library_has_code_for_each_architecture(built: Path) -> None:
    rules = (built / "build.ninja").read_text()
    for architecture in ("80", "90", "100"):
        assert f"arch=compute_{architecture}" in rules
    assert b"MoveSteps" in (built / "libkvmem_cuda.a").read_bytes()


@pytest.mark.parametrize(
    ("release", "architectures"),
    [("11.7", "80"), ("11.8", "80;90"), ("12.6", "80;90"), ("12.8", "80;90;100")],
)
def test_an_older_toolkit_is_asked_only_for_what_it_knows(
    release: str, architectures: str, tmp_path: Path
) -> None:
    older = tmp_path / "nvcc"  # the one that is here, but for what it says of itself
    says = f"Cuda compilation tools, release {release}, V{release}.1"
    older.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "{says}" && exit\n'
        f'exec {shutil.which("nvcc")} "$@"\n'
    )
    older.chmod(0o755)
    options = ["-DKVMEM_PYTHON=OFF", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    options.append(f"-DCMAKE_CUDA_COMPILER={older}")
    run(tool("cmake"), "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *options)
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert f"CMAKE_CUDA_ARCHITECTURES:STRING={architectures}\n" in cache


def run_without_a_gpu(built: Path, name: str, *options: str) -> None:
    source = ROOT / "tests" / "native" / "cuda" / f"{name}.cc"
    program = built / name
    library = built / "libkvmem_cuda.a"
    core = built / "libkvmem_core.a"
    run("nvcc", "-std=c++20", "-I", ROOT / "csrc", source, library, core, *options, "-o", program)
    run(program)


def test_an_older_error_is_neither_taken_for_the_launch_s_nor_cleared(built: Path) -> None:
    wraps = ("--wrap=cudaLaunchKernel", "--wrap=cudaGetLastError")
    run_without_a_gpu(built, "launch_errors", *(w for wrap in wraps for w in ("-Xlinker", wrap)))


def test_the_module_imports_without_a_gpu_and_says_so() -> None:
    cuda = pytest.importorskip("kvmem._cuda")
    if cuda.n_devices() > 0:
        pytest.skip("there is a GPU: tests/gpu looks at it")
    scratch = Scratch(4, 4096, 1, bytes(32))
    with pytest.raises(RuntimeError, match="cudaGetDevice: "):
        cuda.GpuCopier(scratch.buffer, 0)
    for arguments in ({"rank": -1}, {"rank": 1024}, {"grid": 0}, {"method": "fast"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            cuda.GpuCopier(scratch.buffer, 0, **arguments)
    with pytest.raises(ValueError, match="arena"):
        cuda.GpuCopier(np.zeros(4096, np.uint8), 0)
