"""bench_agents' own parts: who is played, what they wait for, and what makes it fail."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks._agents import SETS, Hinted, Team, team_of, waits_of
from benchmarks._fleet import Call, score
from benchmarks.bench_agents import Told, faults

CALLS = ["[cd(folder='a')]", "Done.", "[ls()]", "Done."]


def trace(folder: Path, name: str, sessions: int) -> None:
    """Sessions of four calls: a tool, a person, a tool."""
    rows = []
    for session in range(sessions):
        for turn, reply in enumerate(CALLS):
            messages = [
                {"role": "system" if i == 0 else "user", "content": f"{name} {session} {i}"}
                for i in range(turn + 2)
            ]
            rows.append(
                {
                    "id": len(rows), "session": f"s{session}", "agent": "main", "turn": turn,
                    "parent": len(rows) - 1 if turn else None, "t": None, "base": None, "keep": 0,
                    "messages": messages, "output": {"role": "assistant", "content": reply},
                    "tool_gap_s": None,
                    "gap_kind": [None, "tool", "user", "tool"][turn],
                }
            )  # fmt: skip
    header = {"kvtrace": 1, "set": name, "kind": "messages", "order": "by_session"}
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in [header, *rows]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in SETS:
        trace(tmp_path, name, 12)
    return tmp_path


def team(folder: Path | None, seed: int = 1, **more: Any) -> Team:
    settings: dict[str, Any] = {
        "agents": 6, "turns": 4, "gap_scale": 0.25, "gap_cap_s": 30.0, "start_s": 9.0,
        "max_tokens": 4, "lead_s": 1.0, "fits": lambda messages: True,
    }  # fmt: skip
    return team_of(folder, seed=seed, **{**settings, **more})


def test_what_agents_wait_for_is_read_from_their_replies(folder: Path) -> None:
    waits = waits_of(folder / f"{SETS[0]}.jsonl.gz")
    assert waits["s3"] == ["tool:cd", "user", "tool:ls", "over"]


def test_a_team_is_half_of_either_set_and_the_same_for_a_seed(folder: Path) -> None:
    one = team(folder)
    assert sorted(m.agent.source for m in one.members) == sorted([*SETS] * 3)
    assert all(m.waits == ["", "tool:cd", "user", "tool:ls"] for m in one.members)
    assert all(0.0 <= gap <= 30.0 for m in one.members for gap in m.gaps_s)
    assert one == team(folder)
    assert one != team(folder, seed=2)


def test_conversations_that_do_not_fit_are_left_out(folder: Path) -> None:
    def fits(messages: Sequence[Any]) -> bool:
        return messages[0]["content"].split()[1] in ("1", "2", "3")

    assert {m.agent.name.rpartition("/")[2] for m in team(folder, fits=fits).members} == {
        "s1", "s2", "s3",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="0 conversations"):
        team(folder, fits=lambda messages: False)


def told(*, output: int = 5, transferred: bool = True) -> Told:
    call = Call(
        agent=0, turn=0, sent_s=0.0, done_s=1.0, ttft_s=0.5, prompt=[1, 2, 3], output=[output],
        cached=0, receipt=None,
    )  # fmt: skip
    oracle = msgspec.structs.replace(call, output=[5])
    return Told(
        score=score([call], [oracle], {}, block_tokens=2),
        ttft=[0.0] * 3, ttft_returning=[0.0] * 3, resident=None, transferred=transferred,
    )  # fmt: skip


def test_it_fails_where_an_output_differs_nothing_was_loaded_or_a_hint_was_lost() -> None:
    assert faults({"vllm": told(transferred=False), "kvmem_lru": told()}, {}) == []
    found = faults(
        {"vllm": told(), "kvmem_lru": told(output=6), "lmcache": told(transferred=False)},
        {"kvmem_hints": Hinted(failed=2)},
    )
    assert found == [
        "kvmem_lru: 1 outputs differ from vLLM's alone",
        "lmcache: no block was loaded from the host tier",
        "kvmem_hints: 2 hints failed",
    ]
