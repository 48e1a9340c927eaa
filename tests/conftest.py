"""What every test shares: markers, fixed seeds, arena names and the check that none is left."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SHM = Path("/dev/shm")

# Seeds are fixed: the same examples every run. HYPOTHESIS_PROFILE=explore looks for new ones.
# No deadline: the machine that runs this may be busy.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# An engine's threads spin while they wait for one another; with its other processes on the same
# few cores they mostly keep each other from work. Nothing is timed here.
for _name, _value in (
    ("KMP_BLOCKTIME", "0"),
    ("GOMP_SPINCOUNT", "0"),
    ("OMP_WAIT_POLICY", "PASSIVE"),
):
    os.environ.setdefault(_name, _value)

_counter = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, so that a plain mistake shows before an engine has started."""
    items.sort(key=lambda item: ("engine" in item.keywords, "slow" in item.keywords))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of the engine runs where there is one; `make test` counts a missing one as failed."""
    if "engine" in item.keywords and importlib.util.find_spec("vllm") is None:
        reason = "vllm is not installed: `make setup` installs it"
        if os.environ.get("KVMEM_REQUIRE_ENGINE"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def new_arena_name() -> Iterator[Callable[[], str]]:
    """Gives arena names that only this test uses, and asserts that it left none of them behind."""
    mine = f"t{os.getpid()}-{next(_counter)}"
    numbers = itertools.count()

    def new_name() -> str:
        return f"{mine}-{next(numbers)}"

    yield new_name
    left = files_left(mine)
    for path in left:  # so that one leak fails one test, and the machine keeps its memory
        path.unlink()
    assert not left, f"this test left {', '.join(map(str, left))}"


@pytest.fixture
def arena_name(new_arena_name: Callable[[], str]) -> str:
    """One arena name that only this test uses; nothing of it may be left in /dev/shm afterwards."""
    return new_arena_name()


def files_left(name_part: str) -> list[Path]:
    """The files of kvmem in /dev/shm whose name holds `name_part`."""
    return sorted(path for path in SHM.glob("kvmem*") if name_part in path.name)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of the real SmolLM2-135M checkpoint; made on the first call, half a minute."""
    from kvmem.demo import model

    return str(model.ensure())
