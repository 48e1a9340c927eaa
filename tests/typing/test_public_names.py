from __future__ import annotations

import importlib

import pytest

from tests.typing import public_names

MODULES = dict(public_names.public_modules())
LISTING = {name: names for name, tree in MODULES.items() if (names := public_names.listed(tree))}


def test_public_names_are_the_agreed_ones() -> None:
    assert public_names.table() == public_names.GOLDEN.read_text(), (
        "the public names changed: if that is meant, `make golden` writes them anew"
    )


def place(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then the rest: the order that ruff's RUF022 keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("module", LISTING)
def test_all_is_sorted_and_names_each_once(module: str) -> None:
    assert LISTING[module] == sorted(set(LISTING[module]), key=place)


@pytest.mark.parametrize("module", LISTING)
def test_all_names_exist(module: str) -> None:
    if module.startswith("kvmem.engines."):
        pytest.importorskip("vllm", reason="vllm is not installed: `make setup` installs it")
    if module == "kvmem.engines.lmcache_l2":
        pytest.importorskip("lmcache", reason="LMCache is in an environment of its own")
    if module.startswith("kvmem.agents.adapters."):
        framework = module.rpartition(".")[2].replace("openai_agents", "agents")
        pytest.importorskip(framework, reason="it is in an environment of its own")
    loaded = importlib.import_module(module)
    assert [name for name in LISTING[module] if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_module_that_defines_public_names_lists_them(module: str) -> None:
    tree = MODULES[module]
    assert public_names.listed(tree) is not None or not public_names.defined(tree), (
        f"{module} defines {sorted(public_names.defined(tree))} and has no __all__"
    )
