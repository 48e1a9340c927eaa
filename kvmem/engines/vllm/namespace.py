"""What makes stored KV valid for this engine: the namespace, from the weights' content.

The digest of the weights is taken over the bytes of the files, since a model's name says nothing
of what is in them. It is cached by path, inode, size, mtime and ctime, so a start hashes only
files that changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvmem.config import Config
from kvmem.engines.vllm.digests import FileDigest, file_digest, whole_digest
from kvmem.engines.vllm.geometry import Geometry
from kvmem.errors import ConfigError
from kvmem.types import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["check_weights", "namespace_of", "weights_digest"]

log = logging.getLogger("kvmem")

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")


def weights_digest(folder: Path, *, cache: Path | None = None) -> str:
    """64 hex digits: SHA-256 over the names and the SHA-256 of every weight file in `folder`.

    Args:
        folder: where the weight files lie; looked at recursively.
        cache: the file that remembers digests; by default below the user's cache folder.

    Raises:
        ConfigError: `folder` holds no weight file.
    """
    files = _weight_files(folder)
    cache = cache if cache is not None else _cache_file()
    known = _read_cache(cache)
    fresh: dict[str, FileDigest] = {}
    with ThreadPoolExecutor(max_workers=min(8, len(files), os.cpu_count() or 1)) as pool:
        entries = pool.map(lambda path: file_digest(path, known), files)
        fresh.update((str(p.resolve()), entry) for p, entry in zip(files, entries, strict=True))
    if any(known.get(path) != entry for path, entry in fresh.items()):
        _write_cache(cache, {**known, **fresh})
    named = ((p.relative_to(folder).as_posix(), fresh[str(p.resolve())]) for p in files)
    return whole_digest(b"kvmem.weights", named).hex()


def check_weights(config: Config, vllm_config: VllmConfig) -> None:
    """Refuses weights that can't be told apart, without reading them.

    Weights that the engine has yet to download are not looked at.

    Raises:
        ConfigError: naming the setting 'weights_digest'.
    """
    if config.weights_digest is None:
        _refuse_dummy(vllm_config)
        folder = Path(vllm_config.model_config.model)
        if folder.is_dir():
            _weight_files(folder)


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    if not files:
        raise ConfigError(
            f"No weight file ({', '.join(WEIGHT_SUFFIXES)}) in {folder}",
            next_step="Check --model, or name the weights with kvmem's setting 'weights_digest'.",
            setting="weights_digest",
        )
    return files


def _refuse_dummy(vllm_config: VllmConfig) -> None:
    if str(vllm_config.load_config.load_format) == "dummy":
        raise ConfigError(
            "The weights of --load-format dummy have no content to be told apart by",
            next_step="Name them with kvmem's setting 'weights_digest' (64 hex digits).",
            setting="weights_digest",
        )


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kvmem" / "weights.json"


def _read_cache(path: Path) -> dict[str, FileDigest]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, FileDigest])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        log.warning("kvmem: %s is not readable (%s); the weights are hashed again", path, error)
        return {}


def _write_cache(path: Path, entries: dict[str, FileDigest]) -> None:
    """Replaces the cache in one step; a machine without a writable cache only hashes again."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".weights-")  # 0600
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(entries))
        Path(name).replace(path)
    except OSError as error:
        log.warning("kvmem: digests of the weights can't be kept in %s: %s", path, error)


def _weights_folder(vllm_config: VllmConfig) -> Path:
    model = vllm_config.model_config
    folder = Path(model.model)
    if folder.is_dir():
        return folder
    if folder.is_file():  # one GGUF file
        return folder.parent
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model.model,
            revision=model.revision,
            cache_dir=vllm_config.load_config.download_dir,
            local_files_only=True,
        )
    )


def _weights(config: Config, vllm_config: VllmConfig) -> str:
    if config.weights_digest is not None:
        return config.weights_digest
    _refuse_dummy(vllm_config)
    try:
        return weights_digest(_weights_folder(vllm_config))
    except (OSError, ValueError) as error:  # ValueError: a name that the hub does not take
        raise ConfigError(
            f"the weight files of {vllm_config.model_config.model!r} can't be read: {error}",
            next_step="Name the weights with kvmem's setting 'weights_digest' (64 hex digits).",
            setting="weights_digest",
        ) from error


def _model_config(vllm_config: VllmConfig) -> str:
    """A digest of what the weights are loaded into: architecture, dtype, quantisation."""
    model = vllm_config.model_config
    hf = model.hf_config.to_dict()
    hf.pop("_name_or_path", None)  # where the model lies says nothing of what it is
    facts: dict[str, Any] = {
        "hf": hf,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "rope": str(getattr(model, "rope_scaling", None)),
        "overrides": str(getattr(model, "hf_overrides", None)),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def namespace_of(
    config: Config,
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    geometry: Geometry,
) -> Namespace:
    """The namespace of this engine.

    Blocks are opaque bytes in the attention kernel's own packing, so the layout names the
    engine's version, the platform and the instruction set the kernels were picked for.

    Raises:
        ConfigError: the weights can't be told apart.
    """
    import vllm
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    layout = ":".join(
        (
            str(getattr(kv_cache_config, "kv_cache_layout", None)),
            f"vllm-{vllm.__version__}",
            str(current_platform.device_name),
            platform.machine(),
            _isa(),
        )
    )
    return Namespace(
        weights=_weights(config, vllm_config),
        model_config=_model_config(vllm_config),
        kv_dtype=str(vllm_config.cache_config.cache_dtype),
        kv_layout=layout,
        groups=tuple(
            f"{group.kv_cache_spec}, layers {ours.layers}, bytes {ours.pages}"
            for group, ours in zip(kv_cache_config.kv_cache_groups, geometry.groups, strict=True)
        ),
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        hash_algorithm=vllm_config.cache_config.prefix_caching_hash_algo,
        hash_seed=os.environ.get("PYTHONHASHSEED", "vllm-none-hash"),
    )


def _isa() -> str:
    """The CPU features by which vLLM's CPU kernels choose how they pack K and V."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line
        ).split()
    except (OSError, StopIteration):
        return "unknown"
    return "+".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags)
