"""Five minutes of the soak: mixed traffic over HTTP, held against an engine without kvmem."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak.plan import SHORT_MINUTES, Plan
from benchmarks.soak.run import run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_five_minutes_of_everything_are_right_and_leave_nothing(
    smollm2: str, tmp_path: Path
) -> None:
    """A hundred answers and more, each as the engine without kvmem gives it; resets, drills,
    adapters, salts and aborts among them; no error in a log, no lease, no memory that grew."""
    result = run(Plan(minutes=SHORT_MINUTES, folder=tmp_path, least_asks=1), Path(smollm2))
    assert result.trouble == [], result.line()
    line = result.line()
    assert line["wrong"] == 0
    assert line["answers"] > 50
    assert line["blocks_loaded"] > 0
