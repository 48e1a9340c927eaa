"""An engine's state made up, as large as wanted, that answers the dashboard as an engine does.

    source = Synthetic(n_sessions=10_000, n_blocks=1_000_000)
    source.work(20)     twenty sessions end a turn each

Teams share instructions of some blocks, each its own tools; sessions branch from there. A share of
the chains lies on the host, of others only a part, or on the disk alone.
"""

from __future__ import annotations

import hashlib
import random
import time
from array import array
from collections import deque

from kvmem.telemetry.chains import Chain, Chains
from kvmem.telemetry.live import Cause, Sample, Session, SessionDetail, Snapshot, Tier, Turn

__all__ = ["Synthetic"]

TEAMS = 20
BLOCK_BYTES = 64 << 10
AT_ONCE = 1 << 18  # blocks of an answer


class Synthetic:
    """See the module; a `kvmem.dashboard.source.Source`.

    Args:
        n_sessions: of which each has one chain.
        n_blocks: different ones in all, about.
        seed: of everything.
        name: of the arena.
    """

    def __init__(
        self, n_sessions: int, n_blocks: int, *, seed: int = 1, name: str = "kvmem-0-made-up"
    ) -> None:
        self.name = name
        self._draw = random.Random(seed)
        self.chains_now: dict[int, tuple[int, Chain]] = {}
        self.sessions_now: dict[str, Session] = {}
        self._turns: deque[Turn] = deque(maxlen=256)
        self._events: deque[dict[str, object]] = deque(maxlen=256)
        self._n_events = self._stamp = 0
        self.asked = {"snapshot": 0, "chains": 0, "session": 0}
        shared = [self._marks(f"team {t}", self._draw.randrange(20, 60)) for t in range(TEAMS)]
        own = max(1, n_blocks // max(1, n_sessions) - 1)
        now = time.time()
        for i in range(n_sessions):
            team = self._draw.randrange(TEAMS)
            name, tenant = f"team-{team}/agent-{i}", f"{team % 3:016x}" if team % 3 else ""
            marks = shared[team] + self._marks(
                name, max(1, round(own * self._draw.uniform(0.5, 1.5)))
            )
            self._put(Chain(i + 1, name, tenant, f"request-{i}-0", marks))
            self.sessions_now[name] = Session(name, first_s=now, last_s=now)
        self.work(min(n_sessions, 200), spread_s=240.0)

    def _marks(self, name: str, n: int) -> bytes:
        """The marks of `n` blocks; two names have none in common."""
        return hashlib.shake_128(name.encode()).digest(8 * n)

    def _put(self, chain: Chain) -> None:
        self._stamp += 1
        self.chains_now.pop(chain.number, None)
        self.chains_now[chain.number] = (self._stamp, chain)

    def work(self, n: int, *, spread_s: float = 1.0) -> None:
        """So many sessions end a turn, within the last seconds."""
        now, names = time.time(), [chain for _, chain in self.chains_now.values()]
        for at, chain in enumerate(self._draw.sample(names, n)):
            new = self._marks(f"{chain.request_id}+", self._draw.randrange(1, 6))
            turn = int(chain.request_id.rpartition("-")[2]) + 1
            request = f"{chain.request_id.rpartition('-')[0]}-{turn}"
            self._put(Chain(chain.number, chain.session, chain.tenant, request, chain.marks + new))
            hit, fresh = 2 * len(chain.marks), 2 * len(new)
            ended = now - spread_s + spread_s * (at + 1) / n
            device, host, disk = hit // 2, hit // 4, hit // 8
            far = hit - device - host - disk
            self._turns.append(
                Turn(request, chain.session, ended - self._draw.uniform(0.2, 4), ended, hit + fresh,
                     device, host, disk, fresh, self._draw.uniform(0, 0.4), 0.01, 0.01,
                     far, 0.02)
            )  # fmt: skip
            session = self.sessions_now.pop(chain.session)
            self.sessions_now[chain.session] = session
            session.requests += 1
            session.prompt += hit + fresh
            session.device, session.host = session.device + device, session.host + host
            session.disk, session.far = session.disk + disk, session.far + far
            session.computed += fresh
            session.waited_s += 0.1
            session.missed_ms += fresh * 0.4
            session.missed["first_time"] = session.missed.get("first_time", 0) + fresh
            session.last_s = ended
        self._n_events += 1
        self._events.append(
            {"event": "evicted", "blocks": n, "tier": "host", "request_id": "r", "cause": "store"}
        )

    # -- the dashboard's questions -------------------------------------------------------------

    def snapshot(self, sessions: int, events_since: int) -> Snapshot:
        """See `Source`."""
        self.asked["snapshot"] += 1
        last = list(reversed(self.sessions_now.values()))[:sessions]
        new = min(len(self._events), self._n_events - events_since)
        n = sum(len(c.marks) // 8 for _, c in list(self.chains_now.values())[:100])
        host = Tier(
            name="host", on=True, blocks=n, bytes=7 << 30, capacity_bytes=8 << 30, leased=12,
            in_blocks=self._stamp, in_bytes=self._stamp * BLOCK_BYTES, out_blocks=self._stamp,
            out_bytes=self._stamp * 3 * BLOCK_BYTES, evicted_blocks=self._n_events * 3,
        )  # fmt: skip
        disk = Tier(
            name="disk", on=True, blocks=9 * n, bytes=31 << 30, capacity_bytes=100 << 30,
            in_bytes=self._stamp * BLOCK_BYTES // 2, out_bytes=self._stamp * BLOCK_BYTES // 5,
        )  # fmt: skip
        far = Tier(
            name="far", on=True, blocks=0, bytes=0, capacity_bytes=0,
            in_bytes=self._stamp * BLOCK_BYTES // 4,
            out_bytes=self._stamp * BLOCK_BYTES // 9, under_way=2,
        )  # fmt: skip
        tokens = {s: sum(getattr(one, s) for one in last) for s in
                  ("device", "host", "disk", "far", "computed")}  # fmt: skip
        return Snapshot(
            at_s=time.time(), model="made/up", pid=1, arena=self.name, block_tokens=16,
            block_bytes=BLOCK_BYTES, prefill_s_per_token=0.0004, tiers=(host, disk, far),
            samples=tuple(
                Sample("kvmem_prompt_tokens_total", (s,), float(v)) for s, v in tokens.items()
            ),
            running=3, n_sessions=len(self.sessions_now), sessions=tuple(last),
            turns=tuple(self._turns),
            causes=(
                Cause("evicted", tier="host", by="s3fifo", requests=40, tokens=90_000, ms=36_000.0,
                      fix="Give kvmem more host_gb, or a disk."),
                Cause("input_changed", role="system", requests=7, tokens=21_000, ms=8_400.0,
                      fix="Keep the clock out of the system prompt."),
            ),
            events=tuple(self._events)[len(self._events) - new :], n_events=self._n_events,
        )  # fmt: skip

    def chains(self, since: int) -> Chains:
        """See `Source`."""
        self.asked["chains"] += 1
        changed: list[Chain] = []
        stamp, n, more = since, 0, False
        for kept, chain in list(self.chains_now.values()):
            if kept <= since:
                continue
            if n > AT_ONCE:
                more = True
                break
            n += len(chain.marks) // 8
            changed.append(chain)
            stamp = kept
        numbers = array("Q", self.chains_now)
        lengths = [len(chain.marks) // 8 for _, chain in self.chains_now.values()]
        host = array(
            "i",
            (n if i % 3 == 0 else n // (1 + i % 4) for i, n in zip(numbers, lengths, strict=True)),
        )
        disk = array("i", (n if i % 5 < 2 else 0 for i, n in zip(numbers, lengths, strict=True)))
        return Chains(
            stamp, tuple(changed), numbers.tobytes(), host.tobytes(), disk.tobytes(), 16, more
        )

    def session(self, name: str) -> SessionDetail:
        """See `Source`."""
        self.asked["session"] += 1
        turns = tuple(turn for turn in self._turns if turn.session == name)
        return SessionDetail(self.name, self.sessions_now.get(name), turns)
