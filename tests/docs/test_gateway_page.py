"""docs/gateway.md has every reason that the gateway gives, and no other; its limits are options."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from kvmem import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gateway.md").read_text()


def reasons() -> set[str]:
    """As the sources write them."""
    written = "".join(p.read_text() for p in (ROOT / "kvmem/agents/gateway").glob("*.py"))
    found = set(re.findall(r'reason="(\w+)"', written))
    for right in re.findall(r"receipt\.miss(?:, [\w.]+)* = (.+)", written):
        found |= set(re.findall(r'"(\w+)"', right))
    return found | {"none"}


def test_every_reason_is_on_the_page() -> None:
    table = PAGE.partition("## What usage says")[2].partition("## Limits")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == reasons()
    assert len(reasons()) > 10


def test_every_option_on_the_page_is_one() -> None:
    options = {"--" + n.replace("_", "-") for n in inspect.signature(cli.gateway).parameters}
    engines = {"--enable-prompt-tokens-details", "--enable-auto-tool-choice"}
    assert set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) - engines - options == set()
