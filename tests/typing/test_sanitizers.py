"""`make sanitize` sees what it is there to see: a small tree with one fault in it must fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RACE = """
#include <thread>
int main() {
  int count = 0;
  std::thread other([&] { ++count; });
  ++count;
  other.join();
  return 0;
}
"""
PAST_THE_END = """
#include <cstddef>
#include <vector>
int main(int argc, char**) {
  std::vector<int> values(4);
  return values.data()[static_cast<std::size_t>(argc) + 3];
}
"""
OVERFLOW = """
#include <climits>
int main(int argc, char**) {
  int most = INT_MAX - 1;
  most += argc + 1;
  return most == 0;
}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The build files and the smallest room of the core, with no native test yet."""
    for name in ("Makefile", "CMakeLists.txt", "tests/native/CMakeLists.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc" / "support").mkdir(parents=True)
    for name in ("version.h", "version.cc"):
        shutil.copy(ROOT / "csrc" / "support" / name, tmp_path / "csrc" / "support" / name)
    return tmp_path


def sanitize(tree: Path, source: str) -> subprocess.CompletedProcess[str]:
    """What `make sanitize` says of a tree whose one native test is `source`."""
    (tree / "tests" / "native" / "broken_test.cc").write_text(source)
    return subprocess.run(
        ["make", "--no-print-directory", "sanitize", f"PY={sys.executable}"],
        cwd=tree,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("source", "report"),
    [
        (RACE, "ThreadSanitizer: data race"),
        (PAST_THE_END, "AddressSanitizer: heap-buffer-overflow"),
        (OVERFLOW, "runtime error: signed integer overflow"),
    ],
    ids=["thread", "address", "undefined"],
)
def test_fault_is_reported(tree: Path, source: str, report: str) -> None:
    done = sanitize(tree, source)
    assert done.returncode != 0
    assert report in done.stdout + done.stderr


def test_sound_tree_passes(tree: Path) -> None:
    done = sanitize(tree, "int main() { return 0; }\n")
    assert done.returncode == 0, done.stdout + done.stderr


def test_tree_without_native_tests_fails(tree: Path) -> None:
    done = subprocess.run(
        ["make", "sanitize", f"PY={sys.executable}"], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "No tests were found" in done.stdout + done.stderr
