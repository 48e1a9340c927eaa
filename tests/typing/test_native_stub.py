from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_native_stub_is_what_the_module_offers(tmp_path: Path) -> None:
    made = tmp_path / "_core.pyi"
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "kvmem._core", "-o", str(made)],
        cwd=ROOT,
        check=True,
    )
    assert made.read_text() == (ROOT / "kvmem" / "_core.pyi").read_text(), (
        "kvmem/_core.pyi is not what the native module offers: `make golden` writes it anew"
    )
