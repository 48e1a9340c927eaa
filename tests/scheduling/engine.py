"""vLLM's own schedulers and both halves of the connector around a forward without a model.

`Engine.step()` is what EngineCore does in one turn of its loop: `step`, or, with asynchronous
scheduling, `step_with_batch_queue` (vllm/v1/engine/core.py), where the next step is scheduled
before the last one's output is taken in. A scheduled step runs at once (`eager`) or only when its
output is waited for; a real executor does either. Loads run on a stand-in for the worker's thread,
in the test's hands: held, they are in flight for certain.
"""

from __future__ import annotations

import inspect
import itertools
import json
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmem._core import xxh3_64
from kvmem.engines.vllm.keys import Chains
from kvmem.explain.misses.reasons import NAMES
from kvmem.store.layout import DATA_ALIGN, DESCRIPTOR_BYTES, SLOT_ALIGN, slots_within
from tests.scheduling.core import core_of
from tests.scheduling.forward import (
    BLOCK,
    CELL_BYTES,
    HASH_BYTES,
    Forward,
    WrongKVError,
    digests,
    kv_of,
    reply,
)

__all__ = ["MAX_TOKENS", "STOP", "Engine", "InjectedError", "Loads", "make_config", "running"]

LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
N_DEVICE = 19  # for each group; one of all is vLLM's null block
WINDOW = 40
CHUNK = 3 * BLOCK
# What an engine's KV-cache groups are, and the tokens of their blocks.
GROUPS = {
    "full": [("full", BLOCK)],
    "hybrid": [("full", BLOCK), ("window", BLOCK), ("states", BLOCK)],
    "windows": [("window", 2 * BLOCK), ("full", BLOCK)],
    "chunks": [("chunk", BLOCK), ("full", BLOCK)],
}
N_HOST = 20
MAX_TOKENS = 256
STOP = 1003  # one of the tokens that the forward samples
DRAIN_STEPS = 3000

Hook = tuple[str, str]


class InjectedError(Exception):
    """What a hook that a test breaks raises."""


def make_config(folder: Path) -> Any:
    """vLLM's configuration for a model that has a shape and no weights."""
    from vllm.engine.arg_utils import EngineArgs

    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": len(LAYERS),
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        block_size=BLOCK,
        max_model_len=MAX_TOKENS,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        enforce_eager=True,
        kv_transfer_config={
            "kv_connector": "KvmemConnector",
            "kv_connector_module_path": "kvmem.engines.vllm.connector",
            "kv_role": "kv_both",
        },
    ).create_engine_config()


def host_gb_of(n_slots: int, groups: str) -> float:
    """The setting that makes room for exactly so many blocks."""
    slot_bytes = max(tokens for _, tokens in GROUPS[groups]) * CELL_BYTES * len(LAYERS)
    each = -(-slot_bytes // SLOT_ALIGN) * SLOT_ALIGN + DESCRIPTOR_BYTES
    n_bytes = 2 * DATA_ALIGN
    n_bytes += (n_slots - slots_within(n_bytes, slot_bytes)) * each
    assert slots_within(n_bytes, slot_bytes) == n_slots
    return n_bytes / 2**30


class Loads:
    """Stands for the thread that loads: what is submitted runs at once, or when told."""

    def __init__(self) -> None:
        self.hold = False
        self.held: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, do: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.held.append((future, do, args))
        if not self.hold:
            self.run()
        return future

    def run(self, n: int | None = None) -> None:
        """The thread ends its next `n` loads, or all."""
        for _ in range(len(self.held) if n is None else min(n, len(self.held))):
            future, do, args = self.held.popleft()
            try:
                future.set_result(do(*args))
            except Exception as error:
                future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.held.clear()


def _specs(groups: str) -> list[Any]:
    import torch
    from vllm.v1 import kv_cache_interface as kv

    def attention(kind: Any, tokens: int, **more: Any) -> Any:
        head_size = CELL_BYTES // 4
        spec = kind(
            block_size=tokens, num_kv_heads=1, head_size=head_size, dtype=torch.bfloat16, **more
        )
        assert spec.page_size_bytes == tokens * CELL_BYTES
        return spec

    made = []
    for kind, tokens in GROUPS[groups]:
        if kind == "full":
            made.append(attention(kv.FullAttentionSpec, tokens))
        elif kind == "window":
            made.append(attention(kv.SlidingWindowSpec, tokens, sliding_window=WINDOW))
        elif kind == "chunk":
            made.append(attention(kv.ChunkedLocalAttentionSpec, tokens, attention_chunk_size=CHUNK))
        else:
            made.append(
                kv.MambaSpec(
                    block_size=tokens,
                    shapes=((tokens * CELL_BYTES,),),
                    dtypes=(torch.uint8,),
                    mamba_cache_mode="align",
                )
            )
    return made


class Turn(dict):
    """A finished request: tokens, finish_reason, receipt, stats, as the front end gets them."""

    __getattr__ = dict.__getitem__


class Engine:
    """See the module. `config` is of `make_config`; one engine at a time may use it."""

    def __init__(
        self,
        config: Any,
        *,
        asynchronous: bool,
        arena: str,
        n_host: int = N_HOST,
        thread: bool = False,
        groups: str = "full",
        **settings: Any,
    ) -> None:
        import torch
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        self.asynchronous = asynchronous
        config.scheduler_config.async_scheduling = asynchronous  # the platform turns it off
        specs = _specs(groups)
        self.n_device = 1 + (N_DEVICE - 1) * len(specs)
        config.cache_config.num_gpu_blocks = self.n_device
        states = groups == "hybrid"
        config.cache_config.mamba_cache_mode = "align" if states else "none"
        config.kv_transfer_config.kv_connector_extra_config = {
            "host_gb": host_gb_of(n_host, groups),
            "weights_digest": "0" * 64,
            "arena": arena,
            # A test that damages a slot says who is to find it.
            "scrub_mb_s": 0,
            "shadow_share": 0.0,
            **settings,
        }
        names = [[f"{name}.{group}" for name in LAYERS] for group in range(len(specs))]
        told = {"hash_block_size": BLOCK}  # from 0.32 on
        kv = KVCacheConfig(
            num_blocks=self.n_device,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec(layers, spec) for layers, spec in zip(names, specs, strict=True)
            ],
            **{k: v for k, v in told.items() if k in KVCacheConfig.__dataclass_fields__},
        )
        scheduler = config.scheduler_config.get_scheduler_cls()
        assert scheduler.__name__ == ("AsyncScheduler" if asynchronous else "Scheduler")
        self.scheduler = scheduler(
            vllm_config=config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(config),
            block_size=max(spec.block_size for spec in specs),
            hash_block_size=BLOCK,
            log_stats=True,
        )
        self.core = core_of(self)
        self.worker = KVConnectorFactory.create_connector(
            config=config, role=KVConnectorRole.WORKER, kv_cache_config=kv
        )
        caches: dict[str, Any] = {}
        views: list[list[np.ndarray]] = []
        for layers, spec in zip(names, specs, strict=True):
            tensors = [
                torch.zeros((self.n_device, spec.block_size, CELL_BYTES), dtype=torch.uint8)
                for _ in layers
            ]
            views.append([tensor.numpy() for tensor in tensors])
            for name, tensor in zip(layers, tensors, strict=True):
                has_states = type(spec).__name__ == "MambaSpec"
                caches[name] = [tensor.view(self.n_device, -1)] if has_states else tensor
        self.worker.register_kv_caches(caches)
        self.loads = Loads()
        if not thread:
            self.worker.worker._pool.shutdown()
            self.worker.worker._pool = self.loads
            self._surrender_ends()
        self.forward = Forward(self.half.geometry.shapes, views, asynchronous=asynchronous)
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(BLOCK, hash_fn)
        self.queue: deque[list[Any]] = deque()  # [output, its result or None], oldest first
        self.eager = True
        self.check_stores = True
        self.faulted = False
        self.turns: dict[str, Turn] = {}
        self.kept: list[str] = []  # requests whose blocks were kept for one more copy
        self.preemptions = 0
        self._wanted: dict[str, list[int]] = {}
        self.meanwhile: list[Callable[[], Any]] = []  # done while the next step is under way
        self._broken: list[Callable[[], None]] = []
        self._contents: dict[bytes, list[bytes]] = {}  # by block key, the digests of its cells
        self._ordered: dict[int, Any] = {}  # stores by the orders' number
        self._numbers = itertools.count()

    def _surrender_ends(self) -> None:
        """`surrender` waits for the loads under way; the thread would end them meanwhile."""
        half = self.worker.worker
        real = half.surrender

        def surrender() -> Any:
            self.loads.run()
            return real()

        half.surrender = surrender

    @property
    def half(self) -> Any:
        return self.scheduler.connector.scheduler

    @property
    def arena(self) -> Any:
        """Where blocks lie: this engine's, or its node's as its worker has it mapped."""
        node = self.half.config.node is not None
        return self.worker.worker._arena if node else self.half.arena

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    # -- what a client does ------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        n_tokens: int = 1,
        *,
        kvmem: dict[str, Any] | None = None,
        salt: str | None = None,
        session: str | None = None,
        stop: bool = False,
        skip_reading: bool | None = None,
    ) -> str:
        """A new request; the answer is its id."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        assert len(prompt) + n_tokens <= MAX_TOKENS
        if session is not None and "session_id" not in inspect.signature(Request).parameters:
            pytest.skip("this vLLM knows no sessions")
        sampling = SamplingParams(
            max_tokens=n_tokens,
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=[STOP] if stop else None,
            skip_reading_prefix_cache=skip_reading,
            extra_args={"kv_transfer_params": {"kvmem": kvmem}} if kvmem is not None else None,
        )
        sampling.update_from_generation_config({}, None)
        request = Request(
            request_id=f"r{next(self._numbers)}",
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            cache_salt=salt,
            block_hasher=self._hasher,
            **({"session_id": session} if session is not None else {}),
        )
        i = request.request_id
        self.turns[i] = Turn(
            prompt=list(prompt), salt=salt, tokens=[], finish_reason=None, receipt=None, stats=None
        )
        self._wanted[i] = reply(prompt, n_tokens, salt, STOP if stop else None)
        self.forward.salts[i] = salt
        self.core.add_request(request)
        return i

    def abort(self, request_id: str) -> None:
        """The client has gone."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ABORTED)

    def live(self) -> list[str]:
        """Requests that have not ended."""
        return [i for i, r in self.scheduler.requests.items() if not r.is_finished()]

    def generate(self, prompt: list[int], n_tokens: int = 1, **options: Any) -> Turn:
        """One request to its end; then the engine holds nothing of it."""
        i = self.add(prompt, n_tokens, **options)
        self.drain()
        return self.turns[i]

    def forget_device(self) -> bool:
        """Empties the engine's own prefix cache and nothing else."""
        return bool(self.scheduler.reset_prefix_cache(reset_connector=False))

    def new_weights(self) -> None:
        """A trainer's update, in a running engine."""
        self.core.collective_rpc("update_weights", kwargs={"update_info": {}})

    def reset_connector(self) -> bool:
        """As after a change of weights: what was stored must not answer any more."""
        done = bool(self.scheduler.reset_connector_cache())
        if done:
            self.forward.epoch += 1
        return done

    def reset(self) -> bool:
        """Everything is forgotten, or, while the device is in use, only asked to be: what is on
        the device may then be older than the connector's reset, until it is asked again."""
        done = bool(self.scheduler.reset_prefix_cache(reset_connector=True))
        if done:
            self.forward.epoch += 1
        return done

    # -- what the engine core does -----------------------------------------------------------

    def step(self) -> bool:
        """One turn of the core's loop; False when there was nothing to do."""
        scheduled = None
        if self.scheduler.has_requests():
            scheduled = self._schedule()
            self.queue.append([scheduled, None])
            if self.eager:
                for entry in self.queue:
                    self._execute(entry)
            more = scheduled.total_num_scheduled_tokens > 0 or self.scheduler.has_requests()
            if self.asynchronous and len(self.queue) < 2 and more:
                return True
        elif not self.queue:
            return False
        self.step_out()
        return True

    def step_out(self) -> None:
        """Takes in the output of the oldest step under way."""
        entry = self.queue.popleft()
        self._execute(entry)
        while self.meanwhile:
            self.meanwhile.pop(0)()
        output, result = entry
        self._take(output, self.scheduler.update_from_output(output, result))

    def step_until(self, reached: Callable[[], Any]) -> None:
        """Steps until something has come about; it must."""
        for _ in range(DRAIN_STEPS):
            if reached():
                return
            assert self.step(), "there is nothing more to do"
        raise AssertionError("it does not come about")

    def drain(self) -> None:
        """Steps until all requests have ended and nothing of them is held; loads run."""
        self.loads.hold = False
        self.loads.run()
        for _ in range(DRAIN_STEPS):
            if not self.step():
                return
        raise AssertionError(f"requests are stuck: {self.live()}, {self.scheduler.requests}")

    def _schedule(self) -> Any:
        output = self.scheduler.schedule()
        self.preemptions += len(output.preempted_req_ids or ())
        orders = output.kv_connector_metadata
        self.kept += orders.finished
        self._note_contents()
        for load in orders.loads:
            whole = [part for part in load.parts if part.group == self.forward.whole]
            blocks = [block for part in whole for block in part.block_ids.tolist()]
            self.forward.promised[load.request_id] = (self.forward.epoch, blocks)
        return output

    def _execute(self, entry: list[Any]) -> None:
        """What vLLM's model runner does around a forward, in its order
        (vllm/v1/worker/kv_connector_model_runner_mixin.py)."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output, result = entry
        if result is not None:
            return
        worker, orders = self.worker, pickle.loads(pickle.dumps(output.kv_connector_metadata))
        worker.handle_preemptions(orders)
        worker.bind_connector_metadata(orders)
        sampled = self.forward.run(output)
        worker.start_load_kv(None)
        worker.wait_for_save()
        moved = _moved(worker, output.finished_req_ids)
        acks = worker.build_connector_worker_meta()
        self._check_stored(orders, acks)
        transferred = KVConnectorOutput(
            **moved,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=pickle.loads(pickle.dumps(acks)),
        )
        worker.clear_connector_metadata()
        ids = list(sampled)
        entry[1] = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={i: at for at, i in enumerate(ids)},
            sampled_token_ids=[sampled[i] for i in ids],
            kv_connector_output=transferred,
        )

    def _take(self, output: Any, answers: Any) -> None:
        for answer in (a for outputs in answers.values() for a in outputs.outputs):
            turn, i = self.turns[answer.request_id], answer.request_id
            turn["tokens"] += answer.new_token_ids
            wanted = self._wanted[i]
            assert turn.tokens == wanted[: len(turn.tokens)], f"{i} answered something else"
            if answer.prefill_stats is not None:
                turn["stats"] = answer.prefill_stats
            if answer.finish_reason is not None:
                assert turn.tokens == wanted, f"{i} ended early: {answer.finish_reason}"
                turn["finish_reason"] = str(answer.finish_reason)
                turn["receipt"] = (answer.kv_transfer_params or {}).get("kvmem")
                self._check_receipt(i, turn)

    # -- what must hold ----------------------------------------------------------------------

    def _check_receipt(self, request_id: str, turn: Turn) -> None:
        if self.faulted:  # a broken hook may have kept kvmem from counting
            return
        told = turn.receipt["tokens"]
        assert told["prompt"] == len(turn.prompt)
        here = told["device"] + told["host"] + told["disk"] + told["far"]
        assert told["prompt"] == here + told["computed"], told
        start = self.forward.first_start[request_id]
        assert here == start, (told, start)
        self._check_misses(turn)

    def _check_misses(self, turn: Turn) -> None:
        """Every token that was computed has one reason."""
        told, runs = turn.receipt["tokens"], turn.receipt["misses"]
        at = told["prompt"] - told["computed"]
        for run in runs:
            assert run["reason"] in NAMES
            assert run["first"] == at, (told, runs)
            assert run["tokens"] > 0
            at += run["tokens"]
        assert at == told["prompt"], (told, runs)

    def _note_contents(self) -> None:
        """What the blocks of all requests stand for."""
        geometry = self.half.geometry
        for request in self.scheduler.requests.values():
            salt = self.turns[request.request_id].salt
            seen = self.half.seen(request.request_id)
            chains = Chains(request.block_hashes, geometry.shapes, geometry.hash_tokens)
            if seen is not None:
                chains.tweak = seen.keys.tweak
            chain: list[bytes] = []
            for shape, keys in zip(geometry.shapes, chains.all(), strict=True):
                for at, key in enumerate(keys):
                    if bytes(key) in self._contents:
                        continue
                    chain = chain or digests(request.all_token_ids, salt)
                    stop = (at + 1) * shape.block_tokens
                    first = stop - (1 if shape.reach_tokens == 1 else shape.block_tokens)
                    self._contents[bytes(key)] = chain[first:stop]

    def _check_stored(self, orders: Any, acks: Any) -> None:
        """Slots that the worker's half calls written hold what their keys stand for."""
        if not self.check_stores:
            return
        self._ordered[orders.sequence] = orders.stores
        for done in acks.stores if acks is not None else ():
            for store, status in zip(self._ordered[done.sequence], done.statuses, strict=True):
                for at in np.flatnonzero(status == 0).tolist():
                    self._check_slot(store, at)

    def _check_slot(self, store: Any, at: int) -> None:
        arena, slot = self.arena, int(store.slots[at])
        tokens = self.half.geometry.shapes[store.group].block_tokens
        n_bytes = len(LAYERS) * tokens * CELL_BYTES
        data = np.frombuffer(arena.buffer, np.uint8, n_bytes, arena.data_of(slot))
        wanted = self._contents[store.keys[32 * at : 32 * at + 32]]
        found = data.reshape(len(LAYERS), tokens, CELL_BYTES)[:, : len(wanted), :HASH_BYTES]
        for layer in range(len(LAYERS)):
            if (found[layer] != kv_of(wanted, store.group, layer)).any():
                raise WrongKVError(
                    f"{store.request_id}: slot {slot} was stored from block {store.block_ids[at]}, "
                    "which does not hold its key's KV"
                )

    def check(self) -> None:
        """What holds after every step."""
        assert self.half.cache.check_integrity() == []

    def rest_disk(self) -> None:
        """Until nothing is on its way between host, disk and far store."""
        for _ in range(1000):
            stats = self.half.cache.stats()
            if not any(stats.get(tier, {}).get("under_way") for tier in ("disk", "far")):
                return
            if not stats.get("disk", {}).get("under_way"):
                self.half.cache._far.wait(0.1)  # a cache waits for it where a request does
            self.half.cache.settle(0.1)
        raise AssertionError("moves do not end")

    def assert_settled(self) -> None:
        """Nothing is held of requests that are over, and the counts add up."""
        self.rest_disk()
        stats = self.half.cache.stats()
        assert (stats["pending"], stats["orphaned"], stats["leases"]) == (0, 0, 0), stats
        assert stats["condemned"] == 0, stats
        assert not self.half._seen
        assert not self.half.storing.outstanding
        assert not self.loads.held
        assert self.half.cache.check_integrity() == []
        assert not self.scheduler.requests
        assert self.pool.get_num_free_blocks() == self.n_device - 1
        t = self.half.totals
        here = t.tokens_hit_device + t.tokens_hit_host + t.tokens_hit_disk + t.tokens_hit_far
        assert t.prompt_tokens == here + t.tokens_computed
        if not self.faulted:
            assert t.requests == len(self.turns)
            assert self.half.page.failures == 0, self.half.page.last_failure

    # -- what a test breaks ------------------------------------------------------------------

    def forge(self, slot: int) -> None:
        """Other KV in a slot, with a checksum that holds: as if it had been stored so."""
        arena = self.arena
        data = np.frombuffer(arena.buffer, np.uint8)
        at = arena.data_of(slot)
        descriptor = data[4096 + DESCRIPTOR_BYTES * slot :][:DESCRIPTOR_BYTES]
        length = int(descriptor[16:24].view(np.uint64)[0])
        data[at : at + length] = np.random.default_rng(slot).integers(0, 256, length, np.uint8)
        descriptor[24:32].view(np.uint64)[0] = xxh3_64(data[at : at + length].tobytes())

    def corrupt(self, slot: int, at: int = 5) -> None:
        """Flips one bit of a slot's bytes, behind everybody's back."""
        arena = self.arena
        data = np.frombuffer(arena.buffer, np.uint8, arena.slot_bytes, arena.data_of(slot))
        data[at] ^= 1

    def slots_of(self, prompt: list[int], salt: str | None = None) -> list[int]:
        """The slots that hold a prompt's published blocks."""
        chains = self.chains_of(prompt, salt)
        limit = len(prompt) // BLOCK * BLOCK
        grant = self.half.cache.acquire("test", chains, start=0, limit=limit)
        self.half.cache.release("test")
        return [slot for part in grant.parts for slot in part.slots.tolist()]

    def chains_of(self, prompt: list[int], salt: str | None = None) -> list[list[bytes]]:
        """The prompt's keys in every group."""
        geometry = self.half.geometry
        hashes = self.keys_of(prompt, salt)
        return Chains(hashes, geometry.shapes, geometry.hash_tokens).all()

    def keys_of(self, prompt: list[int], salt: str | None = None) -> list[bytes]:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        return Request(
            request_id="keys",
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            cache_salt=salt,
            block_hasher=self._hasher,
        ).block_hashes

    def target(self, where: str) -> Any:
        """The part of kvmem that a hook's name begins with."""
        return {"half": self.half, "worker": self.worker.worker, "cache": self.half.cache}[where]

    def fail_once(self, hook: Hook, *, after: bool) -> Callable[[], bool]:
        """The hook raises at its next call, before or after its work; the answer tells whether
        it has."""
        target, name = self.target(hook[0]), hook[1]
        real, raised = getattr(target, name), False
        self.faulted = True

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal raised
            raised = True
            setattr(target, name, real)
            if after:
                real(*args, **kwargs)
            raise InjectedError(name)

        setattr(target, name, failing)
        self._broken.append(lambda: setattr(target, name, real))
        return lambda: raised

    def mend(self) -> None:
        """Hooks that were to fail and were not called work again."""
        for mend in reversed(self._broken):
            mend()
        self._broken.clear()

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


def _moved(worker: Any, finished: set[str]) -> dict[str, set[str]]:
    """Transfers that are over, as vLLM's model runner asks for them."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    if not hasattr(base, "KVConnectorTransferResults"):  # before 0.30
        sent, received = worker.get_finished(finished)
        return {"finished_sending": sent, "finished_recving": received}
    moved = worker.get_transfer_results(finished)
    names = ("finished_sending", "finished_recving", "failed_recving")
    return {name: getattr(moved, name) for name in names}


@contextmanager
def running(config: Any, **options: Any) -> Iterator[Engine]:
    """An engine that is closed at the end, whatever happens."""
    engine = Engine(config, **options)
    try:
        yield engine
    finally:
        engine.close()
