"""The engine matrix's setups, and what each model is there for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._matrix import Setup, Verdict

__all__ = ["MODELS", "SETUPS", "SHORT", "Model"]


class Model(msgspec.Struct, frozen=True):
    """How a model keeps KV, what its cells come to with vLLM's CPU build, and what is told of why.

    `limit`: what that build needs to run it at all. `unless`: a CPU that has this is served.
    """

    keeps: str
    verdict: Verdict = "right"
    why: str = ""
    limit: str = ""
    unless: str = ""

    def here(self) -> Verdict:
        """The verdict on this machine."""
        return "right" if self.unless and self.unless in _cpu_features() else self.verdict


def _cpu_features() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split() for line in lines if line.startswith("flags")), [])


_BF16 = "bfloat16"
_SHORT_STEPS = "steps of at most one block, or a prefill raises IndexError"
_AMX = "amx_tile"
_NO_MLA = ("refused", "MLA with prefix caching off", "", _AMX)

MODELS: dict[str, Model] = {
    "llama": Model("full attention"),
    "qwen3_moe": Model("full attention, experts"),
    "mistral": Model("sliding windows only"),
    "gemma2": Model("sliding windows and full attention, soft caps"),
    "gemma3": Model("sliding windows and full attention, two layers to one"),
    "gpt_oss": Model("sliding windows and full attention with sinks, experts"),
    "llama4": Model("attention within chunks and full attention"),
    "llama4 kept in full": Model("the same, without a hybrid manager"),
    "deepseek_v2": Model("MLA", *_NO_MLA),
    "deepseek_v3": Model("MLA, experts", *_NO_MLA),
    "qwen3_next": Model("gated delta nets and full attention, experts", limit=_BF16),
    "lfm2": Model("short convolutions and full attention"),
    "mamba2": Model("state spaces only", limit=_SHORT_STEPS),
    "granite_hybrid": Model("state spaces of Mamba 2 and full attention", limit=_SHORT_STEPS),
    "jamba": Model("state spaces of Mamba 1 and full attention", "not run", "selective_scan_fwd"),
}

_CORES = sorted(os.sched_getaffinity(0))
_TWO = {"VLLM_CPU_OMP_THREADS_BIND": f"{_CORES[0]}|{_CORES[-1]}"}

_LOOKUP = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
_NGRAM: dict[str, Any] = {"speculative_config": _LOOKUP}
_TP: dict[str, Any] = {"tensor_parallel_size": 2}
_PP: dict[str, Any] = {"pipeline_parallel_size": 2}
_SMALL: dict[str, Any] = {"num_gpu_blocks_override": 28, "max_model_len": 512}
_BASIC = ("hit", "reply", "shared", "many")


def _of_model(name: str) -> Setup:
    options: dict[str, Any] = {}
    if name in ("qwen3_next", "lfm2", "mamba2", "granite_hybrid", "jamba"):
        # The engine picks the block size of such models, and steps must reach over one.
        options = {"block_size": None, "max_num_batched_tokens": 1024, "max_model_len": 2048}
    if name == "qwen3_next":
        # vLLM's CPU kernel takes no other type; its blocks are long.
        options |= {"dtype": "bfloat16", "max_model_len": 4096}
    if name.startswith("deepseek") and _AMX in _cpu_features():
        options |= {"dtype": "bfloat16"}  # vLLM's kernel for it takes no float32
    if name == "llama4 kept in full":
        options |= {"disable_hybrid_kv_cache_manager": True}
    if name in ("mamba2", "granite_hybrid"):
        # vLLM's CPU kernel gives one state a request and step, its caller wants one a block.
        options |= {"max_num_batched_tokens": 128}
    if name == "mamba2":
        options |= {"block_size": 128}
    return Setup(
        name=name,
        model=name.partition(" ")[0],
        cells=_BASIC,
        options=options,
    )


SETUPS: tuple[Setup, ...] = (
    Setup(
        "llama",
        "llama",
        (
            *_BASIC, "salt", "load_off", "structured", "parallel", "prompt_logprobs", "seeded",
            "abort", "reset_device", "reset_all",
        ),
        {"max_num_batched_tokens": 1024, "skip_tokenizer_init": False},
    ),
    Setup("llama chunked", "llama", (*_BASIC, "chunked", "abort"), {"max_num_batched_tokens": 64}),
    *(_of_model(name) for name in MODELS if name != "llama"),
    Setup("llama bf16", "llama", ("hit", "reply"), {"dtype": "bfloat16"}),
    Setup("llama fp8", "llama", ("hit", "reply"), {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}),
    *(
        Setup(f"llama block {n}", "llama", ("hit",), {"block_size": n})
        for n in (None, 16, 64, 96, 256)
    ),
    Setup("gemma3 block 64", "gemma3", ("hit",), {"block_size": 64}),
    *(
        Setup(f"llama {name}", "llama", cells, {"prefix_caching_hash_algo": name})
        for name, cells in (
            ("sha256_cbor", ("hit", "salt")), ("xxhash", ("hit",)), ("xxhash_cbor", ("hit",)),
        )
    ),
    Setup("llama no prefix caching", "llama", ("hit", "reply"), {"enable_prefix_caching": False}),
    Setup(
        "llama MultiConnector",
        "llama",
        ("hit", "reply"),
        connectors=("ExampleConnector",),
    ),
    Setup("llama small", "llama", ("preempted",), _SMALL),
    Setup("gemma3 small", "gemma3", ("preempted",), {**_SMALL, "num_gpu_blocks_override": 48}),
    Setup("llama priority", "llama", ("priorities",), {**_SMALL, "scheduling_policy": "priority"}),
    Setup(
        "llama ngram",
        "llama",
        ("hit", "reply", "chunked", "speculated"),
        {**_NGRAM, "max_num_batched_tokens": 64},
    ),
    Setup("gemma3 ngram", "gemma3", ("hit", "reply", "speculated"), _NGRAM),
    Setup(
        "llama LoRA",
        "llama",
        ("adapter_hit", "adapters_apart", "adapter_changed"),
        {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
    ),
    Setup(
        "llama pooling",
        "llama",
        ("embedded",),
        {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False},
    ),
    Setup("llama tp2", "llama", ("hit", "reply", "abort"), _TP, environ=_TWO),
    Setup("gemma3 tp2", "gemma3", ("hit", "reply"), _TP, environ=_TWO),
    Setup("llama pp2", "llama", ("hit", "reply"), _PP, environ=_TWO),
    Setup(
        "llama async",
        "llama",
        ("streamed_input", "paused", "cancelled"),
        kind="async",
    ),
    Setup(
        "llama servers",
        "llama",
        ("two_servers", "reset_endpoint"),
        {"api_server_count": 2},
        kind="server",
        environ={"VLLM_SERVER_DEV_MODE": "1"},
    ),
    Setup("llama dp2", "llama", ("refused_flags",), {"data_parallel_size": 2}, kind="flags"),
)  # fmt: skip

# What `--short` runs.
SHORT = ("llama/hit", "llama/reply", "llama/salt", "llama/abort", "gemma3", "qwen3_next/hit")
