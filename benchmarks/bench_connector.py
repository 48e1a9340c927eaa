"""What does kvmem cost the scheduler's thread, per scheduling step?

    python -m benchmarks.bench_connector [--short] [--block-tokens 16]

vLLM's own Scheduler with its real configuration for SmolLM2, kvmem's connector in both of its
roles, and 64 requests of about 8k tokens. There is no forward: sampled tokens are made up, since
no time of the scheduler depends on them. Everything else happens: blocks are hashed, allocated,
copied to the arena after the step that completes them, acknowledged, published, and loaded again
in a second round that starts with an empty device. To spare memory the model has one layer, which
the scheduler can't see.

Phases, each with its own steps:

    prefill   64 cold prompts, chunked as vLLM does by default
    decode    all 64 running, one token each; a request completes a block every block_tokens steps
    load      the same 64 prompts again after the device's prefix cache was emptied

CPU time of this thread (not wall time). `step_us` is schedule() and update_from_output() with the
connector's hooks inside; `connector_us` is those hooks, each timed by itself, less the clock's own
cost. `pickle_us` is what the step's orders cost to send to a worker in another process.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import pickle
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from benchmarks import _arms
from benchmarks._math import percentile
from benchmarks._process import exit_on_sigterm, leftovers, shared_memory
from benchmarks._report import finish
from kvmem.demo import model as demo_model

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

__all__ = ["Phase", "measure", "table"]

_SEED = 20_261_123
_TOKEN = 7
_PROMPT_TOKENS = 7_600  # of the first request, every next one two shorter; 8k once all decode
_MAX_MODEL_LEN = 8_192


class HookClock:
    """CPU nanoseconds of this thread inside a connector's scheduler hooks."""

    def __init__(self, connector: Any) -> None:
        self.ns = 0
        self.calls = 0
        self.by_hook: dict[str, int] = {}
        self._depth = 0
        for name, _ in inspect.getmembers(type(connector), inspect.isfunction):
            if not name.startswith("_"):
                setattr(connector, name, self._timed(name, getattr(connector, name)))
        self.cost_ns = self._own_cost()
        self.take()

    def take(self) -> tuple[float, dict[str, int]]:
        """Microseconds since last asked, without the clock's own cost; and calls by hook."""
        us = max(0.0, self.ns - self.calls * self.cost_ns) / 1e3
        hooks, self.by_hook = self.by_hook, {}
        self.ns = self.calls = 0
        return us, hooks

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:  # one hook calls another: the outer one has the time
                return hook(*args, **kwargs)
            self._depth = 1
            begin = time.thread_time_ns()
            try:
                return hook(*args, **kwargs)
            finally:
                self.ns += time.thread_time_ns() - begin
                self.calls += 1
                self.by_hook[name] = self.by_hook.get(name, 0) + 1
                self._depth = 0

        return timed

    def _own_cost(self) -> float:
        """Nanoseconds that an empty hook seems to take."""
        empty = self._timed("empty", lambda: None)
        costs = []
        for _ in range(200):
            before = self.ns
            for _ in range(50):
                empty()
            costs.append((self.ns - before) / 50)
        return statistics.median(costs)


class Step(msgspec.Struct, frozen=True):
    """CPU microseconds of one step, and how many requests it ran."""

    step_us: float
    connector_us: float
    pickle_us: float
    requests: int


class Engine:
    """vLLM's scheduler and kvmem's two halves; the model is left out."""

    def __init__(
        self, config: VllmConfig, kv: KVCacheConfig, caches: dict[str, torch.Tensor]
    ) -> None:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
        from vllm.v1.structured_output import StructuredOutputManager

        self.config = config
        block_tokens, hash_tokens = resolve_kv_cache_block_sizes(kv, config)
        self.scheduler: Scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_tokens,
            hash_block_size=hash_tokens,
            log_stats=True,
        )
        self.worker = KVConnectorFactory.create_connector(
            config=config, role=KVConnectorRole.WORKER, kv_cache_config=kv
        )
        self.worker.register_kv_caches(caches)
        self.loaded_tokens = 0
        self.clock = HookClock(self.scheduler.connector)

    def step(self) -> Step:
        """One scheduling step; the worker's half does its work off the clock."""
        self.clock.take()
        begin = time.thread_time_ns()
        output = self.scheduler.schedule()
        scheduled = time.thread_time_ns()
        pickle.dumps(output.kv_connector_metadata, protocol=pickle.HIGHEST_PROTOCOL)
        sent = time.thread_time_ns()
        result = self._run(output)
        back = time.thread_time_ns()
        answers = self.scheduler.update_from_output(output, result)
        end = time.thread_time_ns()
        clocks = self.clock.calls * self.clock.cost_ns / 1e3
        connector_us, _ = self.clock.take()
        for answer in (a for outputs in answers.values() for a in outputs.outputs):
            if answer.prefill_stats is not None:
                self.loaded_tokens += answer.prefill_stats.num_external_cached_tokens
        return Step(
            step_us=(scheduled - begin + end - back) / 1e3 - clocks,
            connector_us=connector_us,
            pickle_us=(sent - scheduled) / 1e3,
            requests=len(output.num_scheduled_tokens),
        )

    def _run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """What vLLM's model runner does around a forward, in its order, without the forward."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        worker = self.worker
        worker.handle_preemptions(output.kv_connector_metadata)
        worker.bind_connector_metadata(output.kv_connector_metadata)
        worker.start_load_kv(None)
        worker.wait_for_save()
        moved = worker.get_transfer_results(output.finished_req_ids)
        transferred = KVConnectorOutput(
            finished_sending=moved.finished_sending,
            finished_recving=moved.finished_recving,
            failed_recving=moved.failed_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[[_TOKEN] if self._samples(i) else [] for i in ids],
            kv_connector_output=transferred,
        )

    def _samples(self, request_id: str) -> bool:
        """Whether the step reached the end of the request's tokens."""
        request = self.scheduler.requests[request_id]
        placeholders = getattr(request, "num_output_placeholders", 0)
        return request.num_computed_tokens >= request.num_tokens + placeholders - 1 and (
            request.num_computed_tokens >= request.num_prompt_tokens
        )

    def finish_all(self) -> None:
        """Ends every request and steps until the connector has let go of their blocks."""
        from vllm.v1.request import RequestStatus

        ids = list(self.scheduler.requests)
        self.scheduler.finish_requests(ids, RequestStatus.FINISHED_STOPPED)
        for _ in range(10):
            self.step()


class Phase(msgspec.Struct, frozen=True):
    """What a phase's steps cost, in CPU microseconds of the scheduler's thread."""

    name: str
    steps: int
    step_us: float
    connector_us: float
    connector_p99_us: float
    pickle_us: float

    @classmethod
    def of(cls, name: str, steps: list[Step]) -> Phase:
        """Means over the steps, which add up to the whole."""
        return cls(
            name=name,
            steps=len(steps),
            step_us=statistics.fmean(s.step_us for s in steps),
            connector_us=statistics.fmean(s.connector_us for s in steps),
            connector_p99_us=percentile([s.connector_us for s in steps], 0.99),
            pickle_us=statistics.fmean(s.pickle_us for s in steps),
        )

    @property
    def share(self) -> float:
        """Of the step's CPU time, how much is kvmem's."""
        return self.connector_us / self.step_us


def _requests(n: int, block_tokens: int, config: VllmConfig) -> list[Request]:
    """The same `n` requests at every call."""
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_fn)
    hasher = get_request_block_hasher(block_tokens, hash_fn)
    rng = np.random.default_rng(_SEED)
    sampling = SamplingParams(max_tokens=_MAX_MODEL_LEN, ignore_eos=True, temperature=0.0)
    sampling.update_from_generation_config({}, None)
    return [
        Request(
            request_id=f"{time.monotonic_ns()}-{i}",
            prompt_token_ids=rng.integers(100, 40_000, _PROMPT_TOKENS - 2 * i).tolist(),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=hasher,
        )
        for i in range(n)
    ]


@contextmanager
def _engine(n_requests: int, block_tokens: int) -> Iterator[Engine]:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(
        block_size=block_tokens, num_kv_heads=3, head_size=64, dtype=torch.bfloat16
    )
    n_blocks = 1 + n_requests * (_MAX_MODEL_LEN // block_tokens)
    host_gb = 1.1 * n_blocks * spec.page_size_bytes / 2**30
    config = EngineArgs(
        model=str(demo_model.ensure(print)),
        block_size=block_tokens,
        max_model_len=_MAX_MODEL_LEN,
        max_num_seqs=n_requests,
        enforce_eager=True,
        kv_transfer_config=_arms.kvmem_transfer({"host_gb": host_gb}),
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = n_blocks
    layer = "model.layers.0.self_attn.attn"
    kv = KVCacheConfig(
        num_blocks=n_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([layer], spec)],
    )
    cache = torch.zeros((n_blocks, 3, block_tokens, 128), dtype=torch.bfloat16)
    engine = Engine(config, kv, {layer: cache})
    try:
        yield engine
    finally:
        engine.worker.shutdown()
        engine.scheduler.shutdown()


def measure(n_requests: int, block_tokens: int, n_decode: int) -> tuple[Phase, Phase, Phase]:
    """Prefill, decode and load; the decode phase takes `n_decode` steps."""
    with _engine(n_requests, block_tokens) as engine:
        return _phases(engine, n_requests, block_tokens, n_decode)


def _phases(
    engine: Engine, n_requests: int, block_tokens: int, n_decode: int
) -> tuple[Phase, Phase, Phase]:
    gc.collect()
    gc.freeze()  # as vLLM's engine core does once it has started
    prefill = _admit(engine, _requests(n_requests, block_tokens, engine.config))
    decode = [engine.step() for _ in range(n_decode)]
    if any(step.requests != n_requests for step in decode):
        raise RuntimeError("a decode step did not run all the requests")
    engine.finish_all()
    if not engine.scheduler.reset_prefix_cache(reset_connector=False):
        raise RuntimeError("the device's prefix cache could not be emptied")
    if engine.loaded_tokens:
        raise RuntimeError(f"{engine.loaded_tokens} tokens of cold prompts came from the host tier")
    again = _requests(n_requests, block_tokens, engine.config)
    load = _admit(engine, again)
    whole = sum((r.num_prompt_tokens - 1) // block_tokens * block_tokens for r in again)
    if engine.loaded_tokens != whole:
        raise RuntimeError(
            f"{engine.loaded_tokens:,} of {whole:,} tokens came from the host tier: the load "
            "phase would measure something else"
        )
    engine.finish_all()
    return Phase.of("prefill", prefill), Phase.of("decode", decode), Phase.of("load", load)


def _admit(engine: Engine, requests: list[Request]) -> list[Step]:
    """The steps until every request runs and has its first token."""
    for request in requests:
        engine.scheduler.add_request(request)
    steps = []
    while not all(request.num_output_tokens for request in requests):
        steps.append(engine.step())
        if len(steps) > 100_000:
            raise RuntimeError("the requests don't come to run")
    return steps


def table(phases: Iterable[Phase]) -> str:
    """The phases as aligned text, one line each, with a heading."""
    heads = ("steps", "step", "kvmem", "kvmem p99", "share", "pickle")
    lines = [f"{'':9}" + "".join(f"{head:>11}" for head in heads) + "   µs of CPU a step"]
    for p in phases:
        numbers = f"{p.steps:11}{p.step_us:11.1f}{p.connector_us:11.1f}{p.connector_p99_us:11.1f}"
        lines.append(f"{p.name:9}{numbers}{p.share:11.1%}{p.pickle_us:11.1f}")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark and prints the table and the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer decode steps")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--block-tokens", type=int, default=_arms.BLOCK_TOKENS)
    args = parser.parse_args()
    exit_on_sigterm()
    before = shared_memory()
    n_decode = args.block_tokens if args.short else 2 * max(args.block_tokens, 64)
    phases = measure(args.requests, args.block_tokens, n_decode)
    print("\n" + table(phases))
    prefill, decode, load = phases
    finish(
        {
            "connector_us_per_step": decode.connector_us,
            "step_us": decode.step_us,
            "share": decode.share,
            "connector_p99_us": decode.connector_p99_us,
            "prefill_connector_us": prefill.connector_us,
            "prefill_step_us": prefill.step_us,
            "prefill_share": prefill.share,
            "load_connector_us": load.connector_us,
            "load_step_us": load.step_us,
            "load_share": load.share,
            "pickle_us": decode.pickle_us,
            "requests": args.requests,
            "block_tokens": args.block_tokens,
            "left_behind": leftovers(before),
        }
    )


if __name__ == "__main__":
    main()
