"""What does the disk tier's exact codec save on real KV, and what does it cost?

    python -m benchmarks.bench_codec [--short]

The demo's model computes the KV of real text, in bfloat16 and in float32; blocks of 16 and of 128
tokens, as an arena holds them (layer after layer, K and V, heads, tokens), are encoded and decoded
by the disk tier's own code, one thread, timed by its CPU time. Every block must come back bit for
bit. Beside it: zstd-1 of the bytes as they are, by the same library.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks._corpus import real_text
from benchmarks._report import finish, spread
from kvmem._core import DiskCodec
from kvmem.demo import model as demo_model

__all__: list[str] = []

Bytes = npt.NDArray[np.uint8]


def kv_of(path: Path, dtype: str, n_tokens: int) -> Any:
    """K and V of all layers: [layers, 2, heads, n_tokens, head_dim], a torch tensor."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    ids = tokenizer(real_text(8 * n_tokens), return_tensors="pt").input_ids[:, :n_tokens]
    if ids.shape[1] < n_tokens:
        raise ValueError(f"{ids.shape[1]} tokens of text are not enough")
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return torch.stack([torch.stack(pair) for pair in layers])


def blocks_of(kv: Any, block_tokens: int) -> list[Bytes]:
    """The bytes of each block of so many tokens."""
    import torch

    n = kv.shape[3] // block_tokens
    parts = [kv[:, :, :, i * block_tokens : (i + 1) * block_tokens] for i in range(n)]
    return [part.contiguous().view(torch.uint8).numpy().reshape(-1) for part in parts]


def thread_s(work: Callable[[], Any], rounds: int) -> list[float]:
    """CPU seconds of this thread, each round."""
    work()
    taken = []
    for _ in range(rounds):
        begin = time.thread_time()
        work()
        taken.append(time.thread_time() - begin)
    return taken


def measure(blocks: list[Bytes], width: int, rounds: int) -> dict[str, float]:
    """Ratio and speeds over these blocks; a speed counts the block's own bytes."""
    codec = DiskCodec()
    plain = sum(block.nbytes for block in blocks)
    stored = [codec.encode(width, block) for block in blocks]
    if any(one is None for one in stored):
        raise RuntimeError("a block was not made shorter")
    kept = [np.asarray(one) for one in stored]
    back = np.empty_like(blocks[0])
    for block, one in zip(blocks, kept, strict=True):
        if not codec.decode(width, one, back) or not np.array_equal(back, block):
            raise RuntimeError("a block came back as another")
    encode = thread_s(lambda: [codec.encode(width, block) for block in blocks], rounds)
    decode = thread_s(lambda: [codec.decode(width, one, back) for one in kept], rounds)
    low, high = spread([plain / seconds / 1e9 for seconds in decode])
    return {
        "ratio": plain / sum(one.nbytes for one in kept),
        "encode_gb_s": plain / statistics.median(encode) / 1e9,
        "decode_gb_s": plain / statistics.median(decode) / 1e9,
        "decode_low": low,
        "decode_high": high,
    }


def main() -> None:
    """Prints a row for each kind of block, and the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a quarter of the text, 3 rounds")
    args = parser.parse_args()
    if not DiskCodec.available():
        raise SystemExit("bench_codec: this machine has no libzstd.so.1")
    n_tokens, rounds = (512, 3) if args.short else (2048, 9)
    path = demo_model.ensure(print)
    found = {}
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        kv = kv_of(path, dtype, n_tokens)
        for block_tokens in (16, 128):
            row = measure(blocks_of(kv, block_tokens), width, rounds)
            found[dtype, block_tokens] = row
            print(
                f"{dtype:9} {block_tokens:4} tokens  ratio {row['ratio']:5.3f}  "
                f"encode {row['encode_gb_s']:5.2f} GB/s  decode {row['decode_gb_s']:5.2f} GB/s "
                f"({row['decode_low']:.2f}..{row['decode_high']:.2f})",
                flush=True,
            )
    small, large = found["bfloat16", 16], found["bfloat16", 128]
    finish(
        {
            "lossless_ratio": small["ratio"],
            "lossless_decode_gb_s": small["decode_gb_s"],
            "lossless_encode_gb_s": small["encode_gb_s"],
            "lossless_ratio_128": large["ratio"],
            "float32_ratio": found["float32", 16]["ratio"],
            "tokens": n_tokens,
            "rounds": rounds,
        }
    )


if __name__ == "__main__":
    main()
