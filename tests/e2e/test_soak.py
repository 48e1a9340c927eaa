"""Minutes of mixed traffic on `kvmem serve`: right answers, nothing kept, nothing in the log.

`python -m benchmarks.soak` is the same for an hour.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak.plan import SHORT_MINUTES, Plan
from benchmarks.soak.run import run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_mixed_traffic_is_answered_right_and_leaves_nothing(smollm2: str, tmp_path: Path) -> None:
    result = run(Plan(minutes=SHORT_MINUTES, folder=tmp_path), Path(smollm2))
    assert result.trouble == [], result.line()
