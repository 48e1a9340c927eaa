"""Random LoRA adapters for a llama-like model, as files that vLLM loads; peft is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["config_of", "make_adapter"]

# With keys and values among them an adapter's KV differs from the base model's in every layer.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def config_of(model: str | Path) -> dict[str, Any]:
    """The configuration that lies in a checkpoint's folder, as `make_adapter` wants it."""
    return dict(json.loads((Path(model) / "config.json").read_text(encoding="utf-8")))


def make_adapter(
    folder: Path, *, seed: int, config: Mapping[str, Any], rank: int = 8, scale: float = 1.0
) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors into `folder`, which may exist.

    The same arguments write the same bytes; another seed writes other weights in files of the
    same names and sizes. Returns `folder`.

    Args:
        folder: made when it is missing.
        seed: of the weights.
        config: what a Hugging Face config.json of a llama-like model says.
        rank: of the two factors; the engine's `max_lora_rank` must be as large.
        scale: standard deviation of what the adapter adds to an output of a projection whose
            inputs have one of 1. With 1 the text is another one than the base model's.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (n_in, n_out) in _shapes(config).items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = random.normal(0.0, n_in**-0.5, (rank, n_in))
            up = random.normal(0.0, scale * rank**-0.5, (n_out, rank))
            tensors[f"{at}.lora_A.weight"] = down.astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = up.astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(MODULES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv = head * (config.get("num_key_value_heads") or heads)
    shapes = ((hidden, head * heads), (hidden, kv), (hidden, kv), (head * heads, hidden))
    return dict(zip(MODULES, shapes, strict=True))
