"""What stands at the top of the repository: nothing that a build made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"benchmarks", "csrc", "docs", "examples", "kvmem", "requirements", "tests", "tools"}
FILES = {
    ".ci", ".clang-format", ".clang-format-ignore", ".gitignore", "CMakeLists.txt", "LICENSE",
    "Makefile", "README.md", "pyproject.toml",
}  # fmt: skip


def test_only_sources_are_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository: this is an unpacked archive")
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    tracked = done.stdout.splitlines()
    assert {path.partition("/")[0] for path in tracked} == ROOMS | FILES
    built = (".o", ".a", ".so", ".pyc", "CMakeCache.txt")
    assert [path for path in tracked if path.endswith(built)] == []
