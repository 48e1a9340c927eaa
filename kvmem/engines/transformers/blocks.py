"""KV in blocks that a copier can move: a transformers cache over a lane of a device pool.

transformers keeps a layer's keys and values as [1, heads, tokens, dim]; a block of tokens is then
no range of memory. Here they lie token by token, [tokens, heads, dim], in memory that is made once,
and the model gets a view of them in its own shape. What the model was fed is noted beside it, since
a block may only be kept under the tokens that it was computed from (I1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvmem.engines.copiers import Regions
from kvmem.errors import CapacityError, EngineError, UnsupportedEngine

__all__ = ["BlockCache", "LayerShape", "Pool", "shapes_of"]


class LayerShape(msgspec.Struct, frozen=True):
    """A layer's keys and values of one token: heads and dimensions of each, and their type."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: str


def shapes_of(model: PreTrainedModel) -> tuple[LayerShape, ...]:
    """Of each layer, as the model itself makes them for one token.

    Raises:
        UnsupportedEngine: a layer keeps something else than all its keys and values.
    """
    cache = DynamicCache(config=model.config)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    shapes = []
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise UnsupportedEngine(
                f"kvmem's transformers engine serves full attention only; layer {index} of "
                f"{type(model).__name__} keeps its KV in a {type(layer).__name__}",
                next_step="Use a model without sliding windows, states or shared layers.",
            )
        sizes = [(int(t.shape[1]), int(t.shape[3])) for t in (layer.keys, layer.values)]
        shapes.append(LayerShape(sizes[0], sizes[1], str(layer.keys.dtype).removeprefix("torch.")))
    return tuple(shapes)


# Tensors that a forward may be given and that say nothing more than the tokens do, once looked at.
_PLAIN = {"input_ids", "attention_mask", "position_ids", "cache_position", "labels"}


class Pool:
    """Device memory for `n_lanes` sequences of `lane_blocks` blocks each; uninitialised.

    Args:
        shapes: of the model's layers.
        device: where the model is.
        block_tokens: tokens of a block.
        lane_blocks: blocks of a sequence at most.
        n_lanes: sequences at a time.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        device: torch.device,
        *,
        block_tokens: int,
        lane_blocks: int,
        n_lanes: int,
    ) -> None:
        self.block_tokens, self.lane_blocks, self.n_lanes = block_tokens, lane_blocks, n_lanes
        self.device = device
        n_tokens = n_lanes * lane_blocks * block_tokens
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.regions = Regions()
        for shape in shapes:
            dtype = getattr(torch, shape.dtype)
            pair = tuple(
                torch.empty((n_tokens, *sizes), dtype=dtype, device=device)
                for sizes in (shape.key, shape.value)
            )
            for tensor in pair:
                n_bytes = block_tokens * tensor[0].numel() * tensor.element_size()
                self.regions.add(tensor.data_ptr(), n_bytes, n_bytes)
            self.layers.append((pair[0], pair[1]))
        self._free = list(range(n_lanes))

    @property
    def n_blocks(self) -> int:
        """Of all lanes."""
        return self.n_lanes * self.lane_blocks

    def blocks(self) -> list[torch.Tensor]:
        """Every layer's keys and values, [n_blocks, block_tokens, heads, dim]."""
        flat = [tensor for pair in self.layers for tensor in pair]
        return [t.view(self.n_blocks, self.block_tokens, *t.shape[1:]) for t in flat]

    def take(self) -> int:
        """A lane, the caller's until `give_back`.

        Raises:
            CapacityError: all are in use.
        """
        if not self._free:
            raise CapacityError(
                f"All {self.n_lanes} lanes of kvmem's transformers engine are in use",
                next_step="Close a cache that is done, or make the store with more lanes.",
                setting="lanes",
            )
        return self._free.pop()

    def give_back(self, lane: int) -> None:
        """The lane is free again."""
        self._free.append(lane)


def _one_sequence(n: int) -> UnsupportedEngine:
    return UnsupportedEngine(
        f"kvmem's transformers engine runs one sequence in a cache, not {n}",
        next_step="Set num_beams and num_return_sequences to 1 and pass one prompt.",
    )


class _Layer(DynamicLayer):
    """A layer's part of a lane."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._keys, self._values = keys, values  # [lane_tokens, heads, dim]
        self.dtype, self.device = keys.dtype, keys.device
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The memory is there already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts new tokens at the end; the whole, [1, heads, tokens, dim], as views of the lane."""
        batch, _, n_tokens, _ = key_states.shape
        stop = self.length + n_tokens
        if batch != 1:
            raise _one_sequence(batch)
        if stop > len(self._keys):
            raise CapacityError(
                f"The sequence needs {stop:,} tokens, a lane of kvmem's transformers engine has "
                f"{len(self._keys):,}",
                next_step="Make the store with a larger max_tokens.",
                setting="max_tokens",
            )
        self._keys[self.length : stop] = key_states[0].transpose(0, 1)
        self._values[self.length : stop] = value_states[0].transpose(0, 1)
        self.length = stop
        return self.view()

    def view(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model attends to."""
        keys, values = self._keys[: self.length], self._values[: self.length]
        return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)

    def get_seq_length(self) -> int:
        """Tokens in the lane."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Drops tokens from the end, as transformers counts them: -n drops n, n leaves n."""
        if tokens_to_remove < 0:
            self.length = max(0, self.length + tokens_to_remove)
        elif tokens_to_remove > 0:
            self.length = min(self.length, tokens_to_remove)

    def reset(self) -> None:
        """Drops all tokens."""
        self.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """There is one sequence."""
        raise _one_sequence(len(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """There is one sequence."""
        if repeats != 1:
            raise _one_sequence(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """There is one sequence."""
        raise _one_sequence(len(indices))


class BlockCache(Cache):
    """A transformers cache whose first tokens may have come from kvmem; one sequence.

    Hand it to `model.generate(..., past_key_values=cache)` with the very tokens it was opened for.
    A context manager; made by `PrefixStore.open`.

    Args:
        pool: where it takes a lane.
        on_keep: is given the cache by `keep`; the answer is how many blocks became visible.
        on_close: is given the cache when it is closed.
    """

    def __init__(
        self,
        pool: Pool,
        on_keep: Callable[[BlockCache], int],
        on_close: Callable[[BlockCache], None],
    ) -> None:
        self.lane = pool.take()
        self._pool, self._on_keep, self._on_close = pool, on_keep, on_close
        n = pool.lane_blocks * pool.block_tokens
        first = self.lane * n
        self._lane = [_Layer(k[first : first + n], v[first : first + n]) for k, v in pool.layers]
        super().__init__(layers=list(self._lane))
        # What the tokens in the lane are; shorter than the lane's length where that is not known.
        self.fed: list[int] = []
        self._known = True
        self.open = True
        self.report: Any = None  # what `PrefixStore.open` says of it

    @property
    def first_block(self) -> int:
        """Of its lane, in the pool."""
        return self.lane * self._pool.lane_blocks

    def restored(self, tokens: Sequence[int]) -> None:
        """The copier has filled the lane's first blocks with the KV of these tokens."""
        self.fed = list(tokens)
        for layer in self._lane:
            layer.length = len(tokens)

    def feed(self, kwargs: dict[str, Any], args: tuple[Any, ...], *, exact: bool = True) -> None:
        """The model is about to run on this cache with these arguments.

        Args:
            kwargs, args: of its forward.
            exact: whether the tokens alone make the numbers, in the model's own precision.
        """
        if not self.open:
            raise EngineError("This cache is closed", next_step="Open another for the sequence.")
        n_before = self.get_seq_length()
        self._known = self._known and n_before <= len(self.fed)
        del self.fed[n_before:]  # cropped
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or not exact or not self._plain(ids, kwargs, n_before):
            self._known = False
        if self._known:
            self.fed += ids[0].tolist()

    @staticmethod
    def _plain(ids: torch.Tensor, kwargs: dict[str, Any], n_before: int) -> bool:
        """Whether the tokens alone say what the KV will be: nothing but them has a part in it."""
        others = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        if ids.ndim != 2 or ids.shape[0] != 1 or others - _PLAIN:
            return False
        mask = kwargs.get("attention_mask")
        if mask is not None and (
            not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not bool(mask.all())
        ):
            return False
        for name in ("position_ids", "cache_position"):
            positions = kwargs.get(name)
            if positions is None:
                continue
            wanted = torch.arange(n_before, n_before + ids.shape[1], device=positions.device)
            if positions.shape[-1] != len(wanted) or not bool((positions == wanted).all()):
                return False
        return True

    def forget(self) -> None:
        """The KV in the lane is no longer that of its tokens: nothing of it is kept (I1, I10)."""
        self._known = False
        self.fed.clear()

    def lanes(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer keys and values, [tokens, heads, dim], the lane's own memory until `close`.

        Whoever writes into it calls `forget` first.
        """
        return [(one._keys[: one.length], one._values[: one.length]) for one in self._lane]

    @property
    def kept_tokens(self) -> list[int]:
        """The tokens whose KV is in the lane, as far as it is known what they are."""
        return self.fed[: self.get_seq_length()]

    def keep(self) -> int:
        """Stores the sequence's whole blocks, so that later prompts find them; how many are new.

        Tokens that were fed with a mask, positions or embeddings of the caller's own, and those
        after them, are left out.
        """
        return self._on_keep(self)

    def close(self) -> None:
        """Gives the lane and what was held in the store back."""
        if self.open:
            self.open = False
            self._pool.give_back(self.lane)
            self._on_close(self)

    def __enter__(self) -> BlockCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
