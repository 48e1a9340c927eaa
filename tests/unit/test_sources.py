"""What a package's source declares is found where Python would find it, and nowhere else."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from kvmem.engines.vllm.sources import Sources

FILES = {
    "__init__.py": "from .front import Moved as Here\nfrom engine.deep.inner import call\n",
    "front.py": """
from abc import ABC
from threading import Thread
from engine.deep.inner import Base, overloaded
from engine.gone import Nobody
if True:
    try:
        from other import Later
    except ImportError:
        Later = None
else:
    Otherwise: int = 1

class Moved(Base, ABC):
    field: int = 0
    plain = 1

    def __init__(self, config, *, role, cache=None):
        self.set_here = config
        self.annotated: int = 1
        config.not_ours = 2

    @property
    def shown(self): ...

class Runs(Thread): ...
""",
    "deep/__init__.py": "from ..front import Moved\nfrom .inner import Base\n",
    "deep/inner.py": """
from abc import abstractmethod
from typing import overload

class Base:
    inherited: int

    @abstractmethod
    def asked(self, one, two=2, **more): ...

    @classmethod
    def made(cls, one): ...

    def free(self): ...

@overload
def overloaded(one): ...
@overload
def overloaded(one, two): ...
def overloaded(one, two=None): ...
def call(thing):
    thing.called(1)
    # thing.in_a_comment(1)
""",
}


@pytest.fixture(params=["folder", "wheel"])
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> Sources:
    if request.param == "wheel":
        with zipfile.ZipFile(tmp_path / "engine.whl", "w") as wheel:
            for name, text in FILES.items():
                wheel.writestr(f"engine/{name}", text)
        return Sources(zipfile.Path(tmp_path / "engine.whl") / "engine")
    for name, text in FILES.items():
        path = tmp_path / "engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Sources(tmp_path / "engine")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("engine.front", "Moved"),
        ("engine.front", "Moved.field"),
        ("engine.front", "Moved.plain"),
        ("engine.front", "Moved.shown"),
        ("engine.front", "Moved.set_here"),
        ("engine.front", "Moved.annotated"),
        ("engine.front", "Moved.inherited"),  # from a base of another module
        ("engine.front", "Base.inherited"),  # imported
        ("engine.front", "Later"),  # of another package
        ("engine.front", "Otherwise"),
        ("engine", "Here.field"),  # imported under another name, from the package's own folder
        ("engine.deep", "Moved.inherited"),
        ("engine.deep", "Base"),
    ],
)
def test_what_python_would_find_is_found(sources: Sources, module: str, name: str) -> None:
    assert sources.has(module, name)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("engine.front", "Gone"),
        ("engine.front", "Moved.gone"),
        ("engine.front", "Moved.not_ours"),
        ("engine.front", "Runs.gone"),  # a base of another package proves nothing
        ("engine.front", "Later.gone"),
        ("engine.front", "Nobody"),  # imported from a module that is not there
        ("engine.front", "Moved.field.gone"),
        ("engine", "Moved"),
        ("engine.gone", "Moved"),
    ],
)
def test_what_python_would_not_find_is_not_found(sources: Sources, module: str, name: str) -> None:
    assert not sources.has(module, name)


@pytest.mark.parametrize(
    ("name", "names", "required", "more"),
    [
        ("Moved.__init__", ("config", "role", "cache"), 2, False),
        ("Moved.asked", ("one", "two"), 1, True),
        ("Moved.made", ("one",), 1, False),
        ("Moved.free", (), 0, False),
        ("overloaded", ("one", "two"), 1, False),  # what stands last is what runs
    ],
)
def test_parameters_are_those_a_caller_gives(
    sources: Sources, name: str, names: tuple[str, ...], required: int, more: bool
) -> None:
    taken = sources.parameters("engine.front", name)
    assert taken is not None
    assert (taken.names, taken.required, taken.more) == (names, required, more)


def test_only_functions_have_parameters(sources: Sources) -> None:
    assert sources.parameters("engine.front", "Moved.plain") is None
    assert sources.parameters("engine.front", "Moved.gone") is None


def test_abstract_methods_are_those_of_the_class(sources: Sources) -> None:
    assert sources.abstract("engine.front", "Base") == ["asked"]
    assert sources.abstract("engine.front", "Runs") == []


def test_calls_are_seen_but_not_in_comments(sources: Sources) -> None:
    assert sources.calls("engine.deep", "called")
    assert not sources.calls("engine.deep", "in_a_comment")
    assert not sources.calls("engine.gone", "called")
