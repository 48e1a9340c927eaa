"""The connector's door: whatever fails in kvmem, and on the way out of it, the engine goes on."""

from __future__ import annotations

import pytest

from kvmem.engines.vllm.connector import KvmemConnector

pytestmark = pytest.mark.engine


class BrokenHalf:
    """Every method raises but the one that notes failures."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def failed(self, where: str, error: str) -> None:
        self.told.append(f"{where}: {error}")

    def __getattr__(self, name: str) -> object:
        def broken(*_: object, **__: object) -> None:
            raise RuntimeError(name)

        return broken


@pytest.fixture
def half() -> BrokenHalf:
    return BrokenHalf()


@pytest.fixture
def connector(half: BrokenHalf) -> KvmemConnector:
    connector = KvmemConnector.__new__(KvmemConnector)
    connector._scheduler, connector._worker = half, None  # type: ignore[assignment]
    return connector


def test_a_way_out_that_fails_too_ends_in_an_answer_that_promises_nothing(
    connector: KvmemConnector, half: BrokenHalf
) -> None:
    orders = connector.build_connector_meta(None)  # type: ignore[arg-type]
    assert (orders.loads, orders.stores, orders.broken) == ([], [], [])  # type: ignore[attr-defined]
    assert half.told[:2] == [
        "build_connector_meta: RuntimeError: orders",
        "build_connector_meta: RuntimeError: break_new_loads",
    ]


def test_a_reset_that_fails_is_answered_false(connector: KvmemConnector, half: BrokenHalf) -> None:
    assert connector.reset_cache() is False
    assert half.told[0] == "reset_cache: RuntimeError: reset"


def test_a_failing_stats_page_costs_no_hook_its_answer(
    connector: KvmemConnector, half: BrokenHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "finished", lambda request, block_ids: (True, {}), raising=False)
    assert connector.request_finished(None, []) == (True, {})  # type: ignore[arg-type]
    assert half.told == ["write_stats: RuntimeError: write_stats"]


def test_a_close_that_fails_does_not_stop_the_shutdown(
    connector: KvmemConnector, half: BrokenHalf
) -> None:
    connector.shutdown()
    assert half.told == ["shutdown: RuntimeError: close"]
    assert connector._scheduler is None
