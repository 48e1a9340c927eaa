"""Quotes: what a prompt would find in this engine if it came now, asked at the engine's desk.

It is looked up as a request is, and nothing is changed by it: no lease, no use of a block, no read
from the disk, no prompt that is remembered. The look-up runs on the desk's thread; the comparison
with earlier prompts runs in turn with the explainer's other jobs. The prompt's keys hold its salt,
so a quote sees that salt's blocks and nobody else's, and is compared with its prompts only (I11).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import msgspec

from kvmem.engines.vllm.keys import Chains
from kvmem.engines.vllm.weights import tweak_of
from kvmem.explain.misses.past import KEY, Past
from kvmem.explain.misses.runs import Lookup
from kvmem.hashing import BlockHasher, TokenCursor, session_extra_keys
from kvmem.telemetry.live import Branch
from kvmem.telemetry.quote import Quote

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvmem.engines.vllm.scheduler import SchedulerHalf

__all__ = ["Quotes"]

NAMING_S = 5.0  # how long a quote waits for what a change is called
NAME_CHARS = 512  # of a session's name, or a salt


class Quotes:
    """The quotes of a `SchedulerHalf`; the desk's thread asks."""

    def __init__(self, half: SchedulerHalf, vllm_config: VllmConfig) -> None:
        self._half = half
        algorithm = vllm_config.cache_config.prefix_caching_hash_algo
        self._hasher = BlockHasher(str(algorithm), half.geometry.hash_tokens)
        self._most_tokens = int(vllm_config.model_config.max_model_len)

    def at_desk(self, asked: dict[str, Any]) -> Quote:
        """`tokens` (4 bytes each, little-endian), `session` and `salt`.

        Raises:
            ValueError: there are no tokens, too many, or they are malformed.
        """
        raw = asked.get("tokens")
        if not isinstance(raw, bytes) or len(raw) % 4 or not raw:
            raise ValueError("a quote needs token ids")
        if len(raw) // 4 > self._most_tokens:
            raise ValueError(f"{len(raw) // 4:,} tokens; the model takes {self._most_tokens:,}")
        session, salt = str(asked.get("session") or ""), str(asked.get("salt") or "")
        if max(len(session), len(salt)) > NAME_CHARS:
            raise ValueError(f"a session or a salt of more than {NAME_CHARS} characters")
        return self.quote(array("i", raw).tolist(), session=session, salt=salt)

    def quote(self, tokens: list[int], *, session: str = "", salt: str = "") -> Quote:
        """What this prompt would find now, and what the rest would cost."""
        half, n = self._half, len(tokens)
        cursor = TokenCursor(self._hasher, **session_extra_keys(cache_salt=salt))
        cursor.extend(tokens)
        hashes: list[bytes] = cursor.keys()
        approximate = half.is_approximate(salt)
        tweak = tweak_of(half.live.epoch, b"", approximate=approximate)
        geometry = half.geometry
        chains = Chains(hashes, geometry.shapes, geometry.hash_tokens, tweak)
        keys, reach = chains.all(), min(n - 1, len(hashes) * geometry.hash_tokens)
        start, off = self._on_device(hashes, n), half.off()
        host, stop, missing = half.cache.look(keys, start=start, limit=reach)
        if "loads" in off:
            lookup = Lookup(start, start, reach, "disabled_by_request", off["loads"], stop)
            host = stop = start
        else:
            lookup = Lookup(start, stop, reach, no_boundary=missing == "no_boundary")
        misses = half.misses.preview(
            tokens, hashes, keys[0], lookup, session=session, salt=salt, patience_s=NAMING_S
        )
        disk_ms, load_ms = self._moving_ms(stop - host, stop - start)
        prefill_ms = self._prefill_ms(n - stop)
        parts = (disk_ms, load_ms, prefill_ms)
        return Quote(
            prompt=n,
            device=start,
            host=host - start,
            disk=stop - host,
            computed=n - stop,
            ms=round(sum(p for p in parts if p is not None), 3) if None not in parts else None,
            ms_cold=self._prefill_ms(n),
            disk_ms=disk_ms,
            load_ms=load_ms,
            prefill_ms=prefill_ms,
            misses=tuple(misses),
            off=off,
            running=half.n_running,
            exact=not approximate,
        )

    def branch(self, past: Past) -> Branch:
        """An earlier prompt, and what of it is here now."""
        half, shapes = self._half, self._half.geometry.shapes
        raw = bytes(past.keys)
        hashes = [raw[at : at + KEY] for at in range(0, len(raw), KEY)]
        told = Branch(past.request_id, past.n_prompt, len(hashes))
        if len(shapes) != 1 or past.adapter or past.weights != half.live.epoch:
            return told
        n_tokens = len(hashes) * shapes[0].block_tokens
        start = self._on_device(hashes, n_tokens + 1)
        host, stop, _ = half.cache.look([hashes], start=start, limit=n_tokens)
        return msgspec.structs.replace(told, device=start, host=host - start, disk=stop - host)

    def _on_device(self, hashes: list[bytes], n_tokens: int) -> int:
        """Tokens that the engine's own prefix cache has of a prompt, as its scheduler would find
        them; before the first request of all there are none.

        vllm/v1/core/kv_cache_manager.py, `get_computed_blocks`.
        """
        manager = self._half.live.manager
        if manager is None or not manager.enable_caching:
            return 0
        if not hasattr(manager.coordinator, "find_longest_cache_hit"):
            raise ValueError("this vLLM does not say what its own prefix cache would find")
        return int(manager.coordinator.find_longest_cache_hit(hashes, n_tokens - 1)[1])

    def _prefill_ms(self, n_tokens: int) -> float | None:
        pace = self._half.misses.explainer.pace.s_per_token
        return round(n_tokens * pace * 1e3, 3) if pace else None

    def _moving_ms(self, from_disk: int, in_all: int) -> tuple[float | None, float | None]:
        """For the disk, and for the copy to the device of all that was found beyond the device."""
        meter, totals = self._half.telemetry.meter, self._half.totals
        disk_s, disk_tokens = meter.disk_waits()
        disk_ms = load_ms = 0.0 if not in_all else None
        if not from_disk:
            disk_ms = 0.0
        elif disk_tokens:
            disk_ms = round(from_disk * disk_s / disk_tokens * 1e3, 3)
        loaded_tokens = totals.tokens_hit_host + totals.tokens_hit_disk
        if in_all and loaded_tokens:
            load_ms = round(in_all * totals.load_s / loaded_tokens * 1e3, 3)
        return disk_ms, load_ms
