"""What a request may ask, and what it is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvmem.config import Config
from kvmem.engines.vllm.receipt import Receipt, Wishes


@pytest.mark.parametrize(
    ("params", "load", "store"),
    [
        (None, True, True),
        ({}, True, True),
        ({"other": 1}, True, True),
        ({"kvmem": None}, True, True),
        ({"kvmem": {"load": False}}, False, True),
        ({"kvmem": {"store": False}}, True, False),
    ],
)
def test_wishes_default_to_on(params: dict | None, load: bool, store: bool) -> None:
    wishes = Wishes.read(params, Config())
    assert (wishes.load, wishes.store, wishes.error) == (load, store, None)


def test_the_configuration_wins_over_a_wish() -> None:
    wishes = Wishes.read({"kvmem": {"load": True, "store": True}}, Config(load=False, store=False))
    assert (wishes.load, wishes.store) == (False, False)


@pytest.mark.parametrize(
    ("config", "wish", "load_off", "store_off"),
    [
        (Config(), {}, None, None),
        (Config(), {"load": False}, "request", None),
        (Config(store=False), {"load": False}, "request", "setting"),
        (Config(load=False), {"load": False, "store": False}, "setting", "request"),
    ],
)
def test_who_forbids_is_told(
    config: Config, wish: dict[str, bool], load_off: str | None, store_off: str | None
) -> None:
    wishes = Wishes.read({"kvmem": wish}, config)
    assert (wishes.load_off, wishes.store_off) == (load_off, store_off)


@pytest.mark.parametrize("wish", [{"laod": False}, {"load": "no"}, "off", [1]])
def test_a_malformed_wish_is_told_and_changes_nothing(wish: object) -> None:
    wishes = Wishes.read({"kvmem": wish}, Config())
    assert (wishes.load, wishes.store) == (True, True)
    assert "not understood" in str(wishes.error)


def request(prompt: int = 100, output: int = 0) -> SimpleNamespace:
    return SimpleNamespace(num_prompt_tokens=prompt, num_output_tokens=output)


def test_tokens_are_split_by_where_they_came_from() -> None:
    receipt = Receipt()
    receipt.matched(request(), 16, 64, "evicted")
    told = receipt.finish(request(), 16)
    assert told["tokens"] == {
        "prompt": 100,
        "device": 16,
        "host": 48,
        "disk": 0,
        "far": 0,
        "computed": 36,
    }
    assert (told["miss"], told["first_missing_block"]) == ("evicted", 4)


def test_a_host_tier_behind_the_device_is_no_negative_hit() -> None:
    receipt = Receipt()
    receipt.matched(request(), 64, 64, "evicted")
    assert receipt.finish(request(), 16)["tokens"]["host"] == 0


def test_a_preempted_request_keeps_its_first_account() -> None:
    receipt = Receipt()
    receipt.matched(request(), 0, 64, "new")
    receipt.matched(request(output=3), 96, 96, "none")
    assert receipt.finish(request(output=3), 16)["tokens"]["host"] == 64


def test_a_request_preempted_before_its_first_token_keeps_its_first_account() -> None:
    receipt = Receipt()
    receipt.matched(request(), 0, 16, "new")
    resumed = SimpleNamespace(num_prompt_tokens=100, num_output_tokens=0, num_preemptions=1)
    receipt.matched(resumed, 0, 96, "none")
    assert receipt.finish(resumed, 16)["tokens"]["host"] == 16


def test_off_is_told_only_where_something_was() -> None:
    receipt = Receipt()
    receipt.matched(request(), 0, 64, "new")
    assert "off" not in receipt.finish(request(), 16)
    receipt = Receipt(store_off="setting")
    receipt.matched(request(), 0, 0, "load_off", "switch")
    told = receipt.finish(request(), 16)
    assert (told["miss"], told["off"]) == ("load_off", {"load": "switch", "store": "setting"})
