"""What a request may ask of kvmem, and what it is told.

In:  `kv_transfer_params = {"kvmem": {"load": false, "store": false}}`; both default to on. `hints`
     is an envelope of `kvmem.hints`.
Out: `kv_transfer_params["kvmem"]` of the response, see `Receipt.finish`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from kvmem.config import Config
from kvmem.explain.misses.outline import Outline
from kvmem.hints import Hints, read_hints

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["Receipt", "Wishes"]


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    load: bool = True
    store: bool = True
    outline: str = ""
    hints: Any = None


class Wishes(msgspec.Struct, frozen=True):
    """What this request allows; a malformed wish is told in the receipt and changes nothing.

    `load_off` and `store_off` say who forbids it: "setting", "request", or None for nobody.
    `hints` are what it asks of its session; `outline` says what the prompt is made of
    (`kvmem.explain.misses.outline`), where a ledger sent it along.
    """

    load_off: str | None
    store_off: str | None
    error: str | None = None
    outline: Outline | None = None
    hints: Hints | None = None

    @property
    def load(self) -> bool:
        """Whether the request may be answered from kvmem."""
        return self.load_off is None

    @property
    def store(self) -> bool:
        """Whether what it computes may be stored."""
        return self.store_off is None

    @classmethod
    def read(cls, params: Mapping[str, Any] | None, config: Config) -> Wishes:
        """The request's wishes within what the configuration allows."""
        asked, error, outline = _Asked(), None, None
        try:
            asked = msgspec.convert((params or {}).get("kvmem") or {}, _Asked)
        except msgspec.ValidationError as invalid:
            error = f"kv_transfer_params.kvmem was not understood and is ignored: {invalid}"
        try:
            outline = Outline.read(asked.outline) if asked.outline else None
        except ValueError as invalid:
            error = f"kv_transfer_params.kvmem.outline was not understood and is ignored: {invalid}"
        return cls(
            load_off=_off_by(config.load, asked.load),
            store_off=_off_by(config.store, asked.store),
            error=error,
            outline=outline,
            hints=read_hints(asked.hints) if asked.hints is not None else None,
        )


def _off_by(setting: bool, request: bool) -> str | None:
    if not setting:
        return "setting"
    return None if request else "request"


@dataclass(slots=True)
class Receipt:
    """What became of one request; token counts are of its prompt."""

    error: str | None = None
    exact: bool = True
    prompt: int = 0
    device: int = 0
    host: int = 0
    disk: int = 0
    far: int = 0
    computed: int = 0
    blocks_stored: int = 0
    refused: int = 0
    load_ms: float = 0.0
    disk_ms: float = 0.0
    far_ms: float = 0.0
    store_ms: float = 0.0
    miss: str = "new"
    resumed_at: int = 0
    load_off: str | None = None
    store_off: str | None = None
    _counted: bool = False

    def matched(
        self,
        request: Request,
        start: int,
        stop: int,
        missing: str,
        off_by: str | None = None,
        *,
        from_disk: int = 0,
        from_far: int = 0,
    ) -> None:
        """Notes what the first lookup found: `start` tokens on the device, all up to `stop` here,
        the last `from_far` of them fetched from a far store, `from_disk` before those from the
        disk.

        Later lookups are of a request that was preempted.
        """
        if self._is_told(request):
            return
        self.prompt = request.num_prompt_tokens
        self.device = start
        self.host = max(0, stop - start - from_disk - from_far)
        self.disk, self.far = from_disk, from_far
        self.miss = missing
        self.resumed_at = stop
        self.load_off = off_by

    def load_failed(self, request: Request, good_tokens: int) -> None:
        """Notes that only so many tokens of what the first lookup found could be used."""
        if not self._is_told(request):
            self.miss = "load_failed"
            self.host = min(self.host, good_tokens)
            self.disk = min(self.disk, good_tokens - self.host)
            self.far = min(self.far, good_tokens - self.host - self.disk)

    def _is_told(self, request: Request) -> bool:
        """Where the prompt came from is known: the request was preempted since, or is over."""
        again = request.num_output_tokens or getattr(request, "num_preemptions", 0)
        return bool(again) or self._counted

    def finish(self, request: Request, block_tokens: int) -> dict[str, Any]:
        """The receipt as the response carries it.

        `tokens` says where the prompt's KV came from; `computed` is the rest. `disk_ms` and
        `far_ms` are how long the request waited for the disk and the far store, `load_ms` the copy
        to the device. `miss` says why block `first_missing_block` was not here: none, new, evicted,
        pending, quarantined, cleared, abandoned, no_boundary, load_off or load_failed. `off` is
        there when loads or stores were off for this request, and says by whom: setting, request,
        switch, proof, shadow or worker. `exact` is false where the request's salt allows KV that is
        approximate.
        """
        self._counted = True
        self.prompt = request.num_prompt_tokens
        here = self.device + self.host + self.disk + self.far
        self.computed = max(0, self.prompt - here)
        first_missing = None if self.miss == "none" else self.resumed_at // block_tokens
        receipt: dict[str, Any] = {
            "tokens": {
                "prompt": self.prompt,
                "device": self.device,
                "host": self.host,
                "disk": self.disk,
                "far": self.far,
                "computed": self.computed,
            },
            "blocks_stored": self.blocks_stored,
            "blocks_refused": self.refused,
            "load_ms": round(self.load_ms, 3),
            "disk_ms": round(self.disk_ms, 3),
            "far_ms": round(self.far_ms, 3),
            "store_ms": round(self.store_ms, 3),
            "miss": self.miss,
            "first_missing_block": first_missing,
            "exact": self.exact,
        }
        off = {"load": self.load_off, "store": self.store_off}
        if any(off.values()):
            receipt["off"] = {what: by for what, by in off.items() if by}
        if self.error is not None:
            receipt["error"] = self.error
        return receipt
