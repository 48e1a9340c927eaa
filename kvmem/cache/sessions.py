"""What orchestrators say of their sessions, done as far as this engine can, each with a receipt.

A session is what requests of one salt call by one name, and nobody else can name it (I11): under
another salt it is as unknown as one that never was. Wishes have budgets (I7): pins are leases on
blocks in the host, up to a quarter of its slots; what is retained is worth more to the policy than
what nobody asked for, up to half of them; both end by themselves.

Thread safety: one thread, the one of the `Cache`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from kvmem import events, hints
from kvmem._core import HostTier
from kvmem.cache.keeping import Keeping, Ref
from kvmem.cache.moves import Moves, Promotion
from kvmem.hints import AnyAction, Receipt, Status
from kvmem.policy.keeper import BACK, OVER

__all__ = ["Brought", "Device", "Sessions", "Who"]

Who = tuple[bytes, str]  # the salt's digest, the session's name

PIN_SHARE, RETAIN_SHARE = 0.25, 0.5  # of the host's slots
MOST_S = 3600.0  # a pin, or what is retained
FORK_S = 60.0  # a prompt waits so long for a child that was announced
MOST_SESSIONS, MOST_BRANCHES = 65_536, 16
MOST_RETAINED, MOST_TOOLS, MOST_MOVES = 1024, 512, 4096
MOST_RECEIPTS = 512
MOST_ENDS = 4096  # of pins, before those that ended otherwise are left out
EVENTS_S, EVENTS = 1.0, 8  # so many refusals are told in such a time


class Brought(NamedTuple):
    """`begun` blocks are on their way to the device, -1 where there is no room for them; it has
    `there` of them."""

    begun: int
    there: int


class Device(Protocol):
    """The engine's own blocks, as far as they can be reached between requests."""

    @property
    def why_not(self) -> str:
        """Why they can't now; empty where they can."""

    def bring(self, chain: list[bytes]) -> Brought:
        """Begins to load what is missing there of a chain, from the host."""

    def leave(self, chain: list[bytes], own: int) -> int:
        """The last `own` blocks of a chain are the first to be evicted; how many are."""


class _Session:
    """`refs`: its branches, the newest last. `told`: somebody says what it does, so that a prompt
    that extends none of its branches means that the last one is left behind."""

    __slots__ = ("pin", "refs", "told")

    def __init__(self) -> None:
        self.refs: deque[Ref] = deque(maxlen=MOST_BRANCHES)
        self.told = False
        self.pin: tuple[int, int] | None = None  # its lease, and blocks


class Sessions:
    """See the module.

    Args:
        keeping: the order "agents"; None where another one decides.
        tier: the host's index.
        moves: between host and disk, where there is one.
        bus: where refusals are told.
        clock: seconds.
        order: the setting `eviction`.
    """

    def __init__(
        self,
        keeping: Keeping | None,
        tier: HostTier,
        moves: Moves | None,
        bus: events.Bus,
        clock: Callable[[], float],
        order: str,
    ) -> None:
        self._keeping, self._tier, self._moves = keeping, tier, moves
        self._bus, self._clock, self._order = bus, clock, order
        self._sessions: OrderedDict[Who, _Session] = OrderedDict()  # oldest first
        self._children: OrderedDict[Who, Ref] = OrderedDict()
        self._retained: dict[
            Ref, tuple[float, int, bool]
        ] = {}  # until when, blocks, its next prompt
        self._ends: list[tuple[float, int, Who, int]] = []  # of pins
        self._serial = itertools.count()
        self._pinned = 0
        self._tools: set[str] = set()
        self._ring: deque[tuple[bytes, Receipt]] = deque(maxlen=MOST_RECEIPTS)
        self._told_at, self._told, self._untold = 0.0, 0, 0
        self.counts: dict[str, int] = {}
        self.device: Device | None = None

    # -- prompts -----------------------------------------------------------------------------

    def agent_of(self, who: Who | None, *, told: bool) -> str | None:
        """By what name the policy is to know who sends a prompt; None where nobody says that its
        prompts are one history."""
        if who is None:
            return None
        session = self._sessions.get(who)
        if told or (session is not None and session.told):
            return f"{who[0].hex()}/{who[1]}"
        return None

    def sent(self, who: Who, ref: Ref, *, told: bool) -> None:
        """A session's prompt lies in this branch now."""
        session = self._sessions.get(who)
        if session is None:
            session = self._new(who)
        self._sessions.move_to_end(who)
        session.told = session.told or told
        if ref in session.refs:
            session.refs.remove(ref)
        session.refs.append(ref)
        until, _, next_prompt = self._retained.get(ref, (0.0, 0, False))
        if until and next_prompt:
            self._let_go(ref)
        parent = self._children.pop(who, None)
        if parent is not None and parent not in self._children.values():
            self._let_go(parent)  # the last child is there

    def _new(self, who: Who) -> _Session:
        session = self._sessions[who] = _Session()
        if len(self._sessions) > MOST_SESSIONS:
            self._forget(next(iter(self._sessions)))
        return session

    def expire(self) -> None:
        """Ends the pins whose time is over."""
        now_s = self._clock()
        while self._ends and self._ends[0][0] <= now_s:
            _, _, who, lease = heapq.heappop(self._ends)
            if self._pin_of(who) == lease:
                self._unpin(self._sessions[who])

    # -- actions -----------------------------------------------------------------------------

    def do(self, action: AnyAction, who: Who, ref: Ref | None = None) -> Receipt:
        """Does one action as far as it can be done.

        Args:
            action: what is asked.
            who: the session that it is about.
            ref: the branch of the request that it came with, if that is of this session.
        """
        receipt = self._do(action, who, ref)
        self.keep(who[0], receipt)
        return receipt

    def keep(self, salt: bytes, receipt: Receipt) -> None:
        """Notes a receipt for whoever asks under its salt, and tells of a refusal."""
        self._ring.append((salt, receipt))
        self.counts[receipt.status] = self.counts.get(receipt.status, 0) + 1
        if receipt.status not in ("rejected", "clipped"):
            return
        now_s = self._clock()
        if now_s - self._told_at >= EVENTS_S:
            self._told_at, self._told = now_s, 0
        self._told += 1
        if self._told > EVENTS:  # I7: a flood of them is one figure
            self._untold += 1
            return
        untold, self._untold = self._untold, 0
        self._bus.emit(
            events.HintRefused(
                do=receipt.do, status=receipt.status, reason=receipt.reason, untold=untold
            )
        )

    def receipts(self, salt: bytes) -> list[Receipt]:
        """The last ones of sessions under this salt, oldest first."""
        return [receipt for of, receipt in self._ring if of == salt]

    def _do(self, action: AnyAction, who: Who, ref: Ref | None) -> Receipt:
        name = who[1]
        do = str(action.__struct_config__.tag)

        def answer(
            status: Status, reason: str = "", *, blocks: int = 0, for_s: float = 0.0
        ) -> Receipt:
            return Receipt(
                do=do, session=name, status=status, reason=reason, blocks=blocks, for_s=for_s
            )

        keeping = self._keeping
        if keeping is None:
            return answer("rejected", f"blocks leave by {self._order} here: set eviction to agents")
        if keeping.off:
            return answer("rejected", f"the order agents is off: {keeping.off}")
        self.expire()
        session = self._sessions.get(who)
        if ref is None and session is not None:
            ref = next((one for one in reversed(session.refs) if keeping.is_known(one)), None)
        if ref is None or not keeping.is_known(ref):
            return answer("missing", "no prompt of such a session is known")
        if session is None:  # the request that asks has no session's name
            session = self._new(who)
            session.refs.append(ref)
        session.told = True
        match action:
            case hints.Retain():
                return self._retain(action, ref, answer)
            case hints.Pin():
                return self._pin(action, who, session, ref, answer)
            case hints.Demote():
                return self._demote(ref, answer)
            case hints.Prefetch():
                return self._prefetch(action, ref, answer)
            case hints.Release():
                self._end(session, (ref,))
                return self._soon(answer, blocks=keeping.n_blocks(ref))
            case hints.Supersede():
                # Those before the prompt that says so, where one does.
                mine = [one for one in session.refs if one != ref or action.session]
                self._end(session, mine)
                return self._soon(answer, blocks=sum(keeping.n_blocks(one) for one in mine))
            case hints.SessionEnd():
                blocks = keeping.n_blocks(ref)
                self._end(session, tuple(session.refs))
                self._forget(who)
                return self._soon(answer, blocks=blocks)
            case hints.Fork():
                return self._fork(action, who, ref, answer)
            case hints.ToolStarted():
                return self._tool(action.tool, ref, answer)
            case hints.ToolEnded():
                keeping.waits(ref, BACK)
                came = max(0, self._bring_up(ref))
                if not came and self.device is not None:
                    came = max(0, self.device.bring(keeping.chain(ref)).begun)
                return self._soon(answer, blocks=came)

    def _soon(self, answer: Callable[..., Receipt], **more: int) -> Receipt:
        """Accepted, as far as the policy is asked."""
        assert self._keeping is not None
        if self._keeping.leads == "lru":
            return answer("deferred", "plain LRU decides now: it did better of late", **more)
        return answer("accepted", **more)

    # -- retain, fork ------------------------------------------------------------------------

    def _retain(self, action: hints.Retain, ref: Ref, answer: Callable[..., Receipt]) -> Receipt:
        if action.for_s is None and action.until is None:
            return answer("rejected", "say for_s, until, or both")
        for_s = min(action.for_s or MOST_S, MOST_S)
        next_prompt = action.until is not None
        for child in [child for child, parent in self._children.items() if parent == ref]:
            del self._children[child]  # it is held for longer than until they come
        blocks = self._hold(ref, for_s, 1.0 + action.priority, next_prompt=next_prompt)
        if not blocks:
            return answer("rejected", "the budget of what is retained is spent")
        if action.for_s is not None and for_s < action.for_s:
            return answer("clipped", f"for {MOST_S:.0f} s at most", blocks=blocks, for_s=for_s)
        return answer("accepted", blocks=blocks, for_s=for_s)  # under LRU too

    def _hold(self, ref: Ref, for_s: float, weight: float, *, next_prompt: bool) -> int:
        assert self._keeping is not None
        keeping, now_s = self._keeping, self._clock()
        for one in [r for r, (u, _, _) in self._retained.items()
                    if u <= now_s or not keeping.is_known(r)]:  # fmt: skip
            del self._retained[one]
        self._retained.pop(ref, None)
        blocks = keeping.n_blocks(ref)
        held = sum(n for _, n, _ in self._retained.values())
        if held + blocks > RETAIN_SHARE * keeping.n_slots or len(self._retained) >= MOST_RETAINED:
            keeping.let_go(ref)
            return 0
        self._retained[ref] = (now_s + for_s, blocks, next_prompt)
        keeping.retain(ref, for_s, weight)
        return blocks

    def _let_go(self, ref: Ref) -> None:
        self._retained.pop(ref, None)
        if self._keeping is not None:
            self._keeping.let_go(ref)

    def _fork(
        self, action: hints.Fork, who: Who, ref: Ref, answer: Callable[..., Receipt]
    ) -> Receipt:
        assert self._keeping is not None
        until_s, blocks, _ = self._retained.get(ref, (0.0, 0, False))
        for_s = until_s - self._clock()
        if for_s > FORK_S and self._keeping.is_known(ref):
            return answer("accepted", "it is retained anyway", blocks=blocks, for_s=for_s)
        blocks = self._hold(ref, FORK_S, 50.0, next_prompt=False)
        if not blocks:
            return answer("rejected", "the budget of what is retained is spent")
        self._children[(who[0], action.child)] = ref
        if len(self._children) > MOST_RETAINED:
            self._children.popitem(last=False)
        return answer("accepted", blocks=blocks, for_s=FORK_S)

    # -- pin ---------------------------------------------------------------------------------

    def _pin(
        self,
        action: hints.Pin,
        who: Who,
        session: _Session,
        ref: Ref,
        answer: Callable[..., Receipt],
    ) -> Receipt:
        assert self._keeping is not None
        self._unpin(session)
        chain = self._keeping.chain(ref)
        there = self._tier.match(chain)
        wanted = len(chain)
        if action.tokens is not None:
            wanted = min(wanted, max(1, action.tokens // self._keeping.block_tokens))
        budget = int(PIN_SHARE * self._keeping.n_slots) - self._pinned
        blocks = min(wanted, there, max(0, budget))
        if not blocks:
            why = "the budget of pins is spent" if there else "nothing of it is in the host"
            return answer("rejected", why)
        lease, *_ = self._tier.acquire(chain, blocks - 1, blocks, use=False)
        if not lease:
            return answer("missing", "it left the host just now")
        for_s = min(action.for_s, MOST_S)
        session.pin = (lease, blocks)
        self._pinned += blocks
        if len(self._ends) > MOST_ENDS:  # most are of pins that ended otherwise
            self._ends = [end for end in self._ends if self._pin_of(end[2]) == end[3]]
            heapq.heapify(self._ends)
        heapq.heappush(self._ends, (self._clock() + for_s, next(self._serial), who, lease))
        if for_s < action.for_s:
            return answer("clipped", f"for {MOST_S:.0f} s at most", blocks=blocks, for_s=for_s)
        if blocks < wanted:
            why = "the budget of pins" if blocks < min(wanted, there) else "what the host has"
            return answer(
                "clipped", f"{blocks} of {wanted} blocks: {why}", blocks=blocks, for_s=for_s
            )
        return answer("accepted", blocks=blocks, for_s=for_s)

    def _pin_of(self, who: Who) -> int | None:
        session = self._sessions.get(who)
        return session.pin[0] if session is not None and session.pin is not None else None

    def _unpin(self, session: _Session) -> None:
        if session.pin is not None:
            (lease, blocks), session.pin = session.pin, None
            self._pinned -= blocks
            self._tier.release(lease)

    # -- tiers -------------------------------------------------------------------------------

    def _demote(self, ref: Ref, answer: Callable[..., Receipt]) -> Receipt:
        if self._keeping is None or self._moves is None:
            return answer("rejected", "there is no disk: say release")
        chain = self._keeping.chain(ref)
        there, below = self._tier.match(chain), self._moves.match(chain, 0)
        if below < there:
            return answer("rejected", f"{below} of {there} blocks are on the disk by now")
        blocks = self._keeping.cut_branch(ref)
        return answer("accepted" if blocks else "rejected", "" if blocks else "it is in use",
                      blocks=blocks)  # fmt: skip

    def _prefetch(
        self, action: hints.Prefetch, ref: Ref, answer: Callable[..., Receipt]
    ) -> Receipt:
        if action.to == "device":
            return self._to_device(ref, answer)
        if self._moves is None:
            return answer("rejected", "there is no disk to bring it up from")
        coming = self._bring_up(ref)
        if coming < 0:
            return answer("rejected", "too much is on its way between host and disk")
        return answer("deferred" if coming else "accepted", "" if coming else "it is there",
                      blocks=coming)  # fmt: skip

    def _to_device(self, ref: Ref, answer: Callable[..., Receipt]) -> Receipt:
        assert self._keeping is not None
        device = self.device
        why = "there is none to reach" if device is None else device.why_not
        if device is None or why:
            return answer("rejected", f"loads to the device begin when the request comes: {why}")
        came = self._bring_up(ref)
        if came > 0:
            return answer("deferred", "it comes up from the disk first", blocks=came)
        begun, there = device.bring(self._keeping.chain(ref))
        if begun:
            why = "" if begun > 0 else "there is no room on the device"
            return answer("deferred" if begun > 0 else "rejected", why, blocks=max(0, begun))
        if not there:
            return answer("rejected", "nothing of it is in the host")
        return answer("accepted", "it is there", blocks=there)

    def _bring_up(self, ref: Ref) -> int:
        """Begins to read what the disk has beyond the host; blocks, -1 where too much moves."""
        if self._keeping is None or self._moves is None:
            return 0
        if self._moves.n_under_way > MOST_MOVES:
            return -1
        chain = self._keeping.chain(ref)
        there, below = self._tier.match(chain), self._moves.match(chain, 0)
        if below <= there:
            return 0
        promotion = Promotion(self._clock(), there)
        self._moves.promote(promotion, 0, chain, there, below)
        self._moves.give_up(promotion)  # nobody waits for it; it goes on
        self._keeping.expect(ref)
        return below - there

    # -- tools, ends -------------------------------------------------------------------------

    def _tool(self, tool: str, ref: Ref, answer: Callable[..., Receipt]) -> Receipt:
        assert self._keeping is not None
        if tool not in self._tools and len(self._tools) >= MOST_TOOLS:
            self._keeping.waits(ref, "tool")
            return answer("clipped", f"{MOST_TOOLS} tools are known by name, this one is not")
        self._tools.add(tool)
        self._keeping.waits(ref, tool if tool == "user" else f"tool:{tool}")
        return self._soon(answer, blocks=self._keeping.n_blocks(ref))

    def _end(self, session: _Session, refs: tuple[Ref, ...] | list[Ref]) -> None:
        assert self._keeping is not None
        self._unpin(session)
        for ref in refs:
            if self.device is not None:
                self.device.leave(self._keeping.chain(ref), self._keeping.n_own(ref))
            self._let_go(ref)
            self._keeping.waits(ref, OVER)

    def _forget(self, who: Who) -> None:
        session = self._sessions.pop(who, None)
        if session is not None:
            self._unpin(session)

    # -- the whole ---------------------------------------------------------------------------

    def dropped(self) -> None:
        """Nothing is here any more: what was pinned or retained need not be held."""
        for session in self._sessions.values():
            self._unpin(session)
        for ref in list(self._retained):
            self._let_go(ref)

    def stats(self) -> dict[str, int]:
        """Sessions, blocks pinned and retained, receipts by status; any thread may ask."""
        return {
            "sessions": len(self._sessions),
            "pinned": self._pinned,
            "retained": sum(n for _, n, _ in list(self._retained.values())),
            **dict(self.counts),
        }
