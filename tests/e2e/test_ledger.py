"""On the real vLLM: a ledger's every turn finds all of the last turn's blocks on the device."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_ledgers_reach_the_ideal_and_their_echo_is_the_engines(
    smollm2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import transformers
    from vllm import LLM, SamplingParams

    from benchmarks.bench_ledger import LedgerClient, cached_of_ideal
    from kvmem.context import ChatRenderer, Ledger

    renderer = ChatRenderer.of(transformers.AutoTokenizer.from_pretrained(smollm2))
    llm: Any = LLM(smollm2, block_size=32, max_model_len=2048, enforce_eager=True)
    for temperature in (0.0, 1.0):
        cached, ideal = cached_of_ideal(llm, renderer, LedgerClient, temperature, 3, seed=1)
        assert cached == ideal > 0
    # What vLLM says that it was asked is what was sent; a fork finds what its origin computed.
    one = Ledger.open(renderer, system="You are a careful planner of long journeys. " * 12)
    one.append({"role": "user", "content": "Where to?"})
    forks = [one.fork("a"), one.fork("b")]
    params = SamplingParams(max_tokens=16, temperature=0)
    for number, fork in enumerate(forks):
        sent = fork.request()["prompt"]
        (out,) = llm.generate([{"prompt_token_ids": sent}], params, use_tqdm=False)
        fork.commit(
            {
                "prompt_token_ids": list(out.prompt_token_ids),
                "choices": [{"token_ids": list(out.outputs[0].token_ids)}],
            }
        )
        wanted = (len(sent) - 1) // 32 * 32 if number else 0
        assert out.num_cached_tokens == wanted
    # What they were answered may differ in a last bit: one was computed whole, one resumed.
    assert forks[0].tokens()[: len(sent)] == forks[1].tokens()[: len(sent)] == sent
