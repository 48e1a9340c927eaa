"""`kvmem top` and `kvmem inspect session`: the live snapshot in a terminal, and for machines."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvmem.cli import app, inspecting, switching, top
from kvmem.telemetry.live import (
    Branch,
    Cause,
    Sample,
    Session,
    SessionDetail,
    Snapshot,
    Tier,
    Turn,
)

HOST = Tier(
    name="host", on=True, blocks=50, bytes=50 << 20, capacity_bytes=100 << 20, capacity_blocks=100,
    in_bytes=10 << 20, out_bytes=30 << 20, evicted_blocks=4, under_way=2,
)  # fmt: skip
DISK = Tier(name="disk", on=False, blocks=9, bytes=1 << 30, capacity_bytes=1 << 30)


def snapshot(at_s: float, tokens: float, tiers: tuple[Tier, ...] = (HOST, DISK)) -> Snapshot:
    return Snapshot(
        at_s=at_s, model="smol", pid=7, arena="kvmem-0-a", block_tokens=16, block_bytes=1 << 20,
        prefill_s_per_token=0.001, tiers=tiers, running=3, n_sessions=40,
        samples=(
            Sample("kvmem_prompt_tokens_total", ("host",), tokens),
            Sample("kvmem_prompt_tokens_total", ("computed",), tokens / 3),
        ),
        sessions=(
            Session("planner", 5, 1000, 100, 400, 0, 500, 0.25, 1.0, at_s - 2, 9.0,
                    {"evicted": 30, "first_time": 470}),
            Session("", 1, 10, computed=10, last_s=at_s),
        ),
        causes=tuple(
            Cause("evicted", tier="host", requests=n, tokens=n, ms=100.0 - n, fix="More host_gb.")
            for n in range(1, 9)
        ),
        off={"loads": "switch"}, failures=2, last_failure="load: x",
    )  # fmt: skip


def text(found: list[Snapshot], before: dict[str, Snapshot]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(top.render(found, before))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_sums_are_shown_at_first() -> None:
    told = text([snapshot(100.0, 900.0)], {})
    for part in ("smol", "pid 7", "3 running", "reused 75% of 1,200 tokens", "loads OFF by switch",
                 "50% of 100.0 MiB", "10.0 MiB", "30.0 MiB", "disk OFF", "planner", "50%",
                 "first_time 470", "2 s ago", "(no name)", "the last of 40 sessions",
                 "evicted (host)", "More host_gb.", "2 failures, the last: load: x"):  # fmt: skip
        assert part in told
    assert told.count("evicted (host)") == top.N_CAUSES


def test_flows_are_what_happened_since() -> None:
    later = msgspec.structs.replace(HOST, in_bytes=30 << 20, evicted_blocks=10)
    before = {"kvmem-0-a": snapshot(100.0, 900.0)}
    told = text([snapshot(102.0, 1500.0, (later,))], before)
    for part in ("reused 75% of 800, 400 tokens/s", "10.0 MiB/s", "0 B/s"):
        assert part in told
    (row,) = [line for line in told.splitlines() if line.startswith("host")]
    assert row.split()[-2:] == ["6", "2"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    def snapshots(**more: Any) -> list[Snapshot]:
        asked.update(more)
        return [snapshot(100.0, 900.0), msgspec.structs.replace(snapshot(1.0, 1.0), arena="else")]

    here = SimpleNamespace(path=Path("/dev/shm/kvmem-0-a"))
    monkeypatch.setattr(top, "snapshots", snapshots)
    monkeypatch.setattr(switching, "engines", lambda name: [here])
    return asked


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_machines_get_the_snapshot(engine: dict[str, Any]) -> None:
    ran = run("top", "--once", "--json", "--sessions", "3")
    (told,) = json.loads(ran.stdout)
    assert msgspec.convert(told, Snapshot) == snapshot(100.0, 900.0)
    assert engine["sessions"] == 3


def test_once_is_once(engine: dict[str, Any]) -> None:
    ran = run("top", "--once")
    assert ran.exit_code == 0
    assert ran.stdout.count("smol") == 1


def test_an_engine_that_does_not_answer_is_no_engine_that_is_not_there(
    engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "snapshots", lambda **more: [])
    ran = run("top", "--once")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "do not answer" in ran.stderr
    monkeypatch.setattr(switching, "engines", lambda name: [])
    assert "no engine" in run("top", "--once").stderr


def test_a_session_is_told_with_where_its_prompts_are_now(
    engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    detail = SessionDetail(
        "kvmem-0-a", Session("s", 2, 200, computed=50, missed={"evicted": 50}),
        (Turn("r2", "s", 1.0, 2.0, 100, 30, 40, 0, 30, 0.0, 0.0, 0.0),),
        ({"request_id": "r2", "session": "s", "prompt": 100, "at_s": 1.0,
          "runs": [{"reason": "evicted", "first": 70, "tokens": 30, "tier": "host"}]},),
        (Branch("r2", 100, 6, 32, 64, 0), Branch("r1", 90, 5)),
    )  # fmt: skip
    monkeypatch.setattr(inspecting, "session_of", lambda path, name: detail)
    told = run("inspect", "session", "s").stdout
    for part in ("s: 2 requests, 200 prompt tokens, 150 reused (75%)", "50 tokens missed: evicted",
                 "r2: 6 blocks computed: now 32 tokens on the device, 64 on the host",
                 "r1: 5 blocks computed\n", "r2: 100 tokens, device 30, host 40, disk 0, far 0",
                 "30 tokens  evicted (tier host)"):  # fmt: skip
        assert part in told
    (found,) = json.loads(run("inspect", "session", "s", "--json").stdout)
    assert msgspec.convert(found, SessionDetail) == detail
    empty = SessionDetail("kvmem-0-a", None)
    monkeypatch.setattr(inspecting, "session_of", lambda path, name: empty)
    ran = run("inspect", "session", "s")
    assert (ran.exit_code, ran.stdout) == (1, "")
