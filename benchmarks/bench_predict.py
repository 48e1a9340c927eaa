"""Are the cached tokens that the linter predicts the ones that the engine counts?

Calls of recorded agents, one after the other, each rendered by SmolLM2's template, go to a live
vLLM
with room for all of them; beside it `predict_cached_tokens`, as `kvmem lint --requests` uses it.
Exit code 1 where one differs.

    python -m benchmarks.bench_predict [--short]
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator

from benchmarks._corpus import generated, recorded, trace_folder
from benchmarks._report import finish
from kvmem.context import ChatRenderer
from kvmem.explain.lint import predict_cached_tokens

_BLOCK_TOKENS = 32  # what vLLM's CPU build takes
_MOST_TOKENS = 8190
# Calls of each set.
_SETS = (("tau_airline", 70), ("bfcl_multi_turn", 70), ("lmc_miniswe", 60))


def prompts(renderer: ChatRenderer, share: float) -> Iterator[list[int]]:
    """Token ids of each call, in the order of the traces."""
    folder = trace_folder(None)
    for name, most in _SETS:
        agents = (
            generated(agents=8, turns=5, seed=len(name))
            if folder is None
            else recorded(folder, name, most=1_000)
        )
        rendered = (
            renderer.encode(renderer.text(messages, generation=True))
            for agent in agents
            for messages in agent.turns
        )
        fitting = (ids for ids in rendered if len(ids) <= _MOST_TOKENS)
        yield from itertools.islice(fitting, round(share * most))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tenth of the calls")
    short: bool = parser.parse_args().short
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "10")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import transformers
    from vllm import LLM, SamplingParams

    from kvmem.demo.model import ensure

    folder = str(ensure())
    renderer = ChatRenderer.of(transformers.AutoTokenizer.from_pretrained(folder))
    sent = list(prompts(renderer, 0.1 if short else 1.0))
    llm = LLM(folder, block_size=_BLOCK_TOKENS, max_model_len=_MOST_TOKENS + 2, enforce_eager=True)
    params = SamplingParams(max_tokens=1, temperature=0)
    predicted = predict_cached_tokens(sent, block_tokens=_BLOCK_TOKENS)
    differ = cached = 0
    begin = time.monotonic()
    for number, (ids, wanted) in enumerate(zip(sent, predicted, strict=True), 1):
        (out,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        cached += out.num_cached_tokens
        if out.num_cached_tokens != wanted:
            differ += 1
            print(f"call {number}: vLLM counts {out.num_cached_tokens}, predicted were {wanted}")
        if number % 20 == 0:
            took = time.monotonic() - begin
            print(f"{number} of {len(sent)} calls, {took:.0f} s", flush=True)
    tokens = sum(map(len, sent))
    print(f"{len(sent)} calls, {tokens:,} tokens, {cached:,} of them cached")
    finish({"requests": len(sent), "differ": differ, "cached_share": cached / tokens})
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
