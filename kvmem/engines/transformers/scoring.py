"""Scores of answers behind one prompt, all in one forward over the prompt's restored blocks.

The candidates stand one after the other behind the prompt, each at the positions that it would have
alone, and a mask hides them from one another. The prompt's whole blocks come from the store, or are
computed and kept, so the last of the prompt and the candidates are all that is computed; cached and
cold, that last forward has the same shape, and the same scores bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from kvmem.engines.transformers.blocks import BlockCache
from kvmem.engines.transformers.store import PrefixStore
from kvmem.errors import ConfigError
from kvmem.types import Sampled, Scored

__all__ = ["CODECS", "PackedScorer", "open_scorer", "through_codec"]

CODECS = {"int8": 8, "int4": 4, "int2": 2}
SERVED, FRESH = "served", "fresh"
GROUP_TOKENS = 32  # that share a scale, of keys: by channel (KIVI, arXiv 2402.02750, section 3)


@contextmanager
def open_scorer(
    model: str, *, host_gb: float = 0.5, max_tokens: int = 8192
) -> Iterator[PackedScorer]:
    """A scorer on a checkpoint in float32: its folder, or its name on the Hugging Face hub.

    Raises:
        ConfigError: there is no such checkpoint.
        UnsupportedEngine: its model keeps other KV than full attention's.
    """
    disable_progress_bar()  # the caller has one of its own
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The model {model} cannot be read: {error}",
            next_step="Give a checkpoint's folder, or its name on the hub.",
            setting="model",
        ) from error
    with PrefixStore(loaded.eval(), host_gb=host_gb, max_tokens=max_tokens) as store:
        yield PackedScorer(store)


class PackedScorer:
    """`kvmem.blame`'s scorer and sampler on a `PrefixStore`. One thread uses it.

    Args:
        store: the model's prefixes; needs a lane while it scores.
    """

    def __init__(self, store: PrefixStore) -> None:
        self._store = store
        self._block = store.block_tokens
        self._fresh = 0

    def score(
        self,
        prefix_ids: Sequence[int],
        candidates: Sequence[Sequence[int]],
        *,
        kv: str = SERVED,
        salt: str = "",
    ) -> Scored:
        """See `kvmem.blame.scorer.Scorer`.

        Args:
            kv: "served" from the store's exact blocks, "fresh" without them, or one of CODECS: the
                prompt's whole blocks go through it first, and nothing of that is kept.

        Raises:
            ConfigError: there is no such codec, or a candidate or the prompt is empty.
            CapacityError: the lane is too short for prompt and candidates.
        """
        if not prefix_ids or not candidates or not all(candidates):
            raise ConfigError(
                "A score needs a prompt and candidates of at least one token each",
                next_step="Leave empty answers out.",
            )
        begin = time.perf_counter()
        ids = [int(i) for i in prefix_ids]
        with torch.inference_mode(), self._opened(ids, kv, salt) as cache:
            cached = cache.report.restored_tokens
            start = cache.get_seq_length()
            logits = self._packed(cache, ids[start:], candidates, start)
            logprobs = tuple(_sums(logits, len(ids) - start, candidates))
        return Scored(logprobs, len(ids), cached, time.perf_counter() - begin)

    def sample(
        self,
        prefix_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        kv: str = SERVED,
        salt: str = "",
    ) -> Sampled:
        """See `kvmem.blame.scorer.Sampler`; the answer ends before the model's end token."""
        begin = time.perf_counter()
        ids = [int(i) for i in prefix_ids]
        draw = torch.Generator().manual_seed(seed)
        ends = _ends(self._store.model)
        out: list[int] = []
        with torch.inference_mode(), self._opened(ids, kv, salt) as cache:
            cached = cache.report.restored_tokens
            fed = ids[cache.get_seq_length() :]
            while len(out) < max_tokens:
                logits = self._store.model(
                    input_ids=self._tensor(fed), past_key_values=cache, logits_to_keep=1
                ).logits[0, -1]
                token = _chosen(logits.float().cpu(), temperature, draw)
                if token in ends:
                    break
                out.append(token)
                fed = [token]
        return Sampled(tuple(out), len(ids), cached, time.perf_counter() - begin)

    # -- the prompt --------------------------------------------------------------------------

    def _opened(self, ids: list[int], kv: str, salt: str) -> BlockCache:
        """A cache with the KV of the prompt's whole blocks, but for its last token."""
        if kv not in (SERVED, FRESH, *CODECS):
            raise ConfigError(
                f"transformers serves no KV {kv!r}",
                next_step=f"Use {SERVED}, {FRESH}, {', '.join(CODECS)}.",
                setting="kv",
            )
        if kv == FRESH:
            self._fresh += 1
            salt = f"{salt}\0kvmem.blame/{id(self)}/{self._fresh}"  # nobody else's
        cache = self._store.open(ids, salt=salt or None)
        try:
            n_whole = (len(ids) - 1) // self._block * self._block
            have = cache.get_seq_length()
            if have < n_whole:
                self._store.model(
                    input_ids=self._tensor(ids[have:n_whole]),
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                if kv != FRESH:
                    cache.keep()
            if kv in CODECS:
                cache.forget()  # I10: what comes now is not the KV of these tokens
                for keys, values in cache.lanes():
                    through_codec(keys, CODECS[kv], by_channel=True)
                    through_codec(values, CODECS[kv], by_channel=False)
        except BaseException:
            cache.close()
            raise
        return cache

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._store.model.device)

    # -- the candidates ----------------------------------------------------------------------

    def _packed(
        self, cache: BlockCache, tail: list[int], candidates: Sequence[Sequence[int]], start: int
    ) -> torch.Tensor:
        """Logits [n, vocabulary] of the prompt's last token and of all candidates' but their last.

        Rows: [0, len(tail)) the rest of the prompt, then each candidate without its last token.
        """
        model = self._store.model
        rows = list(tail)
        positions = list(range(start, start + len(tail)))
        owner = [0] * len(tail)  # 0 is the prompt's, i + 1 candidate i's
        for number, candidate in enumerate(candidates, 1):
            body = [int(i) for i in candidate[:-1]]
            rows += body
            positions += range(start + len(tail), start + len(tail) + len(body))
            owner += [number] * len(body)
        own = torch.tensor(owner)
        causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        seen = causal & ((own[:, None] == own[None, :]) | (own == 0)[None, :])
        allowed = torch.cat([torch.ones(len(rows), start, dtype=torch.bool), seen], dim=1)
        mask = torch.zeros(allowed.shape, dtype=model.dtype)
        mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)
        out = model(
            input_ids=self._tensor(rows),
            position_ids=self._tensor(positions),
            attention_mask=mask[None, None].to(model.device),
            past_key_values=cache,
            logits_to_keep=len(rows) - len(tail) + 1,
        )
        return out.logits[0]


def _sums(logits: torch.Tensor, n_tail: int, candidates: Sequence[Sequence[int]]) -> list[float]:
    """Of each candidate the sum over its tokens; row 0 is the prompt's last token."""
    logprobs = logits.float().log_softmax(-1)
    found, at = [], 1
    for candidate in candidates:
        rows = [0, *range(at, at + len(candidate) - 1)]
        at += len(candidate) - 1
        index = torch.tensor([int(i) for i in candidate], device=logits.device)
        picked = logprobs[torch.tensor(rows, device=logits.device)].gather(1, index[:, None])
        found.append(float(picked.double().sum()))
    return found


def _chosen(logits: torch.Tensor, temperature: float, draw: torch.Generator) -> int:
    if temperature <= 0.0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw))


def _ends(model: Any) -> set[int]:
    """The model's end tokens, by its generation's and its own configuration."""
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            found.update(end if isinstance(end, list) else [end])
    return found


def through_codec(tensor: torch.Tensor, bits: int, *, by_channel: bool) -> None:
    """Puts values, [tokens, heads, dim], on 2**bits levels between their least and their greatest,
    in place: by channel over groups of tokens, or by token over the channels of a head."""
    levels = 2**bits - 1
    groups = tensor.split(GROUP_TOKENS) if by_channel else (tensor,)
    for group in groups:
        if not len(group):
            continue
        dim = 0 if by_channel else 2
        wide = group.float()
        low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
        step = (high - low).clamp_min(1e-8) / levels
        group.copy_(((wide - low) / step).round() * step + low)
