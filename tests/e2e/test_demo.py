"""`kvmem demo --quick` as a user runs it, to its end and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "-m", "kvmem.cli", "demo", "--quick", "--output"]
TURNS = 9


@pytest.fixture(scope="module")
def played(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the demo wrote to, and what it printed."""
    assert smollm2  # made before, so that this is about the demo
    folder = tmp_path_factory.mktemp("demo") / "output"
    ran = subprocess.run(
        [*DEMO, str(folder)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return folder, ran.stdout


@pytest.fixture(scope="module")
def figures(played: tuple[Path, str]) -> Any:
    return json.loads((played[0] / "figures.json").read_text())


def test_every_output_is_equal(figures: Any) -> None:
    assert figures["outputs"] == {"equal": TURNS, "turns": TURNS, "first_different": None}


def test_prefixes_came_from_the_host_tier(figures: Any) -> None:
    alone, together = figures["summary"]
    assert alone["host_tokens"] == 0
    assert together["host_tokens"] > 0
    assert together["computed_tokens"] < alone["computed_tokens"]


def test_both_arms_were_asked_the_same(figures: Any) -> None:
    alone, together = (
        {turn["turn_id"]: turn["prompt_tokens"] for turn in arm["turns"]} for arm in figures["arms"]
    )
    assert alone == together
    assert len(alone) == TURNS


def test_clients_and_server_count_the_same_tokens(figures: Any) -> None:
    for summary, arm in zip(figures["summary"], figures["arms"], strict=True):
        assert summary["prompt_tokens"] == sum(turn["prompt_tokens"] for turn in arm["turns"])
        reused = summary["device_tokens"] + summary["host_tokens"]
        assert reused == sum(turn["cached_tokens"] for turn in arm["turns"])


def test_every_turn_knows_its_sources(figures: Any) -> None:
    summary, arm = figures["summary"][1], figures["arms"][1]
    told = [turn["host_tokens"] for turn in arm["turns"]]
    assert None not in told
    assert sum(told) == summary["host_tokens"]


def test_table_and_pictures_are_given(played: tuple[Path, str]) -> None:
    folder, printed = played
    for row in ("time to first token, p50", "reused from the host", f"{TURNS}/{TURNS}"):
        assert row in printed
    for name in ("timeline.svg", "timeline.png"):
        assert str(folder / name) in printed
        assert (folder / name).stat().st_size > 10_000


def test_progress_is_told_all_along(played: tuple[Path, str]) -> None:
    printed = played[1]
    for arm in ("vLLM alone", "vLLM + kvmem"):
        assert f"{arm}: starting the server" in printed
        assert f"{arm}: {TURNS} turns" in printed
    assert printed.count("first token after") == 2 * TURNS


@pytest.fixture
def interrupted(smollm2: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    assert smollm2
    # A shell that starts these tests in the background ignores it, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [*DEMO, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_takes_its_server_along(
    interrupted: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert interrupted.stdout is not None
    for line in interrupted.stdout:
        if "starting the server" in line:
            break
    server = _child_of(interrupted.pid)
    interrupted.send_signal(number)
    rest = interrupted.stdout.read()
    assert interrupted.wait() == 128 + number, rest
    assert "Traceback" not in rest
    assert _group(server) == []


def _child_of(pid: int) -> int:
    """The only child of `pid`, as soon as there is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while True:
        found = children.read_text().split()
        if found:
            return int(found[0])


def _group(leader: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == leader and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found
