"""How much sooner does transformers answer where the prompt's prefix is restored?

One prompt of 2,801 tokens by SmolLM2-135M in float32, greedy, on the CPU or a GPU:

    prefill  the model's forward over the first 2,800 tokens, into transformers' own cache
    restore  `PrefixStore.open`: hashing, lookup, copy, checksums
    cold     the first token by transformers alone
    warm     the first token by `PrefixStore.generate`, the prefix restored

The logits after the restored prefix are compared bit for bit with those after the same tokens run
into a cache in the same two steps, and the tokens with transformers' own; a round that restored
nothing fails.

    python -m benchmarks.bench_transformers [--short] [--device cuda] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._corpus import real_text
from benchmarks._report import Row, finish, table

_TOKENS = 2801
_NEW = 24


def _model(folder: Path | None, device: str) -> tuple[Any, Any]:
    import torch
    import transformers

    if folder is None:
        from kvmem.demo.model import ensure

        folder = ensure()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().to(device), tokenizer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="less than a minute")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; else SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=0)
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.short else 7)
    import torch
    from transformers import DynamicCache

    from kvmem.engines.transformers import PrefixStore

    model, tokenizer = _model(arguments.model, arguments.device)
    ids = (
        tokenizer(real_text(6 * _TOKENS), return_tensors="pt")
        .input_ids[:, :_TOKENS]
        .to(model.device)
    )
    n_prefix = (_TOKENS - 1) // 16 * 16
    mask = torch.ones_like(ids)

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        _settle(arguments.device)
        begin = time.perf_counter()
        result = call()
        _settle(arguments.device)
        return time.perf_counter() - begin, result

    def prefill() -> Any:
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:, :n_prefix], past_key_values=cache, logits_to_keep=1)

    def plain(n_new: int) -> Any:
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0
        )

    with PrefixStore(model, host_gb=1, max_tokens=_TOKENS + _NEW) as store:
        with torch.inference_mode(), store.open(ids) as own:
            model(input_ids=ids[:, :n_prefix], past_key_values=own, logits_to_keep=1)
            split = model(input_ids=ids[:, n_prefix:], past_key_values=own).logits
            kept = own.keep()
        if kept != n_prefix // 16:
            raise RuntimeError(f"{kept} blocks were kept, not {n_prefix // 16}")
        with torch.inference_mode(), store.open(ids) as restored:
            logits = model(input_ids=ids[:, n_prefix:], past_key_values=restored).logits
        warm = store.generate(ids, max_new_tokens=_NEW, do_sample=False, pad_token_id=0)
        tokens_equal = torch.equal(warm.tokens, plain(_NEW))
        samples: dict[str, list[float]] = {n: [] for n in ("prefill", "restore", "cold", "warm")}
        for _ in range(-1, rounds):
            one = {"prefill": timed(prefill)[0]}
            took, cache = timed(lambda: store.open(ids))
            one["restore"], report = took, cache.report
            cache.close()
            one["cold"] = timed(lambda: plain(1))[0]
            one["warm"], out = timed(
                lambda: store.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
            )
            if report.restored_tokens != n_prefix or out.report.restored_tokens != n_prefix:
                raise RuntimeError(f"restored {report.restored_tokens} tokens, not {n_prefix}")
            if _ >= 0:
                for name, seconds in one.items():
                    samples[name].append(seconds)
        n_bytes = kept * store.block_bytes
    rows = [
        Row.of("prefix", samples, ours="restore", theirs="prefill", unit="ms"),
        Row.of("first token", samples, ours="warm", theirs="cold", unit="ms"),
    ]
    print(f"{type(model).__name__} in float32 on {_device(arguments.device)}")
    print(f"{n_prefix:,} tokens are {kept} blocks, {n_bytes / 2**20:.0f} MiB")
    print(table(rows))
    gb_s = n_bytes / statistics.median(samples["restore"]) / 1e9
    finish(
        {
            "prefill_vs_restore": rows[0].ratio,
            "cold_vs_warm_ttft": rows[1].ratio,
            "restore_gb_s": gb_s,
            "logits_equal": bool(torch.equal(logits, split)),
            "tokens_equal": tokens_equal,
        }
    )


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _device(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name())
    return "the CPU"


if __name__ == "__main__":
    main()
