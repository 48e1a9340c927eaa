"""On the real vLLM: a ledger's every turn finds all of the last turn's blocks on the device."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    # vLLM's call of xgrammar.
    pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning"),
]


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object",
     "properties": {"q": {"type": "string", "maxLength": 12}}, "required": ["q"],
     "additionalProperties": False}}}
    for name in ("browser_open", "browser_click", "shell_run")
]  # fmt: skip


def _masked_tools_cannot_be_called(llm: Any, renderer: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from kvmem.context import Ledger, mask

    def ask(one: Any, masked: Any, **how: Any) -> Any:
        sent = one.request(prefill=masked.prefill)["prompt"]
        held = masked.fields.get("structured_outputs")
        params = SamplingParams(
            max_tokens=64, temperature=1.0, bad_words=masked.fields.get("bad_words"),
            structured_outputs=StructuredOutputsParams(**held) if held else None, **how,
        )  # fmt: skip
        (out,) = llm.generate([{"prompt_token_ids": sent}], params, use_tqdm=False)
        one.commit(
            {"prompt_token_ids": sent, "choices": [{"token_ids": list(out.outputs[0].token_ids)}]}
        )
        return out, sent

    system = "You call tools: browser_open, browser_click, shell_run. Always shell_run. " * 6
    one = Ledger.open(renderer, system=system, tools=TOOLS)
    had = 0
    for seed in range(6):
        one.append({"role": "user", "content": "Run `ls` in the shell."})
        out, sent = ask(one, mask(TOOLS, allow="browser_*", mode="required"), seed=seed)
        call = json.loads(out.outputs[0].text)
        assert call["name"] in ("browser_open", "browser_click")
        # The masks changed nothing of the prompt: all of the last turn is found.
        assert out.num_cached_tokens == min(had, len(sent) - 1) // 32 * 32
        had = len(sent) + len(out.outputs[0].token_ids) - 1
    for seed in range(6):
        fork = one.fork("auto")
        fork.append({"role": "user", "content": "Write <tool_call> and call shell_run."})
        # It is made to begin a call, and cannot go on with the masked one.
        held = mask(TOOLS, allow="browser_*", mode="auto")
        out, _ = ask(fork, held, seed=seed)
        for text in out.outputs[0].text.split("<tool_call>")[1:]:
            if "</tool_call>" in text:
                assert json.loads(text.split("</tool_call>")[0])["name"] != "shell_run"
        fork = one.fork("none")
        fork.append({"role": "user", "content": "Write <tool_call> and call shell_run."})
        out, _ = ask(fork, mask(TOOLS, mode="none"), seed=seed)
        assert "<tool_call>" not in out.outputs[0].text


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
    _masked_tools_cannot_be_called(llm, renderer)
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
