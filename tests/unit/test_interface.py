"""What kvmem needs of vLLM is all in its table, and whatever of it is gone is seen."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmem.engines.vllm import interface
from kvmem.engines.vllm.interface import BASE, NEEDS, OPTIONAL, Need
from kvmem.engines.vllm.sources import Sources
from kvmem.errors import ConfigError, UnsupportedEngine

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "kvmem" / "engines" / "vllm"


@pytest.fixture(scope="module")
def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def copied(installed: Path, tmp_path: Path) -> Path:
    """The installed vLLM's Python files, as far as the table goes, to break."""
    to = tmp_path / "tree" / "vllm"
    for folder in sorted({need.module.split(".")[1] for need in (*NEEDS, *OPTIONAL)}):
        for file in (installed / folder).rglob("*.py"):
            place = to / file.relative_to(installed)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    return to


def file_of(package: Path, module: str) -> Path:
    return package.joinpath(*f"{module}.py".split(".")[1:-1]).with_suffix(".py")


def change(package: Path, module: str, before: str, after: str) -> None:
    path = file_of(package, module)
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_the_installed_engine_has_all(installed: Path) -> None:
    assert interface.missing_in(Sources(installed), NEEDS) == []
    assert interface.why_off() is None
    interface.check()


OUTPUT = "vllm.v1.core.sched.output"


CONNECTOR = "KVConnectorBase_V1"


@pytest.mark.parametrize(
    ("module", "before", "after", "told"),
    [
        (
            OUTPUT,
            "kv_connector_block_state:",
            "block_state:",
            f"SchedulerOutput.kv_connector_block_state in {OUTPUT}",
        ),
        (
            "vllm.v1.request",
            "self.block_hashes",
            "self.hashes",
            "Request.block_hashes in vllm.v1.request",
        ),
        (
            BASE,
            "block_ids: list[int],\n    ) -> tuple",
            "block_ids: list[int],\n        reason: str) -> tuple",
            (
                f"{CONNECTOR}.request_finished(request, block_ids), "
                "which there takes (request, block_ids, reason)"
            ),
        ),
        (
            BASE,
            "def get_block_ids_with_load_errors(",
            "def get_failed_blocks(",
            f"{CONNECTOR}.get_block_ids_with_load_errors in {BASE}",
        ),
        (
            BASE,
            "    @property\n    def role(self)",
            "    @abstractmethod\n    def new_hook(self): ...\n    @property\n    def role(self)",
            f"an answer of kvmem's to {CONNECTOR}.new_hook()",
        ),
        (
            BASE,
            'kv_cache_config: "KVCacheConfig",\n    ):',
            'kv_cache_config: "KVCacheConfig",\n        more):',
            (
                f"{CONNECTOR}.__init__(vllm_config, role, kv_cache_config), which there takes "
                "(vllm_config, role, kv_cache_config, more)"
            ),
        ),
        (
            OUTPUT,
            "def get_block_ids(self, req_id: str)",
            "def get_block_ids(self, req_id, group)",
            "KVConnectorBlockState.get_block_ids(req_id), which there takes (req_id, group)",
        ),
        (
            "vllm.v1.core.sched.scheduler",
            ".update_connector_output(",
            ".take_connector_output(",
            "a call of update_connector_output() in vllm.v1.core.sched",
        ),
    ],
)
def test_a_change_that_would_break_kvmem_is_told(
    copied: Path, module: str, before: str, after: str, told: str
) -> None:
    change(copied, module, before, after)
    assert interface.missing_in(Sources(copied), NEEDS) == [told]


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        (OUTPUT, "def get_block_ids(self, req_id: str)", "def get_block_ids(self, req, group=0)"),
        (OUTPUT, "def get_block_ids(", "block_ids: dict\n    def block_ids_of("),  # as 0.29 has it
        (BASE, 'attn_metadata: "AttentionMetadata",', "attn_metadata, stream=None,"),
        (
            BASE,
            "    @property\n    def role",
            "    def new(self): ...\n    @property\n    def role",
        ),
    ],
)
def test_a_change_that_kvmem_can_live_with_is_none(
    copied: Path, module: str, before: str, after: str
) -> None:
    change(copied, module, before, after)
    assert interface.missing_in(Sources(copied), NEEDS) == []


def test_a_class_that_moved_but_can_be_imported_is_found(copied: Path) -> None:
    file = file_of(copied, "vllm.v1.request")
    file.rename(file.with_name("moved.py"))
    assert len(interface.missing_in(Sources(copied), NEEDS)) == len(
        [need for need in NEEDS if need.module == "vllm.v1.request"]
    )
    file.write_text("from vllm.v1.moved import Request\n")
    assert interface.missing_in(Sources(copied), NEEDS) == []


@pytest.mark.parametrize("need", OPTIONAL, ids=lambda need: need.name)
def test_what_kvmem_can_do_without_costs_one_sentence(copied: Path, need: Need) -> None:
    assert need.without not in interface.lost_in(Sources(copied))
    member = need.name.rpartition(".")[2]
    if need.kind == "called":
        for file in copied.joinpath(*need.module.split(".")[1:]).rglob("*.py"):
            file.write_text(file.read_text().replace(f".{member}(", ".gone("))
    else:
        change(copied, need.module, member, "gone")
    assert interface.lost_in(Sources(copied)) == [need.without]
    assert interface.missing_in(Sources(copied), NEEDS) == []


# -- the table is kvmem's own code's --------------------------------------------------------------


def parsed(file: str) -> ast.Module:
    return ast.parse((ROOM / file).read_text(encoding="utf-8"))


def test_every_hook_that_kvmem_overrides_is_in_the_table_as_it_takes_it(installed: Path) -> None:
    ours = Sources(ROOT / "kvmem")
    theirs = Sources(installed)
    table = {n.name: n.parameters for n in (*NEEDS, *OPTIONAL) if n.kind == "hook"}
    (connector,) = [
        node
        for node in parsed("connector.py").body
        if isinstance(node, ast.ClassDef) and node.name == "KvmemConnector"
    ]
    seen = 0
    for method in connector.body:
        name = f"KVConnectorBase_V1.{getattr(method, 'name', '')}"
        if not isinstance(method, ast.FunctionDef) or not theirs.has(BASE, name):
            continue
        if any("property" in ast.unparse(mark) for mark in method.decorator_list):
            continue
        taken = ours.parameters("kvmem.engines.vllm.connector", f"KvmemConnector.{method.name}")
        assert taken is not None
        assert table[name] == (*taken.names, *(["**kwargs"] if taken.more else []))
        seen += 1
    assert seen > 15


# What kvmem's code calls a thing, and what that is in vLLM. An attribute that is got by getattr
# with a default is one that kvmem can do without.
VARIABLES = {
    "request": "Request",
    "output": "SchedulerOutput",
    "scheduler_output": "SchedulerOutput",
    "connector_output": "KVConnectorOutput",
    "kv_cache_config": "KVCacheConfig",
    "vllm_config": "VllmConfig",
    "transfer": "KVTransferConfig",
    "parallel": "ParallelConfig",
    "cache_config": "CacheConfig",
    "load_config": "LoadConfig",
    "model_config": "ModelConfig",
    "current_platform": "Platform",
    "KVConnectorRole": "KVConnectorRole",
}


def reads() -> Iterator[tuple[str, str]]:
    """(class of vLLM's, attribute) for all that the connector's code reads."""
    for file in ("connector", "scheduler", "worker", "support", "namespace", "receipt"):
        for node in ast.walk(parsed(f"{file}.py")):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).rpartition(".")[2]
                if owner in VARIABLES and node.attr != owner:
                    yield VARIABLES[owner], node.attr


def test_everything_that_kvmem_reads_is_in_the_table() -> None:
    table = {need.name for need in NEEDS}
    read = {f"{owner}.{name}" for owner, name in reads()}
    assert len(read) > 20
    assert read - table == set()


# -- the answers ----------------------------------------------------------------------------------


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One need that no vLLM meets, until the test is over."""
    impossible = Need("name", OUTPUT, "SchedulerOutput.gone")
    monkeypatch.setattr(interface, "NEEDS", (*NEEDS, impossible))
    interface._lacks_here.cache_clear()
    yield
    interface._lacks_here.cache_clear()


def test_the_line_names_what_is_missing_and_what_works(lacking: None) -> None:
    line = interface.why_off()
    assert line is not None
    assert "\n" not in line
    assert f"vLLM {interface.installed_version()} lacks SchedulerOutput.gone in {OUTPUT}" in line
    assert line.endswith(f"runs without kvmem, which is known to work with {interface.KNOWN}.")


def test_what_needs_kvmem_is_refused(lacking: None) -> None:
    with pytest.raises(UnsupportedEngine, match=r"SchedulerOutput\.gone.*Install vLLM"):
        interface.check()


def test_many_missing_things_stay_one_line(monkeypatch: pytest.MonkeyPatch, lacking: None) -> None:
    more = tuple(Need("name", OUTPUT, f"Gone{i}") for i in range(9))
    monkeypatch.setattr(interface, "NEEDS", (*NEEDS, *more))
    line = interface.why_off()
    assert line is not None
    assert "Gone2" in line
    assert "Gone3" not in line
    assert "and 6 more" in line


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmem.engines.vllm.interface", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_source_tree_or_a_wheel_can_be_asked(copied: Path, tmp_path: Path) -> None:
    told = ask(str(copied.parent))
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith(f"0 missing of {len(NEEDS)} things that kvmem needs\n")
    change(copied, "vllm.v1.request", "self.block_hashes", "self.hashes")
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        for file in copied.rglob("*.py"):
            wheel.write(file, file.relative_to(copied.parent))
    told = ask(str(tmp_path / "vllm.whl"))
    assert told.returncode == 1
    assert "missing: Request.block_hashes in vllm.v1.request\n" in told.stdout


def test_a_folder_without_vllm_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no vLLM in"):
        interface._opened(tmp_path)


# -- an environment without vLLM ------------------------------------------------------------------


def find(monkeypatch: pytest.MonkeyPatch, origin: str | None, exists: bool = True) -> None:
    spec = importlib.util.spec_from_loader("vllm", loader=None, origin=origin) if exists else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    interface._lacks_here.cache_clear()


@pytest.mark.parametrize("exists", [True, False], ids=["folder of that name", "nothing"])
def test_no_vllm_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    find(monkeypatch, None, exists)
    for ask_for in (interface.why_off, interface.check, interface.installed_version):
        with pytest.raises(UnsupportedEngine, match=r"no vLLM in this.*Install vLLM 0\.29"):
            ask_for()


def test_a_vllm_that_was_never_packaged_is_judged_all_the_same(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = importlib.metadata.PackageNotFoundError

    def version(name: str) -> str:
        raise gone(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    find(monkeypatch, str(installed / "__init__.py"))
    assert interface.why_off() is None
    find(monkeypatch, str(tmp_path / "__init__.py"))
    line = interface.why_off()
    interface._lacks_here.cache_clear()
    assert line is not None
    assert line.startswith("off: vLLM of an unknown version lacks ")
