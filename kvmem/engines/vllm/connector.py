"""`KvmemConnector`: vLLM's connector interface on top of the two halves.

Every hook passes one door, `_safely`: whatever fails inside kvmem costs a recompute, never the
request and never the engine (I9). The interface is vllm/distributed/kv_transfer/kv_connector/
v1/base.py of 0.29 to 0.33.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvmem.config import Config
from kvmem.engines.vllm import refusal
from kvmem.engines.vllm.scheduler import SchedulerHalf
from kvmem.engines.vllm.wire import Acks, Orders
from kvmem.engines.vllm.worker import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["KvmemConnector"]

log = logging.getLogger("kvmem")

T = TypeVar("T")


class KvmemConnector(KVConnectorBase_V1, SupportsHMA):
    """kvmem as a vLLM KV connector; see docs/vllm.md.

    Raises:
        KVMemError: at start only, naming the setting and the next step.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None  # vLLM makes a connector because of it
        # A load that fails is computed instead; the engine's default fails the request.
        transfer.kv_load_failure_policy = "recompute"
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        with refusal.reported():
            config = Config.parse(transfer.kv_connector_extra_config)
            if role == KVConnectorRole.SCHEDULER:
                self._scheduler = SchedulerHalf(config, vllm_config, kv_cache_config)
            else:
                self._worker = WorkerHalf(config, vllm_config, kv_cache_config)

    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        _cache_hit_source = CacheHitSource.HOST
    except ImportError:  # before 0.32
        pass

    @property
    def requires_kv_delivery(self) -> bool:
        """A lost store is a later miss, nothing more."""
        return False

    @property
    def scheduler(self) -> SchedulerHalf:
        """The scheduler's half; only in the process of the scheduler."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> WorkerHalf:
        """The worker's half; only in the process of a worker."""
        assert self._worker is not None
        return self._worker

    def _safely(
        self,
        hook: str,
        do: Callable[[], T],
        otherwise: Callable[[], T],
        last_resort: T | None = None,
    ) -> T:
        """What `do` answers, or `otherwise` when kvmem fails: a plug-in door (I9).

        `otherwise` may fail too where it has to look at kvmem's own state; then `last_resort` is
        the answer, a value that promises nothing.
        """
        try:
            return do()
        except Exception as error:  # I9: a hook of the engine's; whatever it is, it goes on
            log.exception("kvmem: %s failed; the engine computes instead", hook)
            self._note(hook, error)
        try:
            return otherwise()
        except Exception as error:  # I9: the same
            log.exception("kvmem: %s failed, and so did the way out of it", hook)
            self._note(hook, error)
        return cast("T", last_resort)

    def _note(self, hook: str, error: Exception) -> None:
        half = self._scheduler or self._worker
        if half is not None:
            half.failed(hook, f"{type(error).__name__}: {error}")

    def _show(self) -> None:
        """Keeps the stats page up to date; its failure is no hook's."""
        self._safely("write_stats", lambda: self.scheduler.write_stats(), _nothing)

    # -- scheduler side ----------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Lets a reset see whether the engine's own prefix cache was emptied with it."""
        self._safely("bind_gpu_block_pool", lambda: self.scheduler.bind(gpu_block_pool), _nothing)

    def has_pending_push_work(self) -> bool:
        """The engine steps on while blocks come to the device that no request waits for."""
        return self._safely(
            "has_pending_push_work", lambda: self.scheduler.has_early_loads(), lambda: False
        )

    def on_new_request(self, request: Request) -> None:
        """Reads the request's kvmem wishes."""
        self._safely("on_new_request", lambda: self.scheduler.on_new_request(request), _nothing)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that will be loaded beyond the engine's own hit; always asynchronously."""

        def otherwise() -> tuple[int, bool]:
            self._safely(
                "get_num_new_matched_tokens", lambda: self.scheduler.unmatched(request), _nothing
            )
            return 0, False

        return self._safely(
            "get_num_new_matched_tokens",
            lambda: self.scheduler.match(request, num_computed_tokens),
            otherwise,
        )

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plans the load that was promised."""
        self._safely(
            "update_state_after_alloc",
            lambda: self.scheduler.allocated(request, blocks, num_external_tokens),
            lambda: self.scheduler.break_load(request, blocks, num_external_tokens),
        )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The step's orders to the worker half."""

        def otherwise() -> Orders:
            self.scheduler.break_new_loads()
            return self.scheduler.bare_orders(scheduler_output)

        orders = self._safely(
            "build_connector_meta",
            lambda: self.scheduler.orders(scheduler_output),
            otherwise,
            Orders(0, ""),
        )
        over = self._safely("build_connector_meta", lambda: self.scheduler.sent_out(), list)
        self._safely("build_connector_meta", lambda: self.scheduler.forget(over), _nothing)
        return orders

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Takes in what the worker half did."""
        acks = connector_output.kv_connector_worker_meta
        received = connector_output.finished_recving or ()
        refused = getattr(connector_output, "failed_recving", ())  # since 0.30
        # By itself: whatever else fails, blocks that were taken early go back to the engine.
        self._safely("update_connector_output", lambda: self.scheduler.came_early(acks), _nothing)
        self._safely(
            "update_connector_output",
            lambda: self.scheduler.acknowledged(acks if isinstance(acks, Acks) else None),
            _nothing,
        )
        self._safely("update_connector_output", lambda: self.scheduler.refused(refused), _nothing)

        def otherwise() -> None:  # it is said once only, and an ended request must lose its lease
            self._safely(
                "update_connector_output", lambda: self.scheduler.let_go(received), _nothing
            )

        self._safely(
            "update_connector_output", lambda: self.scheduler.received(received), otherwise
        )
        self._show()

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same where the engine has one group and asks the old way."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks are needed for one more copy, and the request's receipt."""

        def otherwise() -> tuple[bool, dict[str, Any] | None]:
            over = (request.request_id,)
            self._safely("request_finished", lambda: self.scheduler.forget(over), _nothing)
            return False, None

        answer = self._safely(
            "request_finished", lambda: self.scheduler.finished(request, block_ids), otherwise
        )
        self._show()  # the engine may have nothing more to do for a long time
        return answer

    def reset_cache(self) -> bool | None:
        """Nothing that was stored answers any more."""
        done = self._safely("reset_cache", lambda: self.scheduler.reset(), lambda: False)
        self._show()
        return done

    def get_kv_connector_stats(self) -> Any:
        """What changed since vLLM asked last; the scheduler's half knows what the workers did."""
        if self._scheduler is None:
            return None
        return self._safely("get_kv_connector_stats", lambda: self.scheduler.take_stats(), _nothing)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """The same, where vLLM has carried it to another process."""
        from kvmem.engines.vllm.stats import KvmemStats

        return KvmemStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        """kvmem's metrics beside vLLM's own, in its /metrics."""
        try:
            from kvmem.engines.vllm.stats import KvmemPromMetrics

            return KvmemPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        except Exception:  # vLLM's own server starts without kvmem's figures (I9)
            log.exception("kvmem: vLLM's /metrics go without kvmem's")
            return None

    # -- worker side -------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Notes where the engine's blocks lie; refuses a layout it can't move, at start."""
        with refusal.reported():
            self.worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Runs before the forward: the step's loads start here, beside it."""
        self._begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Starts the step's loads where `handle_preemptions` was not called."""
        self._begin(self._connector_metadata)

    def _begin(self, orders: KVConnectorMetadata | None) -> None:
        if isinstance(orders, Orders):
            self._safely(
                "start_load_kv",
                lambda: self.worker.begin(orders),
                lambda: self.worker.fail_loads(orders),
            )

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are between steps: there is nothing to wait for inside one."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Blocks are saved whole, after the step."""

    def wait_for_save(self) -> None:
        """Copies the blocks that this step completed."""
        orders = self._connector_metadata
        if isinstance(orders, Orders):
            self._safely(
                "wait_for_save",
                lambda: self.worker.store(orders),
                lambda: self.worker.fail_stores(orders),
            )
            self._safely("compare", lambda: self.worker.compare(orders), _nothing)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """The same, with the loads that failed as a whole; asked by vLLM since 0.30."""
        sent, received = self._results()
        failed = self._safely(
            "get_transfer_results",
            lambda: self.worker.failed_requests(),
            lambda: set(received),  # I5: nothing that may have failed passes for loaded
        )
        self.worker.told_results()
        return base.KVConnectorTransferResults(
            finished_sending=sent, finished_recving=received, failed_recving=failed & received
        )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose kept blocks were copied, and requests whose load is over."""
        results = self._results()
        self.worker.told_results()
        return results

    def _results(self) -> tuple[set[str], set[str]]:
        orders = self._connector_metadata if isinstance(self._connector_metadata, Orders) else None
        return self._safely(
            "get_finished",
            lambda: self.worker.results(orders),
            lambda: self.worker.surrender(),
            (set(), set()),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that the engine must compute after all.

        An empty answer in place of a failure would pass unloaded blocks off as loaded (I5), so
        the other way out names them all the same.
        """
        failed = self._safely(
            "get_block_ids_with_load_errors",
            lambda: self.worker.failed_blocks(),
            lambda: set(self.worker.bad_blocks),
        )
        self.worker.told_failed_blocks()
        return failed

    def build_connector_worker_meta(self) -> Acks | None:
        """What the worker half did, for the scheduler half."""
        return self._safely("build_connector_worker_meta", lambda: self.worker.acks(), lambda: None)

    def shutdown(self) -> None:
        """Unmaps the arena; the scheduler's half removes it."""
        half = self._scheduler if self._scheduler is not None else self._worker
        if half is not None:
            self._safely("shutdown", half.close, _nothing)
            self._scheduler = self._worker = None


def _nothing() -> None:
    return None
