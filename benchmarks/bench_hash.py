"""How much faster are vLLM's block keys computed here than in vLLM itself?

    python -m benchmarks.bench_hash [--short]

vLLM's side is what its engine runs for a new request: the hasher of `get_request_block_hasher` on
a `Request`. Ours is `BlockHasher.hash_blocks`, which answers the same list of keys from the same
token ids, as a list of int and as an int32 array. Every key is compared. The clock is the thread's
CPU time, and both sides use one thread. A ratio in the last line is the lowest median among the
rows of its algorithm. Below the table: a turn of a `TokenCursor`, printed and not gated.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks._report import Row, finish, paired, table
from kvmem.hashing import BlockHasher, TokenCursor

# The mean prompt of bench_index. Ids are drawn below the size of a vocabulary: SmolLM2's, whose ids
# take two bytes, and Llama 3's, where half of them take four.
PROMPT_TOKENS = 13_440
TURN_TOKENS = 500
VOCABULARIES = {"49k": 49_152, "128k": 128_256}
BLOCKS = (16, 128)
ALGORITHMS = ("sha256", "sha256_cbor")


def prompt(vocabulary: int) -> list[int]:
    draw = random.Random(vocabulary)
    return [draw.randrange(vocabulary) for _ in range(PROMPT_TOKENS)]


def engine(algorithm: str, block_tokens: int, tokens: list[int]) -> Callable[[], list[bytes]]:
    """What the engine calls for a request with these tokens."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    function = get_hash_fn_by_name(algorithm)
    init_none_hash(function)
    request = Request("bench", tokens, SamplingParams(max_tokens=1), None)
    hasher = get_request_block_hasher(block_tokens, function)
    return lambda: hasher(request)


def compare(algorithm: str, vocabulary: str, block_tokens: int, repetitions: int) -> list[Row]:
    """One row for each kind of input, after every key was found equal."""
    tokens = prompt(VOCABULARIES[vocabulary])
    array = np.array(tokens, np.int32)
    hasher = BlockHasher(algorithm, block_tokens)
    arms = {
        "vllm": engine(algorithm, block_tokens, tokens),
        "list": lambda: hasher.hash_blocks(tokens),
        "int32": lambda: hasher.hash_blocks(array),
    }
    keys = arms["vllm"]()
    assert len(keys) == PROMPT_TOKENS // block_tokens
    for kind in ("list", "int32"):
        assert arms[kind]() == keys, f"{algorithm}, block {block_tokens}, {kind}: keys differ"
    samples = paired(arms, repetitions, clock=time.thread_time)
    return [
        Row.of(
            f"{algorithm}, ids below {vocabulary}, block {block_tokens}, {kind}",
            samples,
            ours=kind,
            theirs="vllm",
            unit="ns",
            per=len(keys),
        )
        for kind in ("list", "int32")
    ]


def turns(repetitions: int) -> dict[str, float]:
    """Median microseconds of a cursor's turn of 500 new tokens, blocks of 16."""
    tokens = prompt(VOCABULARIES["49k"])
    hasher = BlockHasher("sha256", 16)
    keys = hasher.hash_packed(tokens)
    given = {
        "sync, list": ("sync", tokens),
        "sync, int32": ("sync", np.array(tokens, np.int32)),
        "extend, list": ("extend", tokens[-TURN_TOKENS:]),
        "extend, int32": ("extend", np.array(tokens[-TURN_TOKENS:], np.int32)),
    }
    medians = {}
    for name, (verb, argument) in given.items():
        seconds = []
        for _ in range(repetitions):
            cursor = TokenCursor(hasher)
            cursor.extend(tokens[:-TURN_TOKENS])
            turn = getattr(cursor, verb)
            start = time.perf_counter()
            turn(argument)
            seconds.append(time.perf_counter() - start)
            assert bytes(cursor.packed) == keys, f"{name}: keys differ"
        medians[name] = statistics.median(seconds) * 1e6
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="fewer repetitions, under 60 s")
    short = parser.parse_args().short
    engine(ALGORITHMS[0], BLOCKS[0], prompt(VOCABULARIES["49k"]))  # imports vLLM
    gc.freeze()  # `paired` collects before every arm; vLLM's own objects take 0.3 s each time
    result: dict[str, float] = {}
    for algorithm in ALGORITHMS:
        rows = [
            row
            for vocabulary in VOCABULARIES
            for block_tokens in BLOCKS
            for row in compare(algorithm, vocabulary, block_tokens, 11 if short else 41)
        ]
        print(table(rows), "\n")
        result[f"{algorithm}_vs_vllm"] = min(row.ratio for row in rows)
    print(f"a cursor's turn, {PROMPT_TOKENS:,} tokens of which {TURN_TOKENS} are new:")
    for name, us in turns(200 if short else 2000).items():
        print(f"  {name:14} {us:6.2f} µs")
    finish(result)


if __name__ == "__main__":
    main()
