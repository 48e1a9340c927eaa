"""What a mask compiles to; the real engine holds to it in tests/e2e/test_ledger.py."""

from __future__ import annotations

import json

import pytest

from kvmem.context.mask import HERMES, CallFormat, mask
from kvmem.errors import ConfigError

TOOLS = [
    {"type": "function", "function": {"name": n, "parameters": {"type": "object"}}}
    for n in ("browser_open", "browser_click", "shell_run")
]


def test_a_required_call_begins_as_the_model_writes_calls_and_names_an_allowed_tool() -> None:
    held = mask(TOOLS, allow="browser_*", mode="required")
    assert held.allowed == ("browser_open", "browser_click")
    assert held.prefill == HERMES.begin
    schemas = held.fields["structured_outputs"]["json"]["anyOf"]
    assert [s["properties"]["name"]["const"] for s in schemas] == list(held.allowed)
    one = mask(TOOLS, allow="shell_run", mode="required").fields["structured_outputs"]["json"]
    assert one["properties"]["name"] == {"const": "shell_run"}


def test_auto_leaves_text_free_and_holds_calls() -> None:
    form = CallFormat("[call]", "[/call]")
    held = mask(TOOLS, allow="shell_*", form=form)
    assert held.prefill == ""
    tag = json.loads(held.fields["structured_outputs"]["structural_tag"])
    assert tag["triggers"] == ["[call]"]
    ((begin, end),) = [(s["begin"], s["end"]) for s in tag["structures"]]
    assert (begin, end) == ("[call]", "[/call]")


def test_none_and_nothing_allowed_forbid_the_beginning_of_a_call() -> None:
    for held in (mask(TOOLS, mode="none"), mask(TOOLS, allow="mail_*")):
        assert held.allowed == ()
        assert held.fields == {"bad_words": ["<tool_call>"]}


def test_a_required_call_of_no_tool_is_refused() -> None:
    with pytest.raises(ConfigError, match="Known: browser_open, browser_click, shell_run"):
        mask(TOOLS, allow="mail_*", mode="required")


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="'requried' is no mode"):
        mask([{"function": {"name": "a"}}], mode="requried")  # type: ignore[arg-type]
