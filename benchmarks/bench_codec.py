"""What do the disk tier's codecs save on real KV, and what do they cost?

    python -m benchmarks.bench_codec [--short]

The demo's model computes the KV of real text, in bfloat16 and in float32; blocks of 16 and of 128
tokens, as an arena holds them (layer after layer, K and V, heads, tokens), are encoded and decoded
by the disk tier's own code, one thread, timed by its CPU time. Every block must come back bit for
bit.
The approximate codec is judged by the model itself: the KV of a prompt goes through it as bf16
blocks of 16 tokens, the text's next tokens are computed on top in float32, and their distributions
are held against those on the bf16 KV as it was. A broken codec (one of four bits) is judged beside
it, to see that the judgement can tell.
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
from kvmem.types import INT8_CODECS

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


def through_int8(kv: Any, n_bits: int = 8) -> tuple[Any, int, int]:
    """bf16 `kv` as the disk would give it back, its bytes, and those stored."""
    import torch

    codec, parts, plain, stored = DiskCodec(), [], 0, 0
    for block in blocks_of(kv, 16):
        kept = codec.encode(INT8_CODECS["bfloat16"], block)
        if kept is None:
            raise RuntimeError("a block was not made shorter")
        kept = np.array(kept)
        if n_bits < 8:  # on purpose: numbers that lost their low bits
            numbers = kept[2 * (block.nbytes // 2 // 64) :].view(np.int8)
            step = 1 << (8 - n_bits)
            numbers[:] = np.clip(np.round(numbers / step) * step, -127, 127)
        back = np.empty_like(block)
        if not codec.decode(INT8_CODECS["bfloat16"], kept, back):
            raise RuntimeError("a block did not come back")
        shape = (*kv.shape[:3], 16, kv.shape[4])
        parts.append(torch.from_numpy(back).view(torch.bfloat16).reshape(shape))
        plain, stored = plain + block.nbytes, stored + kept.nbytes
    return torch.cat(parts, 3), plain, stored


def fidelity(path: Path, n_tokens: int, n_next: int, n_texts: int) -> dict[str, float]:
    """How far the distributions of the next tokens move when a prompt's KV was stored as int8."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    each = n_tokens + n_next
    ids = tokenizer(real_text(8 * each * n_texts), return_tensors="pt").input_ids[0]
    if len(ids) < each * n_texts:
        raise ValueError(f"{len(ids)} tokens of text are not enough")
    found: dict[str, list[Any]] = {"int8": [], "int4": []}
    same: list[Any] = []
    plain = stored = 0
    for text in ids[: each * n_texts].reshape(n_texts, 1, each):
        with torch.no_grad():
            cache = model(text[:, :n_tokens], use_cache=True).past_key_values
        kv = torch.stack([torch.stack((one.keys[0], one.values[0])) for one in cache.layers])
        kv = kv.to(torch.bfloat16)

        def after(kv: Any, text: Any = text) -> Any:
            given = DynamicCache()
            for at, layer in enumerate(kv.float()):
                given.update(layer[:1].clone(), layer[1:].clone(), at)
            with torch.no_grad():
                logits = model(text[:, n_tokens:], past_key_values=given).logits[0]
            return torch.log_softmax(logits, -1)

        wanted = after(kv)
        near, n_plain, n_stored = through_int8(kv)
        plain, stored = plain + n_plain, stored + n_stored
        for name, got in (("int8", after(near)), ("int4", after(through_int8(kv, 4)[0]))):
            found[name].append((wanted.exp() * (wanted - got)).sum(-1))
            if name == "int8":
                same.append(wanted.argmax(-1) == got.argmax(-1))
    return {
        "int8_ratio": plain / stored,
        "int8_kl": float(torch.cat(found["int8"]).mean()),
        "int8_top1": float(torch.cat(same).float().mean()),
        "int4_kl": float(torch.cat(found["int4"]).mean()),
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
    near = fidelity(path, *((512, 128, 2) if args.short else (1024, 256, 6)))
    print(
        f"int8: ratio {near['int8_ratio']:.3f}, KL {near['int8_kl']:.5f}, "
        f"the same first choice {near['int8_top1']:.3f}; "
        f"with 4 of its bits KL {near['int4_kl']:.4f}"
    )
    small, large = found["bfloat16", 16], found["bfloat16", 128]
    finish(
        {
            "lossless_ratio": small["ratio"],
            "lossless_decode_gb_s": small["decode_gb_s"],
            "lossless_encode_gb_s": small["encode_gb_s"],
            "lossless_ratio_128": large["ratio"],
            "float32_ratio": found["float32", 16]["ratio"],
            **near,
            "tokens": n_tokens,
            "rounds": rounds,
        }
    )


if __name__ == "__main__":
    main()
