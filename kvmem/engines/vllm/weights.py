"""Weights that change in a running engine: what was computed before answers no prompt after.

Weights come new through calls to vLLM's `EngineCore`: `collective_rpc` (update_weights,
reload_weights, apply_model and whatever a worker extension adds), `sleep` at level 2, and for an
adapter `add_lora` with load_inplace, or any loading of it after its files have changed. `Live`
watches these calls, in the process of the scheduler and on its thread: no request is scheduled
while one runs. A step that is in flight (asynchronous scheduling) was sent to the workers before,
so they compute it before. After such a call

- kvmem's keys hold a new epoch, a random number (the content of new weights is not known), or the
  adapter's new content: what was stored is not found, and what was being stored is not published;
- the engine's own prefix cache is empty, also of blocks in use;
- requests that have begun go on, as they do without kvmem, over KV of both weights. Nothing of
  theirs is stored, and their block hashes become random numbers: nobody finds their blocks on the
  device either;
- requests that had KV loaded and have not begun are looked up anew.
"""

from __future__ import annotations

import functools
import logging
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kvmem.engines.vllm import watch
from kvmem.engines.vllm.adapters import Adapters, Held, held_by
from kvmem.errors import UnsupportedEngine

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

    from kvmem.engines.vllm.scheduler import SchedulerHalf
    from kvmem.engines.vllm.seen import Seen

__all__ = ["HARMLESS", "Live", "empty", "poison", "tweak_of"]

log = logging.getLogger("kvmem")

EPOCH_BYTES = 16
APPROXIMATE = b"kvmem.approximate"  # in the keys of blocks that may be it
MAX_NAMES = 1 << 12
# Methods of vLLM's workers (vllm/v1/worker) that leave weights as they are. Any other name, and
# every function that is sent to the workers, counts as a change.
HARMLESS = frozenset(
    {
        "annotate_profile",
        "check_health",
        "compute_weight_checksums",
        "determine_available_memory",
        "execute_dummy_batch",
        "get_cache_block_size_bytes",
        "get_compilation_match_table",
        "get_encoder_timing_stats",
        "get_kv_cache_spec",
        "get_kv_connector_handshake_metadata",
        "get_model_inspection",
        "get_supported_kv_cache_layouts",
        "get_supported_tasks",
        "list_loras",
        "profile",
        "release_late_interaction_query_cache",
        "reset_encoder_cache",
        "reset_mm_cache",
        "save_sharded_state",
        "save_tensorized_model",
        "supports_draft_weight_updates",
        "synchronize_device",
        "take_draft_token_ids",
        "update_max_model_len",
    }
)
ADAPTER_CALLS = ("add_lora", "remove_lora", "pin_lora")
# Level 1 of sleep keeps the weights in host memory; level 2 lets go of them.
WEIGHTS_LOST_LEVEL = 2


class Live:
    """What the KV of one engine depends on while it runs: its weights' epoch, its adapters.

    One thread calls it, the engine's scheduler. `close()` ends the watch.

    Raises:
        UnsupportedEngine: a vLLM whose live weights can't be watched.
    """

    def __init__(self, half: SchedulerHalf, vllm_config: VllmConfig) -> None:
        lora = vllm_config.lora_config
        self.epoch = b""
        self._half = half
        self._adapters: Adapters | None = None
        if lora is not None:
            facts = f"lora_dtype {lora.lora_dtype}"
            self._adapters = Adapters(vllm_config.parallel_config.world_size, facts)
        # By the engine's own name for an adapter: the content of its blocks on the device.
        self._on_device: dict[Any, bytes] = {}
        self._scheduler: weakref.ref[Any] | None = None
        self._watched: list[tuple[type, str]] = []
        self._watch()

    def _watch(self) -> None:
        from vllm.v1.engine.core import EngineCore

        for name, around in _AROUND.items():
            if not watch.wrap(EngineCore, name, around):
                self.close()
                raise UnsupportedEngine(
                    f"kvmem cannot see when the weights of this vLLM change: no EngineCore.{name}",
                    next_step="Start vLLM without kvmem.",
                    feature="live weights",
                )
            self._watched.append((EngineCore, name))

    def close(self) -> None:
        """Ends the watch; asked twice, it does nothing more."""
        while self._watched:
            watch.unwrap(*self._watched.pop())

    # -- a request is looked up --------------------------------------------------------------

    def admit(self, seen: Seen, start: int) -> bool:
        """Settles `seen.adapter` and the keys' `tweak`, what the request's KV depends on beside its
        tokens and salt: that it may be approximate is in its keys too, for an engine of another
        `approximate_salt` may read the same disk (I10).

        False: the engine's own hit of `start` blocks may be on KV of an adapter's former content.
        The engine's cache is empty now; the request must be looked up again.
        """
        lora = seen.request.lora_request
        seen.adapter = b""
        if lora is not None and self._adapters is not None:
            seen.adapter = self._adapters.content(lora)
        seen.keys.tweak = tweak_of(self.epoch, seen.adapter, approximate=seen.approximate)
        return not seen.adapter or self._is_on_device(seen) or start == 0

    def _is_on_device(self, seen: Seen) -> bool:
        """Whether what the engine has under its own name for an adapter is of this content."""
        name = _engines_name(seen.request)
        had = self._on_device.get(name)
        if had is None or had == seen.adapter:
            if len(self._on_device) >= MAX_NAMES:
                self.empty_device()
            self._on_device[name] = seen.adapter
            return True
        # Others of that name run on, with the former content: their blocks to come would be found
        # under the same hashes.
        others = (
            other
            for other in list(self._half._seen.values())
            if other.adapter not in (b"", seen.adapter) and _engines_name(other.request) == name
        )
        hidden = [self._outdate(other) for other in others]
        if not (self.empty_device() and all(hidden)):
            self._half._was_reset = True
        self._on_device[name] = seen.adapter
        return False

    # -- something changes -------------------------------------------------------------------

    def weights_changed(self, reason: str) -> None:
        """All weights may be others than before, from here on; see the module."""
        self.apart()  # first: it can't fail
        log.info("kvmem: %s: what was stored is for other weights", reason)
        self._half.cache.drop("weights")
        hidden = [self._outdate(seen) for seen in list(self._half._seen.values())]
        emptied = self.empty_device()
        # Where something of the old weights can still be found there, nothing is stored on top.
        self._half._was_reset = not (emptied and all(hidden))

    def apart(self) -> None:
        """From here on what this engine stores and finds is under keys that no other engine has:
        it was told not to believe what was stored, and what others store may be alike."""
        self.epoch = secrets.token_bytes(EPOCH_BYTES)

    def adapters_told(self, states: Iterable[Held], reloaded: int | None = None) -> None:
        """Takes in what the workers say that they hold.

        Args:
            states: of any of the workers.
            reloaded: the adapter that was loaded between steps, on purpose.
        """
        if self._adapters is None:
            return
        wrong = self._adapters.told(states, reloaded=reloaded)
        if wrong:
            # Also of requests that are over: it is not known any more which of the blocks that
            # are being stored are theirs.
            self._half.cache.drop("adapter")
        hidden = []
        for seen in list(self._half._seen.values()):
            lora = seen.request.lora_request
            now = self._adapters.now(lora) if lora is not None else None
            if seen.adapter and now is not None and now != seen.adapter:
                hidden.append(self._outdate(seen))
        if wrong or hidden:
            log.info("kvmem: an adapter has new content; %d requests had the former", len(hidden))
            if not (self.empty_device() and all(hidden)):
                self._half._was_reset = True

    def ask(self, core: Any, reloaded: int | None = None) -> None:
        """Asks the workers which adapters they hold, after a call that may have changed that."""
        if self._adapters is None:
            return
        states = core.model_executor.collective_rpc(held_by)
        self.adapters_told([state for state in states if state is not None], reloaded)

    def meet(self, core: Any) -> None:
        """Learns which scheduler asks for its requests."""
        if self._scheduler is None:
            self._scheduler = weakref.ref(core.scheduler)

    def safely(self, where: str, do: Callable[[], None]) -> None:
        """A door: what fails here neither fails the engine's call nor passes for done (I9)."""
        try:
            do()
        except Exception as error:  # I9: the engine goes on; I5: nothing from before is believed
            log.exception("kvmem: %s failed; what is stored counts as outdated", where)
            self.epoch = secrets.token_bytes(EPOCH_BYTES)
            if self._adapters is not None:
                self._adapters.lose()
            for seen in self._half._seen.values():
                seen.stale = True
            self._half._was_reset = True
            self._half.failed(where, f"{type(error).__name__}: {error}")

    # -- what is there -----------------------------------------------------------------------

    def _outdate(self, seen: Seen) -> bool:
        """The request is not of the weights of now, unless it starts from nothing.

        False: other requests may yet find its blocks in the engine's own cache.
        """
        request = seen.request
        waits = request.status.name in ("WAITING", "WAITING_FOR_REMOTE_KVS", "PREEMPTED")
        loading = request.status.name == "WAITING_FOR_REMOTE_KVS"
        if not seen.finished and not loading and request.num_computed_tokens == 0:
            return True
        session = getattr(request, "resumable", False)  # waits between its turns, its KV in place
        if waits and not session and self._restart(request):
            return True
        seen.stale = True
        return poison(request)

    def _restart(self, request: Request) -> bool:
        """Has a request that was given KV, and has not begun, looked up anew.

        As vLLM does where a load has failed (vllm/v1/core/sched/scheduler.py,
        `_handle_failed_recving` and `_update_waiting_for_remote_kv`).
        """
        scheduler = self._scheduler() if self._scheduler is not None else None
        failed = getattr(scheduler, "failed_recving_kv_req_ids", None)
        if scheduler is None or failed is None:
            return False
        if request.status.name == "WAITING_FOR_REMOTE_KVS":
            failed.add(request.request_id)  # its blocks go back when the load is over
        else:
            scheduler.kv_cache_manager.free(request)
        request.num_computed_tokens = 0
        return True

    @property
    def manager(self) -> Any:
        """The engine's own KV cache manager; None before its first request."""
        scheduler = self._scheduler() if self._scheduler is not None else None
        return getattr(scheduler, "kv_cache_manager", None)

    def empty_device(self) -> bool:
        """Whether the engine's own prefix cache is empty now."""
        self._on_device.clear()
        pool: BlockPool | None = self._half._device_pool
        if pool is None:  # before 0.30
            pool = getattr(self.manager, "block_pool", None)
        return pool is not None and empty(pool)


def tweak_of(epoch: bytes, adapter: bytes, *, approximate: bool) -> bytes:
    """What is in the keys of blocks beside their tokens and their salt."""
    return epoch + adapter + (APPROXIMATE if approximate else b"")


def empty(pool: BlockPool) -> bool:
    """Whether vLLM's own prefix cache finds nothing any more, whoever uses its blocks.

    Costs a look at each device block where requests run.
    """
    if not len(pool.cached_block_hash_to_block):
        return True
    if pool.get_num_free_blocks() + 1 == pool.num_gpu_blocks:  # one is never free
        return bool(pool.reset_prefix_cache())
    evict = getattr(pool, "evict_blocks", None)
    if evict is not None:
        evict({block.block_id for block in pool.blocks if block.block_hash is not None})
    return not len(pool.cached_block_hash_to_block)


class _Random:
    """A hasher of blocks that nobody shares."""

    def __init__(self, hasher: Callable[[Request], list[Any]]) -> None:
        self.hasher = hasher

    def __call__(self, request: Request) -> list[Any]:
        return [secrets.token_bytes(len(key)) for key in self.hasher(request)]


def poison(request: Request) -> bool:
    """No other request finds a block of this one under its hash from now on.

    The hashes that it has become random numbers, and so do those of its tokens to come. False:
    this vLLM keeps its hasher elsewhere.
    """
    hasher = getattr(request, "_block_hasher", None)
    if hasher is None:
        return not request.block_hashes
    if not isinstance(hasher, _Random):
        request._block_hasher = _Random(hasher)
        keys: list[Any] = request.block_hashes
        keys[:] = [secrets.token_bytes(len(key)) for key in keys]
    return True


def _engines_name(request: Request) -> Any:
    """What stands for the request's adapter in the engine's own block hashes."""
    from vllm.v1.core import kv_cache_utils

    keys_of = getattr(kv_cache_utils, "_gen_lora_extra_hash_keys", None)
    lora = request.lora_request
    if keys_of is not None:
        return tuple(keys_of(request))
    return lora and (lora.lora_name,)  # coarser is right too


# -- around the engine's calls -------------------------------------------------------------------


def _lives(core: Any) -> Iterator[Live]:
    """The `Live` of this engine core's own connector, or of those in its MultiConnector."""
    connector = getattr(getattr(core, "scheduler", None), "connector", None)
    for one in (connector, *getattr(connector, "_connectors", ())):
        live = getattr(getattr(one, "_scheduler", None), "live", None)
        if isinstance(live, Live):
            yield live


def _each(core: Any, where: str, do: Callable[[Live], None]) -> None:
    for live in _lives(core):
        live.safely(where, functools.partial(do, live))


def _around_change(core: Any, call: Callable[[], Any], what: str) -> Any:
    """Before it: nothing that is granted from here on is of the old weights. After it: nothing
    that was granted meanwhile is, even where the call failed half-way."""
    _each(core, "weights_changed", lambda live: live.weights_changed(what))
    try:
        return call()
    finally:
        _each(core, "weights_changed", lambda live: live.weights_changed(what))
        _each(core, "adapters_told", lambda live: live.ask(core))


def _around_rpc(
    core: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    method = kwargs.get("method", args[0] if args else None)
    if isinstance(method, str) and method in HARMLESS:
        return call(*args, **kwargs)
    if isinstance(method, str) and method in ADAPTER_CALLS:
        its_args = kwargs.get("args", args[2] if len(args) > 2 else ())
        its_kwargs = kwargs.get("kwargs", args[3] if len(args) > 3 else None) or {}
        return _around_adapter(core, lambda *_, **__: call(*args, **kwargs), its_args, its_kwargs)
    name = method if isinstance(method, str) else getattr(method, "__name__", "a function")
    return _around_change(core, lambda: call(*args, **kwargs), f"collective_rpc({name})")


def _around_adapter(
    core: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    which = args[0] if args else next(iter(kwargs.values()), None)
    reloaded = getattr(which, "lora_int_id", which if isinstance(which, int) else None)
    try:
        return call(*args, **kwargs)
    finally:
        _each(core, "adapters_told", lambda live: live.ask(core, reloaded))


def _around_sleep(
    core: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    level = kwargs.get("level", args[0] if args else 1)
    if level < WEIGHTS_LOST_LEVEL:
        return call(*args, **kwargs)
    return _around_change(core, lambda: call(*args, **kwargs), f"sleep({level})")


def _around_request(
    core: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    _each(core, "meet", lambda live: live.meet(core))
    return call(*args, **kwargs)


_AROUND: dict[str, watch.Around] = {
    "add_lora": _around_adapter,
    "add_request": _around_request,
    "collective_rpc": _around_rpc,
    "remove_lora": _around_adapter,
    "sleep": _around_sleep,
}
