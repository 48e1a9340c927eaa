"""The `Cache` of an engine that is attached to a node: the same verbs, over a socket.

The scheduler's half of the connector calls it as it calls a `Cache` of its own. A question that is
not answered by a deadline is a miss, and the node counts as away from then on: every verb answers
at once with nothing, until a thread beside has attached again. It is that new attachment from the
next `acquire` or `adopt` on, in the scheduler's own thread.

`epoch` tells slots apart: after a node that does not know this engine (it is another process, or
has taken back what the engine had) no slot, generation or lease of before means anything. The
caller compares the epoch of what it holds with that of now.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvmem import events
from kvmem._core import HostTier
from kvmem.cache import Grant, Part, Reservation
from kvmem.cache.cache import Keys, Slots, Words
from kvmem.cache.keeping import Keeping
from kvmem.cache.sessions import Sessions
from kvmem.node import wire
from kvmem.node.attaching import DEADLINE_S, GREET_S, Attaching
from kvmem.types import GroupShape, Quarantine

__all__ = ["NodeCache"]

log = logging.getLogger("kvmem")

AWAY = "tier_off"  # why nothing is found while there is no node
ORDER = "a node's own order"

_NO_SLOTS, _NO_WORDS = np.zeros(0, np.int32), np.zeros(0, np.uint64)
_COUNTS = (
    "n_slots", "free", "pending", "published", "orphaned", "condemned", "kept", "leases", "leased",
    "inserts", "evictions", "abandoned", "quarantined", "cleared",
)  # fmt: skip


class NodeCache(Attaching):
    """See the module. `close` ends the attachment.

    Thread safety: the scheduler's thread calls the verbs; `match`, `look`, `prefix`, `fate`,
    `stats` and `quarantined` may be called by any.

    Args:
        folder: the node's, as its --path.
        like: what this engine's blocks are (`hello_of`).
        bus: where events go.
        tenant_of: whose a request is: its salt's digest, up to 32 bytes.
        stores: whether what a request has to compute will be stored.
        deadline_s: for each answer.
        wait_s: how long the start waits for the node; later ones attach beside the engine's work.
        on_trouble: is told, once each, why there is no node.
    """

    def __init__(
        self,
        folder: Path,
        like: wire.Hello,
        *,
        bus: events.Bus | None = None,
        tenant_of: Callable[[str], bytes] = lambda request_id: b"",
        stores: Callable[[str], bool] = lambda request_id: True,
        deadline_s: float = DEADLINE_S,
        wait_s: float = GREET_S,
        on_trouble: Callable[[str], None] = lambda error: None,
    ) -> None:
        super().__init__(
            folder,
            like,
            bus if bus is not None else events.Bus(),
            deadline_s=deadline_s,
            on_trouble=on_trouble,
        )
        self.groups: tuple[GroupShape, ...] = tuple(group.shape for group in like.groups)
        # The order "agents" is of an engine's own cache.
        self.keeping: Keeping | None = None
        self.sessions = Sessions(None, HostTier(1), None, self.bus, time.monotonic, ORDER)
        self.on_evicted: Callable[[bytes, str, str], None] | None = None
        self._tenant_of, self._stores = tenant_of, stores
        # Requests that may have leases or keys there: of each group, how many keys, and the last.
        self._sent: dict[str, dict[int, tuple[int, Any]]] = {}
        self._coming: set[str] = set()
        self._last_batch = 0
        self._unreported: list[tuple[bytes, bytes]] = []
        self._mine = _NO_WORDS  # of each slot, the generation that this engine wrote
        self._stats: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
        self._quarantined: list[Quarantine] = []
        self._begin(wait_s)

    def _attached(self, welcome: wire.Welcome, *, known: bool) -> None:
        held, unreported = list(self._sent), self._unreported
        for keys in self._sent.values():
            keys.clear()  # told anew
        self._unreported = []
        if known:
            self._post(wire.Resume(held, self._last_batch))
            for slots, generations in unreported:
                self._post(wire.Abandon(slots, generations))
        else:
            self._last_batch = 0
            self._mine = np.zeros(welcome.n_slots, np.uint64)

    def _gone(self) -> None:
        self._coming.clear()

    def _more(self, request_id: str, group: int, keys: Keys, n: int | None = None) -> wire.More:
        """What the node does not have of the request's first n keys in this group."""
        of = self._sent.get(request_id)
        if of is None:
            of = self._sent[request_id] = {}
        n = len(keys) if n is None else n
        known, last = of.get(group, (0, b""))
        # They are chained: an equal key has the same before it.
        if known > n and keys[known - 1 : known] == [last]:
            return wire.More(known, b"")
        if known and (known > n or keys[known - 1] != last):
            known = 0
        if n > known:
            of[group] = (n, keys[n - 1])
            return wire.More(known, b"".join(keys[known:n] if known or n < len(keys) else keys))
        return wire.More(known, b"")

    # -- reading -----------------------------------------------------------------------------

    def acquire(self, request_id: str, chains: Sequence[Keys], *, start: int, limit: int) -> Grant:
        """See `Cache.acquire`. `coming` also while another engine is computing the rest."""
        if self._ready is not None:
            self.adopt()
        nothing = Grant(start, start, (), AWAY, epoch=self.epoch)
        if self._channel is None:
            return nothing
        answer = self._ask(
            wire.Acquire(
                request_id,
                self._tenant_of(request_id),
                [self._more(request_id, group, keys) for group, keys in enumerate(chains)],
                start,
                limit,
                self._stores(request_id),
            )
        )
        if not isinstance(answer, wire.Granted):
            return nothing
        if answer.coming:
            self._coming.add(request_id)
            return Grant(start, start, (), "coming", coming=True, epoch=self.epoch)
        self._coming.discard(request_id)
        parts = tuple(
            Part(
                part.group,
                part.first,
                np.frombuffer(part.slots, np.int32),
                np.frombuffer(part.generations, np.uint64),
            )
            for part in answer.parts
        )
        return Grant(
            answer.start, answer.stop, parts, answer.missing,
            from_disk=answer.from_disk, disk_s=answer.disk_s,
            from_far=answer.from_far, far_s=answer.far_s, epoch=self.epoch,
        )  # fmt: skip

    def foreign(self, slots: Slots, generations: Words) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of these blocks this engine has not written itself: they are to be verified."""
        return self._mine[slots] != generations

    def hold(self, request_id: str, group: int, keys: Keys, n_blocks: int) -> None:
        """See `Cache.hold`."""
        if self._channel is not None and self.groups[group].closed:
            self._post(wire.Hold(request_id, group, self._more(request_id, group, keys), n_blocks))

    def match(
        self, chains: Sequence[Keys], start: int, limit: int, below: object | None = None
    ) -> int:
        """See `Cache.match`; of the host alone."""
        answer = self._look(wire.Match([b"".join(keys) for keys in chains], start, limit, False))
        return answer if isinstance(answer, int) else start

    def look(self, chains: Sequence[Keys], *, start: int, limit: int) -> tuple[int, int, str]:
        """See `Cache.look`."""
        answer = self._look(wire.Match([b"".join(keys) for keys in chains], start, limit, True))
        if not isinstance(answer, list):
            return start, start, AWAY
        host, stop, missing = answer
        return host, stop, missing

    def prefix(self, packed: bytes) -> tuple[int, int]:
        """See `Cache.prefix`."""
        answer = self._look(wire.Prefix(bytes(packed)))
        return (answer[0], answer[1]) if isinstance(answer, list) else (0, 0)

    def fate(self, group: int, key: bytes) -> str:
        """See `Cache.fate`."""
        answer = self._look(wire.Fate(group, bytes(key)))
        return answer if isinstance(answer, str) else AWAY

    # -- writing -----------------------------------------------------------------------------

    def reserve(
        self, request_id: str, group: int, keys: Keys, blocks: Sequence[int]
    ) -> Reservation:
        """See `Cache.reserve`."""
        ask = wire.Reserve(
            request_id,
            self._tenant_of(request_id),
            group,
            self._more(request_id, group, keys),
            np.asarray(blocks, np.int32).tobytes(),
        ) if self._channel is not None else None  # fmt: skip
        answer = self._ask(ask) if ask is not None else None
        if not isinstance(answer, wire.Reserved):
            return Reservation(_NO_SLOTS, _NO_SLOTS, _NO_WORDS, len(blocks), self.epoch)
        self._last_batch = max(self._last_batch, answer.batch)
        if answer.refused:
            self.bus.emit(
                events.Refused(
                    request_id=request_id, blocks=answer.refused, reason=answer.reason or "no_room"
                )
            )
        return Reservation(
            np.frombuffer(answer.index, np.int32),
            np.frombuffer(answer.slots, np.int32),
            np.frombuffer(answer.generations, np.uint64),
            answer.refused,
            self.epoch,
        )

    def publish(self, slots: Slots, generations: Words, checksums: Words) -> int:
        """See `Cache.publish`. What could not be told is given back when there is a node again."""
        if not len(slots):
            return 0
        raw = slots.tobytes(), generations.tobytes()
        answer = self._ask(wire.Publish(*raw, checksums.tobytes()))
        if not isinstance(answer, wire.Told):
            self._unreported.append(raw)
            return 0
        self._mine[slots] = generations
        return int(answer.value)

    def abandon(self, slots: Slots, generations: Words) -> int:
        """See `Cache.abandon`; how many are given back."""
        if len(slots):
            raw = slots.tobytes(), generations.tobytes()
            if not self._post(wire.Abandon(*raw)):
                self._unreported.append(raw)
        return len(slots)

    def demote(self, group: int, keys: Keys, blocks: Sequence[int], *, codec: int = 0) -> None:
        """See `Cache.demote`: of what was published last, whose keys the node has."""
        if self._has_disk:
            self._post(wire.Demote(codec))

    def quarantine(self, slot: int, generation: int, *, key: bytes, reason: str) -> int:
        """See `Cache.quarantine`; nothing where the slot holds another block by now."""
        return self._doubt(slot, generation, key, reason, distrust=False)

    def distrust(self, slot: int, generation: int, *, key: bytes, reason: str) -> int:
        """See `Cache.distrust`."""
        return self._doubt(slot, generation, key, reason, distrust=True)

    def _doubt(self, slot: int, generation: int, key: bytes, reason: str, *, distrust: bool) -> int:
        answer = self._ask(wire.Quarantine(slot, generation, bytes(key), reason[:64], distrust))
        blocks = int(answer.value) if isinstance(answer, wire.Told) else 0
        self.bus.emit(events.Quarantined(key=bytes(key).hex(), blocks=blocks, reason=reason))
        return blocks

    # -- ending ------------------------------------------------------------------------------

    def release(self, request_id: str) -> None:
        """See `Cache.release`."""
        self._coming.discard(request_id)
        if self._sent.pop(request_id, None) is not None:
            self._post(wire.Release(request_id))

    def drop(self, reason: str) -> int:
        """What this engine is storing is not published. Nothing that is here answers any more,
        other engines neither, unless the reason is new weights: those have keys of their own."""
        answer = self._ask(wire.Drop(reason[:64], reason != "weights"))
        blocks = int(answer.value) if isinstance(answer, wire.Told) else 0
        self.bus.emit(events.Cleared(blocks=blocks, reason=reason))
        return blocks

    # -- the rest ----------------------------------------------------------------------------

    @property
    def has_disk(self) -> bool:
        """Whether the node has a disk or a far store."""
        return self._has_disk

    @property
    def waits_for_disk(self) -> bool:
        """Whether a request waits for a tier below, or for another engine."""
        return bool(self._coming)

    def computes(self, s_per_token: float) -> None:
        """See `Cache.computes`."""
        if self._has_disk:
            self._post(wire.Computes(s_per_token))

    def settle(self, seconds: float = 0.0) -> None:
        """Waits so long at most for what requests wait for."""
        if seconds and self._coming:
            self._ask(wire.Settle(min(1.0, seconds)), patience_s=seconds)

    def stats(self) -> dict[str, Any]:
        """See `Cache.stats`, of the whole node; while it is away, as they were."""
        found = self._look(wire.Ask("stats"))
        if isinstance(found, dict):
            self._stats = found
        return self._stats

    def quarantined(self) -> list[Quarantine]:
        """See `Cache.quarantined`, of the whole node."""
        found = self._look(wire.Ask("quarantined"))
        if isinstance(found, list):
            self._quarantined = msgspec.convert(found, list[Quarantine])
        return self._quarantined

    def check_integrity(self) -> list[str]:
        """See `Cache.check_integrity`; nothing where there is no node."""
        found = self._look(wire.Ask("check"))
        return [str(line) for line in found] if isinstance(found, list) else []
