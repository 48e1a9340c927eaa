"""Agent frameworks as they are, in their own environments, on the real engine through the gateway.

An adapter runs a loop of 20 turns, a recipe one of six (tests/frameworks/loops.py). What was
reused is read from the engine's own usage on the wire (tests/frameworks/tap.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvmem.demo.server import Server
from tests.e2e.host import BLOCK
from tests.frameworks.tap import Tap

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TURNS, FEWER = 20, 6
ADAPTERS = {
    "langchain": "langchain",
    "openai_agents": "openai-agents",
    "pydantic_ai": "pydantic-ai",
    "agent_framework": "agent-framework",
}
RECIPES = ["google_adk", "crewai"]


@pytest.fixture(scope="module")
def gateway(served: Server) -> Iterator[str]:
    command = [sys.executable, "-m", "kvmem.cli", "gateway", "--upstream", served.url]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()
        process.communicate()


Loop = tuple[dict[str, Any], list[dict[str, Any]]]


def run(name: str, url: str, turns: int) -> Loop:
    """What a loop prints, and the engine's usage, turn by turn."""
    python = ROOT / (".venv-crewai" if name == "crewai" else ".venv-frameworks") / "bin/python"
    if not python.exists():
        if os.environ.get("KVMEM_REQUIRE_ENGINE"):
            pytest.fail(f"{python} is not there: `make frameworks` makes it")
        pytest.skip("`make frameworks` makes the environment")
    with Tap(url, turns) as tap:
        done = subprocess.run(
            [str(python), "-m", "tests.frameworks.loops", name, tap.url],
            capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "TURNS": str(turns)},
        )  # fmt: skip
    assert not tap.failures
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), tap.usages


@pytest.fixture(scope="module")
def loops(gateway: str) -> Iterator[dict[str, Future[Loop]]]:
    """All of them, four at a time: the engine computes them in one batch."""
    with ThreadPoolExecutor(4) as pool:
        begun = {name: pool.submit(run, name, gateway, TURNS) for name in ADAPTERS}
        begun |= {name: pool.submit(run, name, gateway, FEWER) for name in RECIPES}
        yield begun


def reused(usages: list[dict[str, Any]]) -> tuple[int, int]:
    """Cached tokens and the ideal: whole blocks of the last prompt and its answer's all but one."""
    cached = ideal = had = 0
    for n, one in enumerate(usages):
        if n:
            cached += one["cached"]
            ideal += min(had, one["prompt"] - 1) // BLOCK * BLOCK
        had = one["prompt"] + one["sampled"] - 1
    return cached, ideal


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_keeps_20_turns_exact_and_announces_each_tool(
    loops: dict[str, Future[Loop]], name: str
) -> None:
    told, usages = loops[name].result()
    assert len(usages) == TURNS
    assert len(told["calls"]) == TURNS - 1
    cached, ideal = reused(usages)
    assert cached == ideal > 0
    session = ADAPTERS[name]
    assert {one["miss"] for one in usages[1:]} == {"none"}
    assert {one["session"] for one in usages} == {session}
    ends = [["session_end", session, ""]]
    gaps = [["tool_start", session, "look"], ["tool_end", session, "look"]] * (TURNS - 1)
    assert [hint[:3] for hint in told["hints"]] == gaps + ends
    # Each says how long the session is, as the engine counts it.
    lengths = [one["prompt"] + one["sampled"] for one in usages]
    assert [hint[3] for hint in told["hints"][:-1:2]] == lengths[:-1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_its_turns_exact(loops: dict[str, Future[Loop]], name: str) -> None:
    told, usages = loops[name].result()
    assert len(usages) == FEWER
    assert len(told["calls"]) == FEWER - 1
    cached, ideal = reused(usages)
    assert cached == ideal > 0
    assert {one["miss"] for one in usages[1:]} == {"none"}
