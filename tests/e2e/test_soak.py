"""Five minutes of the soak: mixed traffic over HTTP, held against an engine without kvmem."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.soak.plan import SHORT_MINUTES, Plan
from benchmarks.soak.run import run

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif("KVMEM_SOAK" not in os.environ, reason="nine minutes: `make soak` runs it"),
]


def test_five_minutes_of_everything_are_right_and_leave_nothing(
    smollm2: str, tmp_path: Path
) -> None:
    """Each answer is as the engine without kvmem gives it; resets, drills, adapters, salts and
    aborts among them; no error in a log, no lease, no memory that grew.

    Which kinds of things come about in five minutes is the machine's speed to say (a preemption
    does not always); the hour must see all of them.
    """
    result = run(Plan(minutes=SHORT_MINUTES, folder=tmp_path, least_asks=1), Path(smollm2))
    assert set(result.trouble) <= {"never_happened"}, result.line()
    line = result.line()
    assert line["wrong"] == 0
    assert line["answers"] > 50
    assert line["hung_up"] > 0
    assert line["blocks_loaded"] > 0
    assert line["rests"] == 6
