"""The namespace tells apart all that makes KV invalid."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from kvmem.engines.vllm import digests, namespace
from kvmem.engines.vllm.namespace import weights_digest
from kvmem.errors import ConfigError
from kvmem.types import Namespace

BASE = Namespace(
    weights="0" * 64,
    model_config="c",
    kv_dtype="bf16",
    kv_layout="LBHNC",
    groups=("full attention, 128 tokens",),
    tensor_parallel=1,
    pipeline_parallel=1,
    hash_algorithm="sha256",
    hash_seed="vllm-none-hash",
)


@pytest.mark.parametrize("name", [f.name for f in msgspec.structs.fields(Namespace)])
def test_every_field_changes_the_digest(name: str) -> None:
    value = getattr(BASE, name)
    other = value + {int: 1, str: "x", tuple: ("x",)}[type(value)]
    assert msgspec.structs.replace(BASE, **{name: other}).digest != BASE.digest
    assert len(BASE.digest) == 32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"weights" * 1000)
    (folder / "b.safetensors").write_bytes(b"more" * 1000)
    (folder / "config.json").write_text("{}")
    return folder


def test_new_content_at_the_same_path_is_another_digest(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    before = weights_digest(model, cache=cache)
    content = (model / "a.safetensors").read_bytes()
    stat = (model / "a.safetensors").stat()
    (model / "a.safetensors").write_bytes(b"W" + content[1:])
    # The same size and mtime: only ctime tells.
    os.utime(model / "a.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_digest(model, cache=cache) != before


def test_the_same_content_at_another_path_is_the_same_digest(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    before = weights_digest(model, cache=cache)
    model.rename(tmp_path / "renamed")
    assert weights_digest(tmp_path / "renamed", cache=cache) == before


def test_swapped_files_are_another_digest(model: Path, tmp_path: Path) -> None:
    before = weights_digest(model, cache=tmp_path / "digests.json")
    (model / "a.safetensors").rename(model / "c.safetensors")
    assert weights_digest(model, cache=tmp_path / "digests.json") != before


def test_unchanged_files_are_not_read_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "digests.json"
    before = weights_digest(model, cache=cache)

    def no_hashing(*_: object) -> None:
        raise AssertionError("a file was hashed again")

    monkeypatch.setattr(digests, "READ_BYTES", None)
    monkeypatch.setattr(namespace, "_write_cache", no_hashing)
    assert weights_digest(model, cache=cache) == before


def test_the_digest_cache_is_private_and_a_broken_one_is_made_anew(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "digests.json"
    before = weights_digest(model, cache=cache)
    assert cache.stat().st_mode & 0o777 == 0o600
    cache.write_bytes(b"{broken")
    assert weights_digest(model, cache=cache) == before
    assert "hashed again" in caplog.text
    assert not list(tmp_path.glob(".weights-*"))


def test_a_folder_without_weights_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights_digest") as error:
        weights_digest(tmp_path, cache=tmp_path / "digests.json")
    assert error.value.setting == "weights_digest"
