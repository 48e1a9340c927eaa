"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model, with a tokenizer of bytes."""
    from tests import tiny_tokenizers

    path = tmp_path_factory.mktemp("model")
    tiny_tokenizers.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def start(folder: Path) -> Iterator[Any]:
    """Starts an engine and the gateway before it; a `Started` of tests.gateways."""
    from benchmarks._fake_engine import Serving
    from kvmem.agents.gateway.app import Gateway
    from kvmem.agents.gateway.settings import Settings
    from tests.gateways import Started, engine_of

    running: list[Serving] = []
    started: list[Started] = []

    def start(*, engine: Any = None, upstream: str | None = None, **settings: Any) -> Started:
        made = engine or engine_of(folder)
        if upstream is None:
            running.append(Serving(made).__enter__())
            upstream = running[-1].url
        gateway = Gateway(Settings(upstreams=(upstream,), **settings))
        running.append(Serving(gateway, lifespan="on").__enter__())
        started.append(Started(made, gateway, running[-1]))
        return started[-1]

    yield start
    for each in started:
        each.close()
    for one in reversed(running):
        one.__exit__(None, None, None)
