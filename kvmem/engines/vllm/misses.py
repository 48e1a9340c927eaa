"""Why requests missed: what the scheduler's half knows of them, handed to the explainer.

Each call passes a door: whatever fails in here costs a reason, never a request (I9).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvmem.engines.vllm.seen import Seen
from kvmem.explain.misses.behind import Behind
from kvmem.explain.misses.explainer import Case, Explainer, named, told_of
from kvmem.explain.misses.naming import Namer
from kvmem.explain.misses.past import Past, Prompt
from kvmem.explain.misses.runs import Lookup, Run
from kvmem.explain.misses.sums import LEAST_STEP

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvmem.engines.vllm.scheduler import SchedulerHalf

__all__ = ["Misses"]

log = logging.getLogger("kvmem")

PAGE_EVERY_S = 0.25
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
        self._behind = Behind("kvmem-explain", lambda error: self._failed("behind", error))
        self._paged: dict[str, Any] = {}
        self._paged_s = 0.0
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
        except Exception as error:  # noqa: BLE001 a door: as above (I9)
            self._failed(what, error)
            return None

    def _failed(self, what: str, error: Exception) -> None:
        log.warning("kvmem: %s failed: a request has no reasons", what, exc_info=error)
        self._half.failed("explain", f"{what}: {type(error).__name__}: {error}")

    # -- a request's way ---------------------------------------------------------------------

    def looked_up(
        self, seen: Seen, start: int, stop: int, reach: int, *, off: str | None, missing: str
    ) -> None:
        """What is missing of a request that has not begun, asked as often as the engine asks."""
        if seen.request.num_output_tokens or getattr(seen.request, "num_preemptions", 0):
            return  # what it was answered with stands in its first case
        try:
            self._look(seen, start, stop, reach, off, missing)
        except Exception as error:  # noqa: BLE001 a door: it costs a reason (I9)
            self._failed("look", error)

    def _look(
        self, seen: Seen, start: int, stop: int, reach: int, off: str | None, missing: str
    ) -> None:
        before, blocked, here = seen.case, "", 0
        if seen.load_failed and before is not None:
            blocked = before.lookup.blocked if before.lookup.here else OF_FAULT[seen.bad_load]
            here = max(before.lookup.here, before.lookup.stop)
        elif off is not None:
            blocked = "disabled_by_request"
            here = self._half.cache.match(seen.keys.all(), start, reach)
        self._take(
            seen,
            Lookup(start, stop, reach, blocked, off or "", here, missing == "no_boundary"),
            before,
            # The host's own word, which nobody has to ask again where there is nothing below it.
            new=missing == "new" and self.explainer.gone.is_empty and not self._half.cache.has_disk,
        )

    def _take(self, seen: Seen, lookup: Lookup, before: Case | None, *, new: bool = False) -> None:
        keys = () if new else seen.keys.of(0)
        seen.case = case = self.explainer.known(lookup, keys)
        weights, content = self._half.live.epoch, seen.adapter

        def look() -> None:
            if seen.case is case:  # else it was looked up again since
                self.explainer.look(case, self._prompt(seen, weights, content), before)

        self._behind.add(look, soon=True)

    def _prompt(self, seen: Seen, weights: bytes, content: bytes) -> Prompt:
        request = seen.request
        lora = getattr(request, "lora_request", None)
        outline = seen.wishes.outline
        whole = request.num_prompt_tokens // (self._unit * self._half.geometry.hash_tokens)
        return Prompt(
            request_id=request.request_id,
            session=getattr(request, "session_id", None) or "",
            salt=_digest(getattr(request, "cache_salt", None)),
            adapter=_digest(f"{lora.lora_name}\0{lora.lora_path}" if lora is not None else None),
            weights=weights,
            content=content,
            keys=self._keys(request)[:whole],
            tokens=request.prompt_token_ids,
            n_tokens=request.num_prompt_tokens,
            outline=outline.packed if outline is not None else b"",
        )

    def _keys(self, request: Request) -> Any:
        return self._of_blocks(request.block_hashes)

    def _of_blocks(self, hashes: Any) -> Any:
        return hashes if self._unit == 1 else hashes[self._unit - 1 :: self._unit]

    def finished(self, seen: Seen) -> list[dict[str, Any]] | None:
        """The runs of a request that is over, for its receipt."""
        try:
            return self._end(seen)
        except Exception as error:  # noqa: BLE001 a door: as above (I9)
            self._failed("end", error)
            return None

    def _end(self, seen: Seen) -> list[dict[str, Any]] | None:
        case = seen.case
        if seen.load_failed and case is not None and not case.lookup.blocked:
            # And the engine did not ask again.
            lookup = msgspec.structs.replace(
                case.lookup,
                stop=case.lookup.start + seen.receipt.host + seen.receipt.disk + seen.receipt.far,
                blocked=OF_FAULT[seen.bad_load],
                here=case.lookup.stop,
            )
            self._take(seen, lookup, case)
            case = seen.case
        if case is None:
            return None
        if case.record is None:  # a short request, and the thread has not come to it
            self._behind.finish()
        record = self.explainer.over(case)
        if record is None:
            return None
        last = len(self._half._seen) <= 1  # there may be no step for a long time
        self._behind.add(lambda: self._keep(seen, case))
        if last:
            self._behind.wake(now=True)
        return record.told

    def _keep(self, seen: Seen, case: Case) -> None:
        request, prompt = seen.request, case.prompt
        assert prompt is not None
        prompt.keys = self._keys(request)
        self.explainer.end(
            case,
            reply=list(request.output_token_ids),
            n_computed=min(request.num_computed_tokens, request.num_tokens - 1),
            store_off=seen.receipt.store_off,
        )

    def step(self, n_tokens: int) -> None:
        """A step goes out: there is time for what waits, while the model computes."""
        pace = self.explainer.pace
        if n_tokens >= LEAST_STEP or pace.waits:
            pace.step(n_tokens, time.monotonic())
        self._behind.wake()

    def _evicted(self, keys: bytes, tier: str, request_id: str) -> None:
        self._safely("evicted", lambda: self._told_of(keys, tier, request_id))

    def _told_of(self, keys: bytes, tier: str, request_id: str) -> None:
        seen = self._half.seen(request_id)
        salt = _digest(getattr(seen.request, "cache_salt", None)) if seen is not None else b"?"
        self.explainer.evicted(keys, tier, request_id, salt)
        self._behind.add(self.explainer.gone.sort_in)

    # -- a prompt that nobody has sent -------------------------------------------------------

    def preview(
        self,
        tokens: list[int],
        hashes: list[bytes],
        keys: Sequence[bytes],
        lookup: Lookup,
        *,
        session: str,
        salt: str,
        patience_s: float,
    ) -> list[dict[str, Any]]:
        """The runs that such a prompt would miss, as a receipt tells them; nothing is kept of it.

        Any thread may ask. It waits so long for what a change is called.
        """
        prompt = Prompt(
            request_id="", session=session, salt=_digest(salt), adapter=b"",
            weights=self._half.live.epoch, content=b"", keys=self._of_blocks(hashes),
            tokens=tokens, n_tokens=len(tokens),
        )  # fmt: skip
        case = self.explainer.known(lookup, keys)
        runs: list[Run] = []
        if not self._behind.add(lambda: runs.extend(self.explainer.preview(case, prompt))):
            return []
        self._behind.finish()
        self.explainer.wait_for_name(case, patience_s)
        return [told_of(named(run, case.broken)) for run in runs]

    def of_session(self, session: str) -> list[Past]:
        """The session's last prompts, the latest first. Any thread may ask."""
        found: list[Past] = []
        self._behind.add(lambda: found.extend(self.explainer.pasts.of_session(session)))
        self._behind.finish()
        return found

    def chains(self) -> tuple[list[Past], int]:
        """All prompts that are remembered, those used least lately first, and the latest `kept`.
        Any thread may ask.

        Their keys are not copied: this holds up whoever waits for the explainer for as long as a
        list of them takes.
        """
        found: list[tuple[list[Past], int]] = []
        pasts = self.explainer.pasts
        self._behind.add(lambda: found.append((pasts.all(), pasts.n_kept)))
        self._behind.finish()
        return found[0] if found else ([], 0)

    # -- for others --------------------------------------------------------------------------

    def page(self) -> dict[str, Any]:
        """What stands on the page: the dearest causes, and as many requests as there is room."""
        now = time.monotonic()
        if self._half._seen and now - self._paged_s < PAGE_EVERY_S:
            return self._paged  # another request is under way: the page is written again soon
        self._paged_s = now
        self._paged = self._safely("page", self._page) or {}
        return self._paged

    def _page(self) -> dict[str, Any]:
        told = [record.packed for record in self.explainer.recent]
        head = (0xDC0000 | len(told)).to_bytes(3, "big")  # msgpack: an array, its length in 16 bits
        return {
            "explained": msgspec.Raw(head + b"".join(told)),
            "causes": self.explainer.top(),
        }

    @property
    def waiting(self) -> int:
        """Jobs that are not done."""
        return self._behind.waiting

    def behind(self, job: Callable[[], None]) -> bool:
        """Has a job done on the thread behind the scheduler, when it is woken next; False where
        too much waits there."""
        return self._behind.add(job)

    def settle(self) -> None:
        """Returns when all that is known by now was told."""
        self._behind.finish()

    def close(self) -> None:
        """Ends the threads."""
        self._safely("close", self._behind.close)
        self._safely("close", self.explainer.close)


def _digest(text: str | None) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest() if text else b""
