"""What the scheduler's half keeps: of each request, of each step under way, and in all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmem.cache import Grant
from kvmem.engines.vllm.keys import Chains
from kvmem.engines.vllm.receipt import Receipt, Wishes
from kvmem.engines.vllm.wire import Ids, Words
from kvmem.explain.misses.explainer import Case
from kvmem.hints import Receipt as HintReceipt

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["Outstanding", "Seen", "Totals"]


@dataclass(slots=True)
class Seen:
    """A request that the engine told us of.

    `stored[group]`: its leading blocks [0, stored) were published, reserved or refused, and are
    not looked at again. `device_blocks[group]` are the blocks that the engine keeps at the end.
    `stale`: computed before a reset, so nothing of it is stored. `adapter` is the content of the
    request's adapter, as `Live.admit` settled it. `shadowed`: it is computed although it is stored.
    `approximate`: its salt is of those that may be answered approximately (I10). `load_began`: how
    often it had been preempted when its load was allocated. `bad_load`: what failed was a check of
    its load. `hinted`: the policy was told of it; `branch` is what it knows it by, `hint_receipts`
    what became of the hints that came with it. `case` is why what is missing of it is missing.
    `began_s`: when it came, in seconds since 1970.
    """

    request: Request
    wishes: Wishes
    receipt: Receipt
    keys: Chains
    stored: list[int]
    grant: Grant | None = None
    loading: bool = False
    load_blocks: list[list[int]] = field(default_factory=list)
    device_blocks: list[list[int]] = field(default_factory=list)
    finished: bool = False
    stale: bool = False
    load_failed: bool = False
    load_began: int | None = None
    bad_load: bool = False
    shadowed: bool = False
    approximate: bool = False
    adapter: bytes = b""
    case: Case | None = None
    began_s: float = 0.0
    hinted: bool = False
    branch: Any = None
    hint_receipts: list[HintReceipt] = field(default_factory=list)

    def forget_stored(self) -> None:
        """The engine begins the request anew."""
        self.stored = [0] * len(self.stored)

    def fail_load(self, good_tokens: int = 0) -> None:
        """One failed load is enough: asked again, the request computes (or it would never end)."""
        self.load_failed = True
        self.receipt.load_failed(self.request, good_tokens)
        self.forget_stored()


@dataclass(slots=True)
class Outstanding:
    """Slots reserved by one request in one step, not yet acknowledged: for blocks of a group up to
    block `stop`. `keys` are those of all blocks up to there, for the
    disk if there is one; `blocks` which of them got a slot; `codec` what the disk may store them
    by; the slots mean something in the cache's epoch `epoch` only."""

    request_id: str
    group: int
    stop: int
    slots: Ids
    generations: Words
    keys: list[Any]
    blocks: list[int]
    codec: int = 0
    epoch: int = 0


@dataclass(slots=True)
class Totals:
    """Counters since the engine started."""

    requests: int = 0
    prompt_tokens: int = 0
    tokens_hit_device: int = 0
    tokens_hit_host: int = 0
    tokens_hit_disk: int = 0
    tokens_hit_far: int = 0
    tokens_computed: int = 0
    blocks_stored: int = 0
    blocks_loaded: int = 0
    bytes_stored: int = 0
    bytes_loaded: int = 0
    load_s: float = 0.0
    store_s: float = 0.0
    refused: int = 0
    quarantined: int = 0
    shadowed: int = 0

    def add(self, receipt: Receipt) -> None:
        """Adds a finished request."""
        self.prompt_tokens += receipt.prompt
        self.tokens_hit_device += receipt.device
        self.tokens_hit_host += receipt.host
        self.tokens_hit_disk += receipt.disk
        self.tokens_hit_far += receipt.far
        self.tokens_computed += receipt.computed

    def as_dict(self) -> dict[str, Any]:
        """The counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}
