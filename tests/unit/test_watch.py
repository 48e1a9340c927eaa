"""Wrapped functions of the engine: seen once, signature kept, given back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from kvmem.engines.vllm import watch


class Core:
    """Stands for a class of vLLM's."""

    def load(self, path: str, *, level: int = 1) -> tuple[str, int]:
        """The engine's own."""
        return path, level


class Child(Core):
    """Inherits it."""


@pytest.fixture
def calls() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def around(calls: list[tuple[Any, ...]]) -> watch.Around:
    def around(
        self: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        calls.append((self, args, kwargs))
        return call(*args, **kwargs)

    return around


def test_a_call_is_seen_and_answered_by_the_engines_own(
    calls: list[tuple[Any, ...]], around: watch.Around
) -> None:
    assert watch.wrap(Core, "load", around)
    core = Child()
    try:
        assert core.load("a", level=2) == ("a", 2)
        assert calls == [(core, ("a",), {"level": 2})]
        assert list(inspect.signature(core.load).parameters) == ["path", "level"]
        assert core.load.__doc__ == "The engine's own."
    finally:
        watch.unwrap(Core, "load")


def test_it_is_wrapped_once_for_all_and_given_back_by_the_last(
    calls: list[tuple[Any, ...]], around: watch.Around
) -> None:
    original = Core.load
    assert watch.wrap(Core, "load", around)
    assert watch.wrap(Core, "load", around)
    Core().load("a")
    assert len(calls) == 1
    watch.unwrap(Core, "load")
    Core().load("b")
    assert len(calls) == 2
    watch.unwrap(Core, "load")
    assert Core.load is original
    assert not watch._wrapped


def test_what_somebody_else_wrapped_since_stays(
    calls: list[tuple[Any, ...]], around: watch.Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Core, "load", Core.load)  # as it was, after the test
    assert watch.wrap(Core, "load", around)
    ours = Core.load
    Core.load = lambda self, path: ours(self, path + "!")  # type: ignore[method-assign]
    watch.unwrap(Core, "load")
    assert Core().load("a") == ("a!", 1)
    assert len(calls) == 1


@pytest.mark.parametrize(("owner", "name"), [(Core, "unload"), (Child, "load")])
def test_a_method_that_the_class_has_not_is_told(
    owner: type, name: str, around: watch.Around
) -> None:
    assert not watch.wrap(owner, name, around)
    assert not watch._wrapped
