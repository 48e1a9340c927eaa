"""What makes KV of a transformers model valid: the namespace, and whether it still holds.

The weights' digest is over the values of the parameters and buffers as they are in the model, so
that it does not matter which file they came from or what was done to them since.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch
from transformers import PreTrainedModel

from kvmem.engines.transformers.blocks import LayerShape
from kvmem.errors import UnsupportedEngine
from kvmem.types import Namespace

__all__ = ["Weights", "namespace_of"]

HASH_ALGORITHM = "sha256_cbor"
# Says how to read a block's bytes: it changes with them.
LAYOUT = "transformers/1: token, head, dim; of each layer keys, then values"


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class Weights:
    """The model's weights as they were; `changed` tells when they no longer are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._seen = self._look()

    def _look(self) -> list[tuple[str, int, int]]:
        """Each tensor's name, address and version: writes in place count the version up."""
        return [
            # Of tensors made in inference mode torch does not count writes.
            (name, t.data_ptr(), -1 if t.is_inference() else t._version)
            for name, t in _tensors(self._model)
        ]

    def changed(self) -> bool:
        """Whether a tensor was replaced or written to, added or taken away, since."""
        return self._adapted() or self._look() != self._seen

    def _adapted(self) -> bool:
        return bool(getattr(self._model, "_hf_peft_config_loaded", False))

    def digest(self) -> str:
        """64 hex digits of SHA-256 over all names, types, shapes and values.

        Raises:
            UnsupportedEngine: adapters are on it; they are switched without a trace in the weights.
        """
        if self._adapted():
            raise UnsupportedEngine(
                "kvmem's transformers engine does not serve a model with adapters",
                next_step="Merge the adapter into the weights first (merge_and_unload).",
            )
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            parts = list(pool.map(_digest_of, (t for _, t in _tensors(self._model))))
        whole = hashlib.sha256(b"kvmem.transformers.weights\0")
        for (name, _), part in zip(_tensors(self._model), parts, strict=True):
            whole.update(name.encode() + b"\0" + part)
        return whole.hexdigest()


def _digest_of(tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    digest.update(flat.numpy().data)
    return digest.digest()


def namespace_of(
    model: PreTrainedModel,
    shapes: Sequence[LayerShape],
    *,
    block_tokens: int,
    weights: str,
) -> Namespace:
    """The namespace of this model's KV in blocks of that size."""
    config = {
        "config": model.config.to_diff_dict(),
        "class": type(model).__name__,
        "attention": str(getattr(model.config, "_attn_implementation", "")),
        "device": model.device.type,
    }
    for word in ("_name_or_path", "transformers_version", "name_or_path"):
        config["config"].pop(word, None)  # where it came from, not what it is
    text = json.dumps(config, sort_keys=True, default=str)
    return Namespace(
        weights=weights,
        model_config=hashlib.sha256(text.encode()).hexdigest(),
        kv_dtype=",".join(sorted({shape.dtype for shape in shapes})),
        kv_layout=LAYOUT,
        groups=(f"full {block_tokens} {msgspec.json.encode(shapes).decode()}",),
        tensor_parallel=1,
        pipeline_parallel=1,
        hash_algorithm=HASH_ALGORITHM,
        hash_seed="",
    )
