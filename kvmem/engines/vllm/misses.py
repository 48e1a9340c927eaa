"""Why requests missed: what the scheduler's half knows of them, handed to the explainer.

Each call passes a door: whatever fails in here costs a reason, never a request (I9).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvmem.engines.vllm.seen import Seen
from kvmem.explain.misses.explainer import Explainer
from kvmem.explain.misses.naming import Namer
from kvmem.explain.misses.past import Prompt
from kvmem.explain.misses.reasons import fix_of
from kvmem.explain.misses.runs import Lookup, Run

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvmem.engines.vllm.scheduler import SchedulerHalf

__all__ = ["Misses"]

log = logging.getLogger("kvmem")

PAGE_BYTES = 12_000  # of the page's room; what is told first is the newest
WHO_CHARS = 96
# How a load that failed is told.
OF_FAULT = {True: "quarantined", False: "tier_error"}


class Misses:
    """The explainer of a `SchedulerHalf`, in its thread.

    Args:
        half: whose.
        tokenizer: the folder with the model's tokenizer, or a name; None for none.
    """

    def __init__(self, half: SchedulerHalf, tokenizer: str | None) -> None:
        self._half = half
        shape = half.geometry.shapes[0]
        self._unit = shape.block_tokens // half.geometry.hash_tokens
        self._tokenizer = tokenizer
        self.explainer = Explainer(
            shape.block_tokens,
            half.cache,
            half.bus,
            namer=Namer(self._decoder, lambda error: half.failed("explain", error)),
            policy=half.config.eviction,
        )
        half.cache.on_evicted = self._evicted

    def _decoder(self) -> Callable[[Sequence[int]], str] | None:
        """The model's own tokenizer, where its folder has one in the form that is read here."""
        if self._tokenizer is None:
            return None
        file = Path(self._tokenizer).expanduser() / "tokenizer.json"
        if not file.is_file():
            return None
        from tokenizers import Tokenizer

        loaded = Tokenizer.from_file(str(file))
        return lambda ids: str(loaded.decode(list(ids), skip_special_tokens=False))

    def _safely(self, what: str, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception as error:  # I9: a reason is not worth a request
            log.exception("kvmem: %s failed; a request has no reasons", what)
            self._half.failed("explain", f"{what}: {type(error).__name__}: {error}")
            return None

    # -- a request's way ---------------------------------------------------------------------

    def looked_up(
        self, seen: Seen, start: int, stop: int, reach: int, *, off: str | None, missing: str
    ) -> None:
        """What is missing of a request that has not begun, asked as often as the engine asks."""
        if seen.request.num_output_tokens or getattr(seen.request, "num_preemptions", 0):
            return  # what it was answered with stands in its first case
        self._safely("look", lambda: self._look(seen, start, stop, reach, off, missing))

    def _look(
        self, seen: Seen, start: int, stop: int, reach: int, off: str | None, missing: str
    ) -> None:
        blocked, here = "", 0
        if seen.load_failed and seen.case is not None:
            blocked = seen.case.lookup.blocked if seen.case.lookup.here else OF_FAULT[seen.bad_load]
            here = max(seen.case.lookup.here, seen.case.lookup.stop)
        elif off is not None:
            blocked = "disabled_by_request"
            here = self._half.cache.match(seen.keys.all(), start, reach)
        lookup = Lookup(
            start, stop, reach, blocked, off or "", here, no_boundary=missing == "no_boundary"
        )
        prompt = self._prompt(seen)
        seen.case = self.explainer.look(prompt, lookup, seen.keys.of(0), seen.case)

    def _prompt(self, seen: Seen) -> Prompt:
        request = seen.request
        lora = getattr(request, "lora_request", None)
        outline = seen.wishes.outline
        return Prompt(
            request_id=request.request_id,
            session=getattr(request, "session_id", None) or "",
            salt=_digest(getattr(request, "cache_salt", None)),
            adapter=_digest(f"{lora.lora_name}\0{lora.lora_path}" if lora is not None else None),
            weights=self._half.live.epoch,
            content=seen.adapter,
            keys=self._keys(request),
            tokens=request.prompt_token_ids,
            n_tokens=request.num_prompt_tokens,
            outline=outline.packed if outline is not None else b"",
        )

    def _keys(self, request: Request) -> Any:
        hashes = request.block_hashes
        return hashes if self._unit == 1 else hashes[self._unit - 1 :: self._unit]

    def finished(self, seen: Seen) -> list[dict[str, Any]] | None:
        """The runs of a request that is over, for its receipt."""
        return None if seen.case is None else self._safely("end", lambda: self._end(seen))

    def _end(self, seen: Seen) -> list[dict[str, Any]]:
        case, request = seen.case, seen.request
        assert case is not None
        case.prompt.keys = self._keys(request)
        if seen.load_failed and not case.lookup.blocked:  # and the engine did not ask again
            lookup = msgspec.structs.replace(
                case.lookup,
                stop=case.lookup.start + seen.receipt.host + seen.receipt.disk,
                blocked=OF_FAULT[seen.bad_load],
                here=case.lookup.stop,
            )
            case = self.explainer.look(case.prompt, lookup, seen.keys.of(0), case)
        runs = self.explainer.end(
            case,
            reply=list(request.output_token_ids),
            n_computed=min(request.num_computed_tokens, request.num_tokens - 1),
            store_off=seen.receipt.store_off,
        )
        self.explainer.settle()
        return [_told(run) for run in runs]

    def step(self, n_tokens: int, now_s: float) -> None:
        """A step goes out."""
        self.explainer.pace.step(n_tokens, now_s)

    def _evicted(self, keys: bytes, tier: str, request_id: str) -> None:
        seen = self._half.seen(request_id)
        salt = _digest(getattr(seen.request, "cache_salt", None)) if seen is not None else b"?"
        self._safely("evicted", lambda: self.explainer.evicted(keys, tier, request_id, salt))

    # -- for others --------------------------------------------------------------------------

    def page(self) -> dict[str, Any]:
        """What stands on the page: the dearest causes, and as many requests as there is room."""
        return self._safely("page", self._page) or {}

    def _page(self) -> dict[str, Any]:
        self.explainer.settle()
        told: list[msgspec.Raw] = []
        room = PAGE_BYTES
        for one in reversed(self.explainer.recent):
            raw = msgspec.msgpack.encode(one)
            room -= len(raw)
            if room < 0:
                break
            told.append(msgspec.Raw(raw))
        return {"explained": told[::-1], "causes": self.explainer.top()}

    def close(self) -> None:
        """Ends the thread that names breaks."""
        self._safely("close", self.explainer.close)


def _told(run: Run) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(run)
    fix = fix_of(run.reason)
    if fix:
        told["fix"] = fix
    return told


def _digest(text: str | None) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest() if text else b""
