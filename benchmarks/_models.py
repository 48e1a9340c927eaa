"""Tiny models with random weights, one for each way in which vLLM keeps KV.

    folder = make("gemma3", Path("/tmp/gemma3"))          # a checkpoint of a few MB
    adapter(folder, Path("/tmp/gemma3-a"), seed=1)        # a LoRA adapter for it

Shapes are transformers' own, so vLLM loads them as it loads real ones. Weights are random, the same
at every call, and large enough that every token of a prompt (of a window, where there is one) shows
in the answer: with the usual 0.02 a wrong block would not. The tokenizer knows bytes and fills up
to the vocabulary, for what needs one (grammars, servers).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIGS", "VOCABULARY", "WINDOW", "adapter", "make", "prompt"]

VOCABULARY = 512
WINDOW = 64  # tokens, of the models that have one
_FIRST_BYTE = 2  # 0 pads, 1 ends
_SEED = 20_261_126
_GAIN = 2.0  # of what queries and keys are made by: attention picks a few tokens of many
_RANK = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_ALTERNATING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_MLA = {
    "kv_lora_rank": 512,  # with the 64 below all that vLLM's CPU kernel takes
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "head_dim": 64,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
}

# (configuration class of transformers, what differs from _COMMON)
CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,  # vLLM knows it no other way
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 6,
            "layer_types": _ALTERNATING,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [],
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "conv_dim": 64,
            "block_dim": 64,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {"head_dim": 32, "num_heads": 4, "state_size": 16, "n_groups": 1, "chunk_size": 256},
    ),
    "jamba": (
        "JambaConfig",
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "num_experts": 2,
            "expert_layer_period": 4,
            "expert_layer_offset": 3,
            "mamba_dt_rank": 8,
        },
    ),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 256,
            "position_embedding_type": "rope",
        },
    ),
    "deepseek_v2": ("DeepseekV2Config", _MLA),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_MLA,
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_hidden_layers": 4,
            "attention_chunk_size": WINDOW,
            "moe_layers": [],
            "interleave_moe_layer_step": 0,
            "intermediate_size_mlp": 128,
            "attn_temperature_tuning": False,
        },
    ),
}


def prompt(n_tokens: int, seed: int) -> list[int]:
    """`n_tokens` ids of the vocabulary that no other seed shares a first block with."""
    state, tokens = (seed + 1) * 2_654_435_761 % 2**31, []
    for _ in range(n_tokens):
        state = (1_103_515_245 * state + 12_345) % 2**31
        tokens.append(_FIRST_BYTE + (state >> 12) % (VOCABULARY - _FIRST_BYTE))
    return tokens


def make(name: str, folder: Path, *, seed: int = _SEED) -> Path:
    """`folder` with the checkpoint of `name`, one of CONFIGS, and a tokenizer; float32, a few MB.

    Another `seed` gives other weights of the same shape. Cost: the import of transformers and its
    model, then a part of a second.
    """
    import torch
    import transformers

    kind, changes = CONFIGS[name]
    config = getattr(transformers, kind)(**{**_COMMON, **changes})
    config.dtype = torch.float32
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            _fill(path, parameter)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _fill(path: str, parameter: torch.Tensor) -> None:
    """Random values of a size that lets what comes in through, whatever came in."""
    *_, layer, name = path.split(".")
    if name == "A_log":  # a state that forgets over tens of tokens, not at the next one
        parameter.uniform_(math.log(0.005), math.log(0.05))
    elif layer in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
        parameter.fill_(_GAIN)
    elif name in ("D", "dt_bias") or (parameter.dim() == 1 and "norm" in layer):
        return  # as transformers made it
    elif parameter.dim() == 1:
        parameter.normal_(0.0, 0.1)
    elif "embed" in layer:
        parameter.normal_(0.0, 1.0)
    else:
        # A linear layer is [out, in], a convolution [channels, 1, kernel], experts [n, .., ..].
        fan_in = parameter.shape[-1] if parameter.dim() < 3 else min(parameter.shape[1:])
        if name == "weight" and "conv" in layer:
            fan_in = parameter.shape[-1]
        gain = _GAIN if layer in ("q_proj", "k_proj", "q_b_proj", "lm_head") else 1.0
        parameter.normal_(0.0, gain / math.sqrt(fan_in))


def _write_tokenizer(folder: Path) -> None:
    """A token for each byte; what is left of the vocabulary stands for nothing."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<{i}>" for i in range(len(words), VOCABULARY)]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


def adapter(model: Path, folder: Path, *, seed: int) -> Path:
    """`folder` with a LoRA adapter for the llama-like `model` that changes what it answers."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, head = config["hidden_size"], config["head_dim"]
    widths = {
        "q_proj": config["num_attention_heads"] * head,
        "k_proj": config["num_key_value_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(_RANK, hidden, generator=draw) / math.sqrt(hidden)
            tensors[f"{path}.lora_A.weight"] = down
            up = torch.randn(width, _RANK, generator=draw) / math.sqrt(_RANK)
            tensors[f"{path}.lora_B.weight"] = up
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": list(widths),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder
