"""vLLM as the scenarios of the engine matrix see it: asked for tokens, emptied, and looked into.

The engine core runs in this process, so both halves of kvmem's connector can be reached; workers
have processes of their own only where there are several. `AsyncEngine` is vLLM's AsyncLLM, whose
core has a process of its own too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks._matrix import Setup, WrongError
from kvmem.engines.vllm.launch import transfer_config
from kvmem.store.arena import Arena

__all__ = ["ARENA", "BLOCK", "AsyncEngine", "Engine", "Turn", "options_of"]

BLOCK = 32
ARENA = f"matrix-{os.getpid()}"
_STEPS = 500


class Turn(msgspec.Struct, frozen=True):
    """An answer: tokens and their logprobs, all samples in one row, and where its KV came from."""

    tokens: list[int]
    logprobs: list[float]
    cached: int
    report: dict[str, Any]
    text: str = ""
    prompt_logprobs: list[float] = []

    @property
    def host(self) -> int:
        """Prompt tokens that kvmem says came from the host tier."""
        return int(self.report.get("tokens", {}).get("host", 0))

    @property
    def device(self) -> int:
        """Prompt tokens that kvmem says were the engine's own hit."""
        return int(self.report.get("tokens", {}).get("device", 0))


def options_of(setup: Setup, model: Path, *, arena: str, kvmem: bool, broken: bool) -> Any:
    """vLLM's options for a setup; `broken` lets kvmem load without looking at checksums."""
    options: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "block_size": BLOCK,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 256,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "seed": 0,
        "disable_log_stats": False,
        **setup.options,
    }
    if kvmem:
        own = transfer_config(
            {"host_gb": 0.25, "arena": arena, "verify_share": 0.0 if broken else 1.0}
        )
        several = _beside(setup, own, model.parent / "example")
        options["kv_transfer_config"] = several if setup.connectors else own
    return {name: value for name, value in options.items() if value is not None}


def _beside(setup: Setup, own: dict[str, Any], folder: Path) -> dict[str, Any]:
    others = [
        {
            "kv_connector": name,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        }
        for name in setup.connectors
    ]
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [own, *others]},
    }


class Engine:
    """vLLM's LLM with its core in this process."""

    def __init__(self, setup: Setup, model: Path, *, kvmem: bool, broken: bool) -> None:
        from vllm import LLM

        self.setup = setup
        self.model = model
        self.broken = broken
        self.llm = LLM(**options_of(setup, model, arena=ARENA, kvmem=kvmem, broken=broken))

    # -- what the engine is made of ----------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def half(self) -> Any:
        """The scheduler's half of kvmem, also inside a MultiConnector."""
        connector = self.scheduler.connector
        for one in getattr(connector, "sub_connectors", [connector]):
            if hasattr(one, "scheduler"):
                return one.scheduler
        raise LookupError("there is no kvmem in this engine")

    @property
    def block(self) -> int:
        """Tokens of a block that the engine hashes."""
        return int(self.scheduler.cache_config.block_size)

    # -- what is asked of it -----------------------------------------------------------------

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        n_tokens: int = 8,
        *,
        kvmem: dict[str, Any] | None = None,
        salt: str | None = None,
        adapter: Any = None,
        priorities: list[int] | None = None,
        **sampling: Any,
    ) -> list[Turn]:
        """The prompts together; `sampling` goes on top of greedy answers of `n_tokens`."""
        inputs: list[Any] = [{"prompt_token_ids": list(p)} for p in prompts]
        for one in inputs:
            if salt is not None:
                one["cache_salt"] = salt
        answers = self.llm.generate(
            inputs,
            sampling_params(n_tokens, kvmem, **sampling),
            use_tqdm=False,
            lora_request=adapter,
            priority=priorities,
        )
        return [turn_of(answer) for answer in answers]

    def one(self, prompt: Sequence[int], n_tokens: int = 8, **wishes: Any) -> Turn:
        """One prompt by itself: the same shapes every time."""
        return self.ask([prompt], n_tokens, **wishes)[0]

    def embed(self, prompt: Sequence[int]) -> tuple[list[float], int]:
        """A prompt's embedding, and its tokens that were not computed."""
        answer = self.llm.encode(
            [{"prompt_token_ids": list(prompt)}], pooling_task="embed", use_tqdm=False
        )[0]
        return answer.outputs.data.flatten().tolist(), answer.num_cached_tokens

    def start(self, request_id: str, prompt: Sequence[int], n_tokens: int, **wishes: Any) -> None:
        """A request that the scenario itself steps through."""
        inputs: Any = {"prompt_token_ids": list(prompt)}
        self.llm.llm_engine.add_request(request_id, inputs, sampling_params(n_tokens, **wishes))

    def step(self) -> None:
        self.llm.llm_engine.step()

    def abort(self, request_id: str) -> None:
        self.llm.llm_engine.abort_request([request_id])

    def forget_device(self) -> None:
        """Empties the engine's own prefix cache and nothing else; kvmem alone has the blocks."""
        self.settle()
        if not self.llm.llm_engine.reset_prefix_cache(reset_connector=False):
            raise WrongError("blocks are in use though no request is")
        if self.broken:
            spoil(ARENA)

    def forget_everything(self) -> bool:
        """What a reset that reaches connectors leaves: nothing."""
        self.settle()
        return bool(self.llm.llm_engine.reset_prefix_cache(reset_connector=True))

    def settle(self) -> None:
        """Steps until the engine holds nothing of requests that are over."""
        for _ in range(_STEPS):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise WrongError(f"the engine holds requests after {_STEPS} steps")

    def check(self) -> None:
        """Nothing is held of requests that are over, and kvmem's tables are sound."""
        self.settle()
        cache = self.half.cache
        held = {name: cache.stats()[name] for name in ("pending", "leases")}
        if any(held.values()) or cache.check_integrity():
            raise WrongError(f"after the cell: {held}, {cache.check_integrity()}")

    # -- what it counts ----------------------------------------------------------------------

    def counter(self, name: str, **labels: str) -> int:
        """One of vLLM's own counters."""
        return sum(
            int(m.value)
            for m in self.llm.get_metrics()
            if m.name == name and labels.items() <= m.labels.items()
        )

    def loaded_tokens(self) -> int:
        """Prompt tokens that came from outside the device, as vLLM itself counts them."""
        return self.counter("vllm:prompt_tokens_by_source", source="external_kv_transfer")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class AsyncEngine:
    """vLLM's AsyncLLM, what its servers run on; the scenarios are coroutines."""

    def __init__(self, setup: Setup, model: Path, *, kvmem: bool, broken: bool) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.broken = broken
        self._loop = asyncio.new_event_loop()
        self._n = 0
        options = options_of(setup, model, arena=ARENA, kvmem=kvmem, broken=broken)

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

        self.llm = self._loop.run_until_complete(start())

    def run(self, what: Coroutine[Any, Any, str]) -> str:
        return self._loop.run_until_complete(what)

    def generate(
        self, prompt: Any, n_tokens: int = 8, kvmem: dict[str, Any] | None = None
    ) -> AsyncIterator[Any]:
        """The answer's pieces; `prompt` is token ids, or an async generator of inputs."""
        from vllm.sampling_params import RequestOutputKind

        self._n += 1
        params = sampling_params(n_tokens, kvmem, output_kind=RequestOutputKind.DELTA)
        inputs = {"prompt_token_ids": list(prompt)} if isinstance(prompt, list) else prompt
        stream: AsyncIterator[Any] = self.llm.generate(inputs, params, f"matrix-{self._n}")
        return stream

    async def one(self, prompt: list[int], n_tokens: int = 8, **wishes: Any) -> Turn:
        """One prompt's whole answer."""
        pieces = [piece async for piece in self.generate(prompt, n_tokens, **wishes)]
        return joined(pieces)

    async def forget_device(self) -> None:
        """Empties the device's prefix cache as soon as the core holds nothing any more."""
        for _ in range(_STEPS):
            if await self.llm.reset_prefix_cache(reset_connector=False):
                break
        else:
            raise WrongError("blocks are in use though no request is")
        if self.broken:
            spoil(ARENA)

    def close(self) -> None:
        self.llm.shutdown()
        self._loop.close()


def sampling_params(n_tokens: int, kvmem: dict[str, Any] | None = None, **sampling: Any) -> Any:
    """Greedy, `n_tokens` whatever they are, with the logprob of each."""
    from vllm import SamplingParams

    return SamplingParams(
        **{
            "temperature": 0.0,
            "max_tokens": n_tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "extra_args": {"kv_transfer_params": {"kvmem": kvmem}} if kvmem else None,
            **sampling,
        }
    )


def turn_of(answer: Any) -> Turn:
    """What a RequestOutput holds."""
    tokens: list[int] = []
    logprobs: list[float] = []
    for sample in answer.outputs:
        tokens += list(sample.token_ids)
        logprobs += [
            step[token].logprob
            for token, step in zip(sample.token_ids, sample.logprobs or (), strict=True)
        ]
    return Turn(
        tokens=tokens,
        logprobs=logprobs,
        cached=answer.num_cached_tokens or 0,
        report=(answer.kv_transfer_params or {}).get("kvmem", {}),
        text="".join(sample.text or "" for sample in answer.outputs),
        prompt_logprobs=_prompt_logprobs(answer),
    )


def _prompt_logprobs(answer: Any) -> list[float]:
    """Of every prompt token but the first; empty where they were not asked for."""
    if not answer.prompt_logprobs:
        return []
    pairs = zip(answer.prompt_token_ids, answer.prompt_logprobs, strict=True)
    return [step[token].logprob for token, step in pairs if step is not None]


def joined(pieces: Sequence[Any]) -> Turn:
    """The turn that a stream's pieces make up; where its KV came from is in the last."""
    turns = [turn_of(piece) for piece in pieces]
    return Turn(
        tokens=[token for turn in turns for token in turn.tokens],
        logprobs=[logprob for turn in turns for logprob in turn.logprobs],
        cached=max(turn.cached for turn in turns),
        report=turns[-1].report,
    )


def spoil(arena: str) -> None:
    """Zeros in place of everything that the host tier holds, behind everybody's back."""
    opened = Arena.open(Arena.path_of(arena))
    at = opened.header.data_offset
    opened.buffer[at:] = bytes(len(opened.buffer) - at)
    opened.close(unlink=False)
