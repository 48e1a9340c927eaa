"""Small random models of transformers, made in a moment, and what they answer without kvmem."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def llama(seed: int = 0, *, device: str = "cpu", **changes: Any) -> Any:
    """A Llama of two layers, grouped heads, 97 tokens of vocabulary, in float32."""
    settings: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**settings, **changes})
    return transformers.LlamaForCausalLM(config).eval().to(device)


def mistral_with_a_window() -> Any:
    """One that keeps a window of its KV only."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=32,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    """Token ids from 1 on, the same for a seed."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (n_tokens,), generator=draw).tolist()


def plain(model: Any, ids: list[int], n_new: int) -> list[int]:
    """Greedy answer of `n_new` tokens, prompt included, by transformers alone."""
    tokens = torch.tensor([ids], device=model.device)
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_new, do_sample=False
    )
    return out[0].tolist()
