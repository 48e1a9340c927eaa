"""A forward without a model: it writes KV that can be told right from wrong, and reads it back.

The KV of a position is a function of all tokens up to it, so a block that is wrong, stale,
unfinished or mapped to another place does not hold what attention would need. A group with windows
reads only those; one with states reads the state before the step's first token and leaves the one
after its last, as vLLM's does (vllm/v1/worker/mamba_utils.py). The sampled token is
a function of the same, so a reply is the same whatever was cached. Request state is kept as
vLLM's runner does (vllm/v1/worker/gpu_model_runner.py, `_update_states`): block tables are the
runner's own, and it knows its sampled tokens before the scheduler does.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmem.types import GroupShape

__all__ = [
    "BLOCK",
    "CELL_BYTES",
    "HASH_BYTES",
    "Forward",
    "WrongKVError",
    "digests",
    "kv_of",
    "reply",
]

BLOCK = 16
HASH_BYTES = 12
CELL_BYTES = HASH_BYTES + 4  # the hash, and the oldest epoch that it was computed from
FIRST_SAMPLED = 1000
N_SAMPLED = 24


class WrongKVError(AssertionError):
    """Attention would read, or kvmem has stored, what does not belong there."""


@functools.cache
def _next(digest: bytes, token: int) -> bytes:
    return hashlib.blake2b(digest + token.to_bytes(4, "little"), digest_size=HASH_BYTES).digest()


def digests(tokens: Iterable[int], salt: str | None = None) -> list[bytes]:
    """For each position, what the KV of all tokens up to it comes from."""
    digest, found = hashlib.blake2b(repr(salt).encode(), digest_size=HASH_BYTES).digest(), []
    for token in tokens:
        digest = _next(digest, token)
        found.append(digest)
    return found


def kv_of(positions: Sequence[bytes], group: int, layer: int) -> np.ndarray:
    """[n, HASH_BYTES]: what a layer of a group holds at these positions; no two are alike."""
    cells = np.frombuffer(b"".join(positions), np.uint8).reshape(-1, HASH_BYTES)
    return cells ^ np.uint8((0x5A * layer + 0x11 * group) & 0xFF)


def _sampled(digest: bytes) -> int:
    return FIRST_SAMPLED + int.from_bytes(digest[:4], "little") % N_SAMPLED


def reply(
    prompt: Sequence[int], n: int, salt: str | None = None, stop: int | None = None
) -> list[int]:
    """What every engine answers to this prompt: `n` tokens, or up to `stop`."""
    digest, tokens = digests(prompt, salt)[-1], []
    while len(tokens) < n and (not tokens or tokens[-1] != stop):
        tokens.append(_sampled(digest))
        digest = _next(digest, tokens[-1])
    return tokens


@dataclass
class _Row:
    """A request as the runner knows it."""

    tokens: list[int]
    n_prompt: int
    blocks: list[list[int]]  # of each group
    salt: str | None
    start: int = 0
    begins: bool = True
    _digests: list[bytes] = field(default_factory=list)

    def digests(self) -> list[bytes]:
        if len(self._digests) > len(self.tokens):  # tokens of a step that was dropped
            self._digests = []
        if not self._digests:
            self._digests = digests(self.tokens, self.salt)
        while len(self._digests) < len(self.tokens):
            self._digests.append(_next(self._digests[-1], self.tokens[len(self._digests)]))
        return self._digests

    def replace(self, tokens: list[int]) -> None:
        self.tokens, self._digests = tokens, []


class Forward:
    """Runs steps over `caches`: of each group, [n_blocks, block_tokens, CELL_BYTES] bytes for each
    layer. A state is the first cell of its block."""

    def __init__(
        self, shapes: Sequence[GroupShape], caches: list[list[np.ndarray]], *, asynchronous: bool
    ) -> None:
        self.shapes = shapes
        self.caches = caches
        self.whole = next(i for i, shape in enumerate(shapes) if shape.closed)
        self.asynchronous = asynchronous
        self.epoch = 1
        self.weights = 1  # the epoch of the weights that are served
        self.salts: dict[str, str | None] = {}
        self.first_start: dict[str, int] = {}  # where a request's first chunk began
        self.promised: dict[str, tuple[int, list[int]]] = {}  # loads: oldest epoch, blocks
        self.positions_read = 0
        self._rows: dict[str, _Row] = {}

    def new_weights(self) -> None:
        """From now on other weights compute."""
        self.epoch += 1
        self.weights = self.epoch

    def run(self, output: Any) -> dict[str, list[int]]:
        """The step's forward; what it sampled for each request.

        Raises:
            WrongKVError: attention would have read something else than was computed.
        """
        self._update(output)
        assert not output.kv_cache_block_copies
        for block in output.new_block_ids_to_zero or ():
            for cache in itertools.chain(*self.caches):
                cache[block] = 0
        rows = {i: self._rows[i] for i in output.num_scheduled_tokens}
        for request_id, row in rows.items():
            self._write(request_id, row, row.start + output.num_scheduled_tokens[request_id])
        sampled = {}
        for request_id, row in rows.items():  # as in a layer: all is written before it is read
            stop = row.start + output.num_scheduled_tokens[request_id]
            self._read(request_id, row, stop)
            self._check_weights(request_id, row)
            self._check_epoch(request_id, row)
            sampled[request_id] = []
            if stop == len(row.tokens):
                sampled[request_id].append(_sampled(row.digests()[-1]))
        for request_id, row in rows.items():
            row.tokens += sampled[request_id]
        return {i: list(tokens) for i, tokens in sampled.items()}

    def _update(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self._rows.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            tokens, i = list(new.prompt_token_ids), new.req_id
            tables = [list(ids) for ids in new.block_ids]
            self._rows[i] = _Row(tokens, len(tokens), tables, self.salts[i])
            self._rows[i].start = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for at, request_id in enumerate(cached.req_ids):
            row = self._rows[request_id]
            row.start = cached.num_computed_tokens[at]
            n_known = row.n_prompt + cached.num_output_tokens[at]
            if n_known < len(row.tokens):  # in-flight output that the scheduler has dropped
                row.replace(row.tokens[:n_known])
            given = cached.all_token_ids.get(request_id)
            if given is not None:
                if self.asynchronous:
                    row.replace(list(given))
                assert row.tokens == list(given), f"{request_id}: the runner has other tokens"
            new_blocks = cached.new_block_ids[at]
            if request_id in cached.resumed_req_ids:
                row.begins = True
                row.blocks = [list(ids) for ids in new_blocks]
            elif new_blocks is not None:
                for table, more in zip(row.blocks, new_blocks, strict=True):
                    table += more

    def _cells(self, row: _Row, group: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Device block and offset of positions [start, stop)."""
        at, tokens = np.arange(start, stop), self.shapes[group].block_tokens
        blocks = np.asarray(row.blocks[group], np.int64)[at // tokens]
        if not blocks.all():  # vLLM's null block
            raise WrongKVError(f"group {group} has no block for some of [{start}, {stop})")
        return blocks, at % tokens

    def _state(self, row: _Row, group: int, n_tokens: int) -> int:
        """The block with the state after so many tokens."""
        return row.blocks[group][(n_tokens - 1) // self.shapes[group].block_tokens]

    def _check_weights(self, request_id: str, row: _Row) -> None:
        """A request that begins is given no KV of weights that were served before."""
        begins, row.begins = row.begins, False
        if not begins or not row.start:
            return
        cells = self._cells(row, self.whole, 0, row.start)
        for cache in self.caches[self.whole]:
            oldest = int(_epochs(cache[cells]).min())
            if oldest < self.weights:
                raise WrongKVError(
                    f"{request_id} begins at {row.start} on KV of weights {oldest}, served are "
                    f"{self.weights}"
                )

    def _check_epoch(self, request_id: str, row: _Row) -> None:
        """What was loaded was computed after the last reset before the load was granted."""
        self.first_start.setdefault(request_id, row.start)
        epoch, block_ids = self.promised.pop(request_id, (0, []))
        for block in set(block_ids) & set(row.blocks[self.whole][: row.start // BLOCK]):
            for cache in self.caches[self.whole]:
                oldest = int(_epochs(cache[block]).min())
                if oldest < epoch:
                    raise WrongKVError(
                        f"{request_id}: block {block} was loaded after reset {epoch} and holds KV "
                        f"of {oldest}"
                    )

    def _write(self, request_id: str, row: _Row, stop: int) -> None:
        assert row.start < stop <= len(row.tokens), f"{request_id}: {row.start} {stop}"
        for group, shape in enumerate(self.shapes):
            if shape.reach_tokens == 1:
                self._write_state(request_id, row, group, stop)
            else:
                self._write_cells(row, group, stop)

    def _write_cells(self, row: _Row, group: int, stop: int) -> None:
        chain = row.digests()[row.start : stop]
        seen = self._cells(row, group, self._first_read(row, group), row.start)
        written = self._cells(row, group, row.start, stop)
        for layer, cache in enumerate(self.caches[group]):
            epochs = _epochs(cache[seen])
            oldest = min(self.epoch, int(epochs.min())) if len(epochs) else self.epoch
            cache[written] = self._filled(chain, group, layer, oldest)

    def _write_state(self, request_id: str, row: _Row, group: int, stop: int) -> None:
        for layer, cache in enumerate(self.caches[group]):
            oldest = self.epoch
            if row.start > 0:
                before = cache[self._state(row, group, row.start)][:1]
                wanted = kv_of(row.digests()[row.start - 1 : row.start], group, layer)
                if (before[:, :HASH_BYTES] != wanted).any():
                    raise WrongKVError(
                        f"{request_id} goes on from {row.start}: layer {layer} of group {group} "
                        f"has another state there, blocks {row.blocks[group]}"
                    )
                oldest = min(oldest, int(_epochs(before).min()))
            after = self._filled(row.digests()[stop - 1 : stop], group, layer, oldest)
            cache[self._state(row, group, stop)][0] = after[0]

    def _filled(self, chain: Sequence[bytes], group: int, layer: int, epoch: int) -> np.ndarray:
        cells = np.empty((len(chain), CELL_BYTES), np.uint8)
        cells[:, :HASH_BYTES] = kv_of(chain, group, layer)
        cells[:, HASH_BYTES:] = np.frombuffer(np.uint32(epoch).tobytes(), np.uint8)
        return cells

    def _first_read(self, row: _Row, group: int) -> int:
        """The first position that the step's first token attends to."""
        return self.shapes[group].first_read(row.start)

    def _read(self, request_id: str, row: _Row, stop: int) -> None:
        for group, shape in enumerate(self.shapes):
            if shape.reach_tokens == 1:
                continue  # read where it was overwritten
            first = self._first_read(row, group)
            self.positions_read += stop - first
            for layer, cache in enumerate(self.caches[group]):
                found = cache[self._cells(row, group, first, stop)][:, :HASH_BYTES]
                wanted = kv_of(row.digests()[first:stop], group, layer)
                wrong = first + np.flatnonzero((found != wanted).any(axis=1))
                if len(wrong):
                    raise WrongKVError(
                        f"{request_id} computes [{row.start}, {stop}): layer {layer} of group "
                        f"{group} is wrong at positions {wrong[:8].tolist()}.. ({len(wrong)}), "
                        f"blocks {row.blocks[group]}"
                    )


def _epochs(cells: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(cells[..., HASH_BYTES:]).view(np.uint32)
