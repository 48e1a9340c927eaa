"""A real vLLM engine in a process of its own, one for each test module.

`EngineHost.run(function, ...)` runs a function of the test module there, with the host's `Engine`
as its first argument: in-process vLLM (VLLM_ENABLE_V1_MULTIPROCESSING=0), so both halves of the
connector can be reached and broken.
"""

from __future__ import annotations

import importlib
import multiprocessing
import operator
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest

__all__ = [
    "BLOCK",
    "Engine",
    "EngineHost",
    "Turn",
    "assert_agrees",
    "assert_same",
    "assert_settled",
    "generate_one",
    "prompt",
]

BLOCK = 32
ANSWER_S = 600


class Turn(dict):
    """What one request came back with: tokens, logprobs, finish_reason, receipt, cached."""

    __getattr__ = dict.__getitem__


class Engine:
    """The engine as the functions of a test see it."""

    def __init__(self, **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(**options)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def connector(self) -> Any:
        """The scheduler's side of the connector."""
        return self.scheduler.connector

    @property
    def half(self) -> Any:
        return self.connector.scheduler

    @property
    def worker_connector(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n_tokens: int = 8,
        *,
        kvmem: dict[str, Any] | None = None,
        salt: str | None = None,
        lora: tuple[str, int, str] | None = None,
    ) -> list[Turn]:
        """`lora` is an adapter's name, id and path."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        params = SamplingParams(
            temperature=0.0,
            max_tokens=n_tokens,
            ignore_eos=True,
            logprobs=0,
            extra_args={"kv_transfer_params": {"kvmem": kvmem}} if kvmem is not None else None,
        )
        inputs = [{"prompt_token_ids": list(p)} for p in prompts]
        for one in inputs:
            if salt is not None:
                one["cache_salt"] = salt
        adapter = LoRARequest(*lora) if lora is not None else None
        turns = []
        for out in self.llm.generate(inputs, params, use_tqdm=False, lora_request=adapter):
            done = out.outputs[0]
            turns.append(
                Turn(
                    tokens=list(done.token_ids),
                    logprobs=[
                        step[t].logprob
                        for t, step in zip(done.token_ids, done.logprobs, strict=True)
                    ],
                    finish_reason=done.finish_reason,
                    receipt=(out.kv_transfer_params or {}).get("kvmem"),
                    cached=out.num_cached_tokens,
                )
            )
        return turns

    def forget_device(self) -> None:
        """Empties the engine's own prefix cache and nothing else."""
        self.settle()
        assert self.scheduler.reset_prefix_cache(), "blocks are still in use"

    def settle(self) -> None:
        """Steps until the engine holds nothing of finished requests."""
        for _ in range(64):
            if not self.scheduler.has_requests():
                return
            self.llm.llm_engine.step()
        raise AssertionError("the engine still holds requests after 64 steps")

    def stats(self) -> dict[str, Any]:
        return dict(self.half.cache.stats())

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def prompt(n_tokens: int, seed: int) -> list[int]:
    """`n_tokens` ids that no other seed shares a first block with."""
    state, tokens = seed * 2654435761 % 2**32 or 1, []
    for _ in range(n_tokens):
        state = (1103515245 * state + 12345) % 2**31
        tokens.append(1000 + state // 7 % 40000)
    return tokens


def assert_settled(engine: Engine) -> None:
    engine.settle()
    stats = engine.stats()
    assert stats["pending"] == 0, stats
    assert stats["leases"] == 0, stats
    assert engine.half.cache.check_integrity() == []
    assert not engine.half._seen
    assert not engine.half.storing.outstanding
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 127


def assert_same(a: Turn, b: Turn) -> None:
    """`a` against the engine's own prefix hit, or any other run of the same shapes."""
    assert a.tokens == b.tokens
    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def assert_agrees(a: Turn, cold: Turn) -> None:
    """`a` against a prompt that was computed whole.

    Even in float32 the engine's own hit and its own cold prefill differ by rounding, since the
    matrices they multiply have other shapes: by less than 1e-5 where vLLM's kernels use AVX-512,
    by up to 2e-5 on AVX2. One wrong block shows above 1e-2 (test_failures.py breaks one).
    """
    assert a.tokens == cold.tokens
    assert a.logprobs == pytest.approx(cold.logprobs, abs=1e-4)


def generate_one(engine: Engine, tokens: list[int], n: int = 8, **kwargs: Any) -> Turn:
    return engine.generate([tokens], n, **kwargs)[0]


def _serve(pipe: Any, options: dict[str, Any]) -> None:
    try:
        engine = Engine(**options)
        pipe.send((True, None))
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        return
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except EOFError:
            engine.close()
            return
        try:
            function = operator.attrgetter(name)(importlib.import_module(module))
            pipe.send((True, function(engine, *args, **kwargs)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class EngineHost:
    """The parent's end. Raises AssertionError with the child's traceback when a function fails."""

    def __init__(self, model: str, *, kvmem: dict[str, Any] | None, **options: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
        options = {
            "model": model,
            "dtype": "float32",
            "block_size": BLOCK,
            "max_model_len": 2048,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 8,
            "num_gpu_blocks_override": 128,
            "enforce_eager": True,
            "seed": 0,
            "disable_log_stats": False,
            **options,
        }
        if kvmem is not None:
            options["kv_transfer_config"] = {
                "kv_connector": "KvmemConnector",
                "kv_connector_module_path": "kvmem.engines.vllm.connector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": kvmem,
            }
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._pipe.send((function.__module__, function.__qualname__, args, kwargs))
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(ANSWER_S):
            self.process.kill()
            raise AssertionError(f"the engine did not answer in {ANSWER_S} s: a request is stuck")
        try:
            good, answer = self._pipe.recv()
        except EOFError as error:
            self.process.join()
            raise AssertionError(f"the engine ended with {self.process.exitcode}") from error
        assert good, answer
        return answer

    def close(self) -> None:
        self._pipe.close()
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
