"""The import directions of docs/architecture.md hold, and the tool that checks them can see."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the tree at `root`, by that tree's own pyproject.toml."""
    # -S: without it the editable install would put the checkout's own kvmem before the tree's.
    paths = [str(root), sysconfig.get_paths()["purelib"]]
    run = (
        f"import sys; sys.path[:0] = {paths!r}; sys.argv = ['lint-imports', '--no-cache'];"
        "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", run],
        cwd=root,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"},
    )


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    """A copy of the Python sources that a test may spoil."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "kvmem", tmp_path / "kvmem", ignore=ignore)
    return tmp_path


def test_imports_go_downward_only() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_upward_import_is_reported(copied_tree: Path) -> None:
    path = copied_tree / "kvmem" / "types.py"
    path.write_text(path.read_text() + "\nimport kvmem.config\n")
    done = lint_imports(copied_tree)
    assert done.returncode == 1
    assert "kvmem.types -> kvmem.config " in done.stdout


def test_room_that_no_layer_names_is_reported(copied_tree: Path) -> None:
    (copied_tree / "kvmem" / "attic.py").write_text("")
    done = lint_imports(copied_tree)
    assert done.returncode == 1
    assert "attic" in done.stdout + done.stderr


@pytest.mark.parametrize("library", ["torch", "vllm", "transformers", "lmcache", "redis"])
def test_engine_library_outside_its_room_is_reported(copied_tree: Path, library: str) -> None:
    path = copied_tree / "kvmem" / "store" / "__init__.py"
    path.write_text(path.read_text() + f"\nimport {library}\n")
    done = lint_imports(copied_tree)
    assert done.returncode == 1
    assert f"kvmem.store -> {library} " in done.stdout


@pytest.mark.parametrize("module", ["hashing", "engines.vllm.launch"])
def test_web_framework_outside_its_rooms_is_reported(copied_tree: Path, module: str) -> None:
    path = copied_tree.joinpath("kvmem", *module.split(".")).with_suffix(".py")
    path.write_text(path.read_text() + "\ndef serve() -> None:\n    import starlette\n")
    done = lint_imports(copied_tree)
    assert done.returncode == 1
    assert f"kvmem.{module} -> starlette " in done.stdout
