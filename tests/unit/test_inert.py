"""Where vLLM lacks what kvmem needs, its connector does nothing, and says so once."""

from __future__ import annotations

import abc
import importlib
import logging
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvmem.engines.vllm import entry, interface

pytestmark = pytest.mark.engine

LINE = "off: vLLM 9 lacks everything."


@pytest.fixture
def inert(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The connector that vLLM is given here, were it a vLLM without what kvmem needs."""
    monkeypatch.setattr(interface, "why_off", lambda: LINE)
    yield importlib.reload(entry).KvmemConnector
    monkeypatch.undo()
    importlib.reload(entry)


def make(connector: Any, role: str, *arguments: Any) -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(is_kv_producer=True))
    return connector(config, KVConnectorRole[role], *(arguments or (SimpleNamespace(),)))


def test_a_served_engine_gets_the_connector() -> None:
    from kvmem.engines.vllm.connector import KvmemConnector

    assert entry.KvmemConnector is KvmemConnector


def test_another_gets_one_that_does_nothing(inert: Any) -> None:
    connector = make(inert, "SCHEDULER")
    assert connector.get_num_new_matched_tokens(None, 0) == (0, False)
    assert connector.request_finished(None, []) == (False, None)
    assert connector.request_finished_all_groups(None, ([],)) == (False, None)
    assert connector.reset_cache() is True
    assert connector.requires_kv_delivery is False
    assert connector.update_state_after_alloc(None, None, 0) is None
    assert connector.start_load_kv(None, some_new_argument=1) is None
    assert connector.get_finished(set()) == (None, None)
    assert connector.get_block_ids_with_load_errors() == set()
    orders = connector.build_connector_meta(None)
    assert type(pickle.loads(pickle.dumps(orders))) is type(orders)  # it goes to the workers


def test_hybrid_models_keep_their_own_cache(inert: Any) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1 import supports_hma

    assert supports_hma(inert)


def test_it_says_why_once_and_not_in_every_worker(
    inert: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="kvmem"):
        make(inert, "WORKER")
        make(inert, "SCHEDULER")
    assert [r.getMessage() for r in caplog.records if r.name == "kvmem"] == [f"kvmem: {LINE}"]


def test_vllm_takes_it_for_one_with_the_constructor_of_today(inert: Any) -> None:
    from vllm.utils.func_utils import supports_kw

    assert supports_kw(inert, "kv_cache_config")


def test_a_hook_that_only_another_vllm_asks_for_has_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    from kvmem.engines.vllm import inert

    def new_hook(self: object) -> None: ...

    new_hook.__isabstractmethod__ = True  # type: ignore[attr-defined]
    monkeypatch.setattr(base.KVConnectorBase_V1, "new_hook", new_hook, raising=False)
    abc.update_abstractmethods(base.KVConnectorBase_V1)
    try:
        connector = importlib.reload(inert).InertConnector
        monkeypatch.setattr(interface, "why_off", lambda: LINE)
        assert make(connector, "WORKER").new_hook() is None
    finally:
        monkeypatch.undo()
        abc.update_abstractmethods(base.KVConnectorBase_V1)
        importlib.reload(inert)
