"""Prefixes of one model's prompts, kept from call to call and, with a disk, from run to run.

Everything that decides is the engine-independent `Cache`: what is found, what is evicted, what a
damaged block takes with it. Everything that moves bytes is the copier that serves vLLM's workers.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import PreTrainedModel

from kvmem import events
from kvmem.cache import Cache, Part
from kvmem.engines.copiers import copier_for
from kvmem.engines.proving import N_SLOTS, prove
from kvmem.engines.transformers.blocks import BlockCache, Pool, shapes_of
from kvmem.engines.transformers.identity import HASH_ALGORITHM, Weights, namespace_of
from kvmem.errors import CapacityError, ConfigError, KVMemError
from kvmem.hashing import BlockHasher, session_extra_keys
from kvmem.store import Arena, Disk
from kvmem.store.layout import slots_within
from kvmem.store.scratch import Scratch
from kvmem.types import GroupShape

__all__ = ["Generated", "PrefixStore", "Restored"]

ASK_AGAIN_S = 0.02
_numbers = itertools.count()


class Restored(msgspec.Struct, frozen=True):
    """What became of one prompt.

    Args:
        prompt_tokens: of the whole prompt.
        restored_tokens: of them from kvmem, the first ones.
        from_disk_tokens: of those, brought up from the disk for it.
        missing: why not more: "none" where all that can be was, "new" for tokens never kept,
            "evicted", "quarantined", "failed" for a copy that did, "weights" when the model's have
            changed since, "autocast" under that, which makes other numbers, "proof" when blocks did
            not come back right in a trial at the start.
        seconds: looking up, copying and checking.
    """

    prompt_tokens: int
    restored_tokens: int
    from_disk_tokens: int
    missing: str
    seconds: float

    def explain(self) -> str:
        """One line for people."""
        share = self.restored_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        return (
            f"{self.restored_tokens:,} of {self.prompt_tokens:,} prompt tokens restored "
            f"({share:.0%}) in {self.seconds * 1e3:.1f} ms; the rest: {self.missing}"
        )


class Generated(msgspec.Struct, frozen=True):
    """`tokens` [1, n]: prompt and answer, as `model.generate` gives them; `kept_blocks` are new."""

    tokens: Any
    report: Restored
    kept_blocks: int


class PrefixStore:
    """A model's prefixes: in host memory, and on disk below it where `disk_gb` is not 0.

    One thread uses it. The model's weights must stay as they are: a change is seen, and from then
    on nothing is restored or kept. `close` gives the memory back; what is on disk stays.

    Args:
        model: a causal language model of full attention, on a CPU or a CUDA GPU.
        host_gb: host memory for blocks.
        disk_gb: disk for blocks below it; 0 is none.
        disk_path: the folder for them.
        block_tokens: tokens of a block; only whole blocks are kept.
        max_tokens: of one sequence, prompt and answer.
        lanes: sequences that can be open at a time; each takes device memory for max_tokens.
        copy_threads: of a CPU's copier.
        bus: where events go.

    Raises:
        UnsupportedEngine: the model keeps more or less than all its keys and values.
        CapacityError, ConfigError: naming the argument.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        host_gb: float = 1.0,
        disk_gb: float = 0.0,
        disk_path: str = "~/.cache/kvmem/blocks",
        block_tokens: int = 16,
        max_tokens: int = 4096,
        lanes: int = 1,
        copy_threads: int = 0,
        bus: events.Bus | None = None,
    ) -> None:
        for name, value in (
            ("max_tokens", max_tokens), ("lanes", lanes), ("block_tokens", block_tokens),
        ):  # fmt: skip
            if value < 1:
                raise ConfigError(
                    f"{name} cannot be {value}", next_step="Give 1 or more.", setting=name
                )
        self.model = model
        self.bus = bus if bus is not None else events.Bus()
        self._hasher = BlockHasher(HASH_ALGORITHM, block_tokens, "kvmem.transformers")
        self._weights = Weights(model)
        shapes = shapes_of(model)
        self.namespace = namespace_of(
            model, shapes, block_tokens=block_tokens, weights=self._weights.digest()
        )
        self._pool = Pool(
            shapes,
            model.device,
            block_tokens=block_tokens,
            lane_blocks=-(-max_tokens // block_tokens),
            n_lanes=lanes,
        )
        self._arena = self._make_arena(host_gb)
        self._disk: Disk | None = None
        try:
            if disk_gb:
                self._disk = Disk(
                    Path(disk_path).expanduser(), int(disk_gb * 2**30), self._arena,
                    self.namespace.digest, self.bus,
                )  # fmt: skip
            self.cache = Cache(
                self._arena.header.n_slots, [GroupShape(block_tokens)], bus=self.bus,
                mover=self._disk,
            )  # fmt: skip
            self._copier = copier_for(
                model.device,
                np.frombuffer(self._arena.buffer, np.uint8),
                [self._pool.regions],
                self._pool.n_blocks,
                threads=copy_threads or min(4, len(os.sched_getaffinity(0))),
            )
        except BaseException:
            self.close()
            raise
        self._proof = self._prove()
        self._hook = model.register_forward_pre_hook(_feed, with_kwargs=True)

    def _make_arena(self, host_gb: float) -> Arena:
        block_bytes = self._pool.regions.block_bytes
        n_slots = slots_within(int(host_gb * 2**30), block_bytes)
        if n_slots < 1:
            raise CapacityError(
                f"host_gb of {host_gb} holds no block of {block_bytes:,} bytes "
                f"({self._pool.block_tokens} tokens)",
                next_step=f"Set host_gb to at least {(block_bytes + 2**22) / 2**30:.3f}.",
                setting="host_gb",
            )
        return Arena.create(
            f"transformers-{os.getpid()}-{next(_numbers)}",
            n_slots=n_slots,
            slot_bytes=block_bytes,
            namespace=self.namespace.digest,
            label=type(self.model).__name__,
        )

    def _prove(self) -> str:
        """Tries out whether blocks come back as they were; empty, or what is wrong."""
        scratch = Scratch(N_SLOTS, self._pool.regions.block_bytes, 1, bytes(32))
        copier = copier_for(
            self.model.device, scratch.buffer, [self._pool.regions], self._pool.n_blocks
        )
        error = prove([self._pool.blocks()], self._pool.n_blocks, copier)
        self.bus.emit(events.Proof(tier="host", error=error))
        return error

    # -- use ---------------------------------------------------------------------------------

    def generate(self, input_ids: Any, *, salt: str | None = None, **kwargs: Any) -> Generated:
        """`model.generate` on one prompt, its known prefix restored and all of it kept.

        Args:
            input_ids: token ids: a tensor [1, n] or [n], or a list.
            salt: prompts of one salt see nothing of another's (I11).
            kwargs: for `model.generate`.
        """
        ids = torch.as_tensor(input_ids, device=self.model.device).reshape(1, -1)
        with self.open(ids, salt=salt) as cache:
            kwargs.setdefault("attention_mask", torch.ones_like(ids))
            generate: Any = self.model.generate
            tokens = generate(ids, past_key_values=cache, **kwargs)
            kept = cache.keep()
            return Generated(tokens, cache.report, kept)

    def open(self, input_ids: Any, *, salt: str | None = None) -> BlockCache:
        """A cache that holds the longest known prefix of the prompt, but for its last token.

        The caller's until its `close`; it takes a lane. `cache.report` says what was restored.

        Raises:
            CapacityError: no lane is free.
        """
        ids = [int(i) for i in torch.as_tensor(input_ids).reshape(-1).tolist()]
        name = f"sequence-{next(_numbers)}"
        cache = BlockCache(
            self._pool, lambda its: self._keep(its, name, salt), lambda _: self.cache.release(name)
        )
        begin = time.perf_counter()
        try:
            n_tokens, from_disk, missing = self._restore(cache, name, ids, salt)
        except BaseException:
            cache.close()
            raise
        seconds = time.perf_counter() - begin
        cache.report = Restored(len(ids), n_tokens, from_disk, missing, seconds)
        return cache

    def _keys(self, tokens: Sequence[int], salt: str | None) -> list[bytes]:
        if not salt:
            return self._hasher.hash_blocks(list(tokens))
        first = session_extra_keys(cache_salt=salt)["first_extra_keys"]
        n_blocks = len(tokens) // self._hasher.block_tokens
        extra = [first, *[None] * (n_blocks - 1)] if n_blocks else []
        return self._hasher.hash_blocks(list(tokens), extra_keys=extra)

    def _restore(
        self, cache: BlockCache, name: str, ids: list[int], salt: str | None
    ) -> tuple[int, int, str]:
        if self._proof:
            return 0, 0, "proof"
        if self._weights.changed():
            return 0, 0, "weights"
        if torch.is_autocast_enabled(self.model.device.type):
            return 0, 0, "autocast"
        limit = min(len(ids) - 1, self._pool.lane_blocks * self._pool.block_tokens)
        if limit < self._pool.block_tokens:
            return 0, 0, "new"
        chains = [self._keys(ids, salt)]
        grant = self.cache.acquire(name, chains, start=0, limit=limit)
        while grant.coming:
            self.cache.settle(ASK_AGAIN_S)
            grant = self.cache.acquire(name, chains, start=0, limit=limit)
        if not grant.parts:
            return 0, 0, grant.missing
        (part,) = grant.parts
        n_blocks = self._load(cache, name, part, chains[0])
        n_tokens = n_blocks * self._pool.block_tokens
        cache.restored(ids[:n_tokens])
        if n_blocks < len(part.slots):
            return n_tokens, 0, "failed"
        return n_tokens, grant.from_disk, grant.missing

    def _load(self, cache: BlockCache, name: str, part: Part, keys: list[bytes]) -> int:
        """How many of the blocks, from the first on, are in the cache's lane now."""
        n = len(part.slots)
        begin = time.perf_counter()
        try:
            status = self._copier.load(
                np.arange(cache.first_block, cache.first_block + n, dtype=np.int32),
                part.slots,
                part.generations,
                b"".join(keys[:n]),
                np.ones(n, np.uint8),
            )
        except KVMemError as error:  # I9: the prompt is computed
            self.bus.emit(events.Failure(where="load", error=str(error)))
            return 0
        bad = np.flatnonzero(status)
        for i in bad.tolist():  # I5
            self.cache.quarantine(
                int(part.slots[i]), int(part.generations[i]), key=keys[i],
                reason=f"status {status[i]}",
            )  # fmt: skip
        good = int(bad[0]) if len(bad) else n
        self.bus.emit(
            events.Loaded(
                request_id=name,
                blocks=good,
                bytes=good * self._pool.regions.block_bytes,
                seconds=time.perf_counter() - begin,
            )
        )
        return good

    def _keep(self, cache: BlockCache, name: str, salt: str | None) -> int:
        if not cache.open or self._weights.changed():
            return 0
        keys = self._keys(cache.kept_tokens, salt)
        if not keys:
            return 0
        room = self.cache.reserve(name, 0, keys, range(len(keys)))
        if not len(room.slots):
            return 0
        chosen = room.index.tolist()
        begin = time.perf_counter()
        try:
            status, sums = self._copier.store(
                np.asarray(room.index + cache.first_block, np.int32),
                room.slots,
                room.generations,
                b"".join(keys[i] for i in chosen),
            )
        except KVMemError as error:  # I9
            self.cache.abandon(room.slots, room.generations)
            self.bus.emit(events.Failure(where="store", error=str(error)))
            return 0
        except BaseException:
            self.cache.abandon(room.slots, room.generations)
            raise
        good = status == 0
        if not good.all():
            self.cache.abandon(room.slots[~good], room.generations[~good])
        n = self.cache.publish(room.slots[good], room.generations[good], sums[good])
        if n:
            self.cache.demote(0, keys, chosen)
        self.bus.emit(
            events.Stored(
                request_id=name,
                blocks=n,
                bytes=n * self._pool.regions.block_bytes,
                seconds=time.perf_counter() - begin,
            )
        )
        return n

    # -- the whole ---------------------------------------------------------------------------

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self._pool.block_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all layers."""
        return self._pool.regions.block_bytes

    def settle(self, seconds: float = 0.0) -> None:
        """Takes in what the disk has done; waits so long for the next move to end."""
        self.cache.settle(seconds)

    def close(self) -> None:
        """Unmaps the memory; waits for the disk's writes. The model is as it was."""
        hook = getattr(self, "_hook", None)
        if hook is not None:
            hook.remove()
        disk, self._disk = self._disk, None
        if disk is not None:
            disk.close()
        self._arena.close(unlink=True)

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        blocks = self.cache.stats()["published"]
        tokens = blocks * self._pool.block_tokens
        return f"<PrefixStore of {type(self.model).__name__}: {blocks:,} blocks, {tokens:,} tokens>"


def _feed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before every forward of the model: a cache of ours notes what it is fed."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, BlockCache):
        # Dropout and autocast have a part in the numbers.
        exact = not module.training and not torch.is_autocast_enabled(module.device.type)
        cache.feed(kwargs, args, exact=exact)
