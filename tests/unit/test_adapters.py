"""An adapter is known by its content, and by the content that the workers loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmem.engines.vllm import adapters, digests
from kvmem.engines.vllm.adapters import Adapters, Folders, Held, Loads, held_by
from kvmem.engines.vllm.digests import FileDigest
from kvmem.errors import UnsupportedEngine
from tests.adapters import make_adapter

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def adapter(folder: Path, seed: int) -> Path:
    return make_adapter(folder, seed=seed, config=CONFIG)


def age(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the files count as written long ago."""
    later = time.time_ns() + 10 * adapters.TICK_NS
    monkeypatch.setattr(adapters.time, "time_ns", lambda: later)


def request(path: Path | str, i: int = 1, **options: Any) -> Any:
    return SimpleNamespace(
        lora_name=f"a{i}", lora_int_id=i, lora_path=str(path), load_inplace=False, **options
    )


# -- folders -------------------------------------------------------------------------------------


def test_content_and_names_make_the_digest_and_the_path_does_not(tmp_path: Path) -> None:
    folders = Folders()
    one, same, other = (adapter(tmp_path / n, s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert folders.digest(str(one)) == folders.digest(str(same)) != folders.digest(str(other))
    (same / "adapter_model.safetensors").rename(same / "adapter_model.bin")
    assert folders.digest(str(one)) != folders.digest(str(same))


def test_new_content_of_the_same_size_and_mtime_is_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, folder = Folders(), adapter(tmp_path, 1)
    age(folder, monkeypatch)
    before = folders.digest(str(folder))
    path = folder / "adapter_model.safetensors"
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folders.digest(str(folder)) != before


def test_only_a_stat_is_paid_for_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, folder = Folders(), adapter(tmp_path, 1)
    age(folder, monkeypatch)
    before = folders.digest(str(folder))
    monkeypatch.setattr(digests, "READ_BYTES", None)  # reading raises
    assert folders.digest(str(folder)) == before


def test_what_was_written_just_now_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within a tick of the file system's clock differ in nothing that stat shows."""
    folders, folder = Folders(), adapter(tmp_path, 1)
    before = folders.digest(str(folder))
    adapter(folder, 2)
    monkeypatch.setattr(FileDigest, "is_of", lambda self, stat: True)  # as such a stat would say
    assert folders.digest(str(folder)) not in (None, before)


def test_files_that_change_while_they_are_read_have_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, folder = Folders(), adapter(tmp_path, 1)
    real = adapters.file_digest

    def slow(path: Path, known: Any) -> Any:
        file = real(path, known)
        path.write_bytes(path.read_bytes() + b" ")
        return file

    monkeypatch.setattr(adapters, "file_digest", slow)
    assert folders.digest(str(folder)) is None


def test_what_a_trainer_leaves_does_not_count_and_other_files_do(tmp_path: Path) -> None:
    folders, folder = Folders(), adapter(tmp_path, 1)
    before = folders.digest(str(folder))
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "checkpoint-100").mkdir()
    assert folders.digest(str(folder)) == before
    (folder / "new_embeddings.safetensors").write_bytes(b"x")
    assert folders.digest(str(folder)) != before


@pytest.mark.engine
@pytest.mark.parametrize("path", ["/no/such/folder", "nobody/no-such-adapter", "not a name at all"])
def test_an_adapter_that_is_not_here_has_no_digest(path: str) -> None:
    assert Folders().digest(path) is None


def test_a_folder_without_an_adapter_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert Folders().digest(str(tmp_path)) is None


def test_what_is_read_from_elsewhere_is_not_known_by_its_folder(tmp_path: Path) -> None:
    one = request(adapter(tmp_path, 1), tensorizer_config_dict={"tensorizer_uri": "s3://a/b"})
    assert Adapters(1, "").content(one) != Adapters(1, "").content(one)


# -- a worker's loads ----------------------------------------------------------------------------


class Manager:
    """Stands for vLLM's WorkerLoRAManager: reads the files, keeps what it read by id."""

    def __init__(self, lora_config: object) -> None:
        self.lora_config = lora_config
        self.kept: dict[int, bytes] = {}
        self.while_reading: Callable[[], object] = lambda: None

    def _load_adapter(self, lora_request: Any) -> bytes:
        read = (Path(lora_request.lora_path) / "adapter_model.safetensors").read_bytes()
        self.while_reading()
        return read

    def add_adapter(self, lora_request: Any) -> None:
        self.kept[lora_request.lora_int_id] = self._load_adapter(lora_request)

    def list_adapters(self) -> set[int]:
        return set(self.kept)


@pytest.fixture
def engine_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    import sys

    module = SimpleNamespace(WorkerLoRAManager=Manager)
    monkeypatch.setitem(sys.modules, "vllm.lora.worker_manager", module)
    return SimpleNamespace(lora_config=object(), parallel_config=SimpleNamespace(rank=0))


@pytest.fixture
def loads(engine_config: Any) -> Iterator[Loads]:
    loads = Loads(engine_config)
    yield loads
    loads.close()


@pytest.fixture
def manager(engine_config: Any, loads: Loads) -> Manager:
    return Manager(engine_config.lora_config)


def contents(loads: Loads) -> dict[int, bytes]:
    news = loads.news()
    assert news is not None
    return news.contents


def test_a_worker_tells_what_it_loaded_once(manager: Manager, loads: Loads, tmp_path: Path) -> None:
    assert loads.news() is None
    manager.add_adapter(request(adapter(tmp_path / "a", 1), 1))
    manager.add_adapter(request(adapter(tmp_path / "b", 1), 2))
    manager.add_adapter(request(adapter(tmp_path / "c", 2), 3))
    held = contents(loads)
    assert held[1] == held[2] != held[3]
    assert loads.news() is None
    del manager.kept[3]
    assert set(contents(loads)) == {1, 2}


def test_what_was_loaded_stays_when_the_files_change_until_it_is_loaded_again(
    manager: Manager, loads: Loads, tmp_path: Path
) -> None:
    one = request(adapter(tmp_path, 1))
    manager.add_adapter(one)
    before = contents(loads)[1]
    adapter(tmp_path, 2)
    assert loads.news() is None
    manager.add_adapter(one)
    assert contents(loads)[1] != before
    adapter(tmp_path, 1)
    manager.add_adapter(one)
    assert contents(loads)[1] == before


def test_files_that_change_while_an_adapter_is_loaded_make_content_of_its_own(
    manager: Manager, loads: Loads, tmp_path: Path
) -> None:
    one = request(adapter(tmp_path, 1))
    manager.add_adapter(one)
    first = contents(loads)[1]
    manager.while_reading = lambda: adapter(tmp_path, 2)
    manager.add_adapter(one)
    between = contents(loads)[1]
    manager.while_reading = lambda: None
    manager.add_adapter(one)
    assert len({first, between, contents(loads)[1]}) == 3


def test_how_the_files_are_to_be_read_counts(
    manager: Manager, loads: Loads, tmp_path: Path
) -> None:
    folder = adapter(tmp_path, 1)
    manager.add_adapter(request(folder, 1))
    manager.add_adapter(request(folder, 2, is_3d_lora_weight=True))
    held = contents(loads)
    assert held[1] != held[2]


def test_another_engines_adapters_are_its_own(
    manager: Manager, loads: Loads, engine_config: Any, tmp_path: Path
) -> None:
    other = Manager(object())
    other.add_adapter(request(adapter(tmp_path, 1)))
    assert loads.news() is None
    worker = SimpleNamespace(rank=3, model_runner=SimpleNamespace(lora_manager=other))
    held = held_by(worker)
    assert held is not None
    assert (held.worker, held.version, set(held.contents)) == (3, 1, {1})
    assert held_by(SimpleNamespace(rank=0, model_runner=SimpleNamespace())) is None


def test_an_adapter_that_nobody_saw_loaded_is_like_no_other(manager: Manager, loads: Loads) -> None:
    manager.kept = {1: b"", 2: b""}
    adapters._held(manager, 0)
    first = contents(loads)
    assert first[1] != first[2]
    assert loads.news() is None  # and stays what it is


def test_the_watch_ends_with_the_engine(engine_config: Any) -> None:
    original = Manager._load_adapter
    loads = Loads(engine_config)
    assert Manager._load_adapter is not original
    loads.close()
    loads.close()
    assert Manager._load_adapter is original


def test_a_vllm_that_loads_in_another_way_is_refused(
    engine_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Manager, "_load_adapter")
    with pytest.raises(UnsupportedEngine, match="--enable-lora"):
        Loads(engine_config)


# -- what the scheduler believes -----------------------------------------------------------------


def word(version: int, worker: int = 0, **contents: bytes) -> Held:
    return Held(worker, version, {int(i[1:]): content for i, content in contents.items()})


def test_before_a_load_the_files_tell_and_after_it_the_worker(
    manager: Manager, loads: Loads, tmp_path: Path
) -> None:
    believed = Adapters(1, "")
    one = request(adapter(tmp_path, 1))
    assert believed.now(one) is None
    expected = believed.content(one)
    manager.add_adapter(one)
    news = loads.news()
    assert news is not None
    assert not believed.told([news])
    assert believed.now(one) == believed.content(one) == expected
    adapter(tmp_path, 2)
    assert believed.content(one) == expected  # the engine serves what it loaded
    assert Adapters(1, "").content(one) != expected  # an engine that starts now does not


def test_a_load_of_other_content_than_was_said_is_told(
    manager: Manager, loads: Loads, tmp_path: Path
) -> None:
    believed = Adapters(1, "")
    one = request(adapter(tmp_path, 1))
    expected = believed.content(one)
    adapter(tmp_path, 2)  # after the request was looked up, before its first step
    manager.add_adapter(one)
    news = loads.news()
    assert news is not None
    assert believed.told([news])
    assert believed.content(one) not in (None, expected)


def test_an_adapter_that_was_dropped_and_loaded_with_other_content_is_told() -> None:
    believed, one = Adapters(1, ""), request("/no/such/folder")
    assert not believed.told([word(1, i1=b"old")])
    old = believed.content(one)
    assert not believed.told([word(2)])
    assert believed.now(one) is None
    assert believed.told([word(3, i1=b"new")])
    assert believed.content(one) != old


def test_a_reload_on_purpose_is_no_surprise_and_new_content_all_the_same() -> None:
    believed, one = Adapters(1, ""), request("/no/such/folder")
    believed.told([word(1, i1=b"old", i2=b"other")])
    old = believed.content(one)
    assert not believed.told([word(2, i1=b"new", i2=b"other")], reloaded=1)
    assert believed.content(one) != old
    assert believed.told([word(3, i1=b"new", i2=b"changed too")], reloaded=1)


def test_an_old_word_does_not_undo_a_newer_one() -> None:
    believed, one = Adapters(1, ""), request("/no/such/folder")
    believed.told([word(5, i1=b"new")])
    new = believed.content(one)
    assert not believed.told([word(4, i1=b"old")])
    assert believed.content(one) == new


def test_a_request_that_reloads_in_place_is_of_what_lies_there_now(tmp_path: Path) -> None:
    believed = Adapters(1, "")
    one = request(adapter(tmp_path, 1))
    first = believed.content(one)
    believed.told([word(1, i1=b"held")])
    one.load_inplace = True
    assert believed.content(one) == first
    adapter(tmp_path, 2)
    assert believed.content(one) != first


def test_content_that_is_not_known_is_shared_with_nobody() -> None:
    believed, one = Adapters(1, ""), request("nobody/adapter", 1)
    unknown = believed.content(one)
    assert unknown == believed.content(one)  # one request, asked twice
    assert unknown != believed.content(request("nobody/adapter", 2))
    assert unknown != Adapters(1, "").content(one)
    assert not believed.told([word(1, i1=b"downloaded by now")])
    assert believed.content(one) != unknown
    assert not believed.told([word(2)])
    assert believed.content(one) != unknown  # another load may bring other content


def test_all_workers_must_hold_it_and_the_same() -> None:
    believed, one = Adapters(2, ""), request("/no/such/folder")
    believed.told([word(1, 0, i1=b"a")])
    assert believed.now(one) is None
    believed.told([word(1, 1)])
    assert believed.now(one) is None
    believed.told([word(2, 1, i1=b"a")])
    same = believed.now(one)
    alone = Adapters(1, "")
    alone.told([word(1, 0, i1=b"a")])
    assert same == alone.now(one) is not None
    assert believed.told([word(3, 1, i1=b"b")])
    assert believed.now(one) not in (None, same)


def test_what_else_kv_depends_on_makes_other_content(tmp_path: Path) -> None:
    one = request(adapter(tmp_path, 1))
    contents = {Adapters(1, facts).content(one) for facts in ("bfloat16", "float16")}
    assert len(contents) == 2


def test_when_the_workers_cannot_be_asked_nothing_is_known_until_they_speak(tmp_path: Path) -> None:
    believed = Adapters(1, "")
    one = request(adapter(tmp_path, 1))
    said = believed.content(one)
    believed.told([word(1, i1=b"held")])
    held = believed.content(one)
    believed.lose()
    assert believed.now(one) is None
    assert believed.content(one) not in (said, held)
    believed.told([word(2, i1=b"held")])
    assert believed.content(one) == held
