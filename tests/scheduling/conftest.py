"""One configuration for all engines of this folder, and loads that wait for nobody."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scheduling.engine import make_config


@pytest.fixture(scope="package")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without a forward waits for the thread that loads, which here is the test."""
    monkeypatch.setattr("kvmem.engines.vllm.worker.IDLE_WAIT_S", 0.0)
