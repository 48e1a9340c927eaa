"""One wheel serves every Python the project supports, and carries nothing but kvmem."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kvmem

ROOT = Path(__file__).resolve().parents[2]
DIST_INFO = f"kvmem-{kvmem.__version__}.dist-info"
VERSIONS = ["3.11", "3.12", "3.13"]
# What needs an engine or the demo's extra is not part of the base install.
IMPORT_ALL = """
import importlib, pkgutil, kvmem
EXTRAS = ("kvmem.agents.adapters.", "kvmem.dashboard.", "kvmem.store.far.redis_",
          "kvmem.store.far.lmcache_", "kvmem.telemetry.prometheus", "kvmem.telemetry.spans")
def walk(path, prefix):
    for module in pkgutil.iter_modules(path, prefix):
        if module.name in ("kvmem.engines", "kvmem.demo") or module.name.endswith("__main__"):
            continue
        if module.name.startswith(EXTRAS):
            continue
        loaded = importlib.import_module(module.name)
        print(module.name)
        if module.ispkg:
            walk(loaded.__path__, module.name + ".")
walk(kvmem.__path__, "kvmem.")
"""


def uv(*arguments: str) -> None:
    """Runs the environment's own uv, showing what it printed when it failed."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("uv")), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"},
    )
    assert done.returncode == 0, done.stderr


def find_python(version: str) -> str:
    """The Python of that version on this machine; skips the test where there is none."""
    done = subprocess.run(
        [str(ROOT / "tools" / "find-python"), version], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no Python {version} on this machine: {done.stderr.splitlines()[0]}")
    return done.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a user's build makes it, from the sources as they stand."""
    if not Path(sys.executable).with_name("uv").exists():
        pytest.skip("uv is not in this environment: `make setup` installs it")
    out = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", str(out))
    (built,) = out.glob("*.whl")
    return built


def test_wheel_serves_every_python_from_3_10(wheel: Path) -> None:
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("cp310", "abi3")
    assert platform.startswith(("linux", "manylinux"))


def test_wheel_holds_kvmem_its_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {"kvmem", DIST_INFO}
    assert [name for name in names if "test" in name.lower()] == []
    native = [name for name in names if name.endswith(".so")]
    # The GPU's copier where this machine could compile it.
    gpu = ["kvmem/_cuda.abi3.so"] if shutil.which("nvcc") else []
    assert sorted(native) == ["kvmem/_core.abi3.so", *gpu]
    assert {"kvmem/py.typed", "kvmem/_core.pyi"} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_wheel_declares_the_command_and_the_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert "kvmem = kvmem.cli:main" in entry_points
    assert "[vllm.general_plugins]" in entry_points


@pytest.mark.parametrize("version", VERSIONS)
def test_wheel_imports_with_its_base_dependencies_only(
    wheel: Path, tmp_path: Path, version: str
) -> None:
    python = find_python(version)
    uv("venv", "-q", "--python", python, str(tmp_path / "env"))
    inside = str(tmp_path / "env" / "bin" / "python")
    uv("pip", "install", "-q", "--python", inside, "-c", "requirements/dev.lock", str(wheel))
    done = subprocess.run(
        [inside, "-W", "error", "-c", IMPORT_ALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert {"kvmem._core", "kvmem.config", "kvmem.types"} <= set(done.stdout.split())
