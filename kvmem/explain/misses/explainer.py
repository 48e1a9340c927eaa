"""The reason for every missed run of blocks, as requests come and go.

    known   what the tiers remember of missing blocks, at the moment of the look-up
    look    the earlier prompt that this one was meant to extend, and the runs
    end     the request is over: the events, the sums, and what later prompts are compared with

`known` and `evicted` are the scheduler's; the rest is done on a thread, behind it (`Behind`), since
none of it is needed before a request ends. Hashes are compared, not tokens, and nothing is decoded:
what a change of the prompt's text was is the `Namer`'s to find, only for prompts that broke; an
outline, where the request brought one, says it at once. Nothing here is text.

Thread safety: `known` and `evicted` are called by one thread, all else under one lock.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import msgspec

from kvmem import events
from kvmem._core import pack_tokens
from kvmem.explain.misses.gone import Departure, Gone
from kvmem.explain.misses.naming import Broken, Namer
from kvmem.explain.misses.outline import Outline, compare
from kvmem.explain.misses.past import Past, Pasts, Prompt, first_difference, goes_on
from kvmem.explain.misses.runs import Fates, Known, Lookup, Run, known_of, runs_of
from kvmem.explain.misses.sums import Cause, Pace, Sums

__all__ = ["Case", "Explained", "Explainer"]

RECENT = 32
ID_CHARS = 96


class Explained(msgspec.Struct, frozen=True):
    """A request that is over."""

    request_id: str
    session: str
    prompt: int
    at_s: float
    runs: tuple[Run, ...]


class Case:
    """A request's look-up, and what came of it: `runs` once `look` has had it."""

    __slots__ = ("broken", "known", "lookup", "past", "prompt", "runs", "shared")

    def __init__(self, lookup: Lookup, known: Sequence[Known]) -> None:
        self.lookup = lookup
        self.known = known
        self.prompt: Prompt | None = None
        self.past: Past | None = None
        self.shared = 0
        self.broken: Broken | None = None
        self.runs: list[Run] | None = None

    def named(self) -> list[Run]:
        """The runs as they are known by now."""
        runs = self.runs or []
        return [_named(run, self.broken) for run in runs] if self.broken is not None else runs


class Explainer:
    """See the module.

    Args:
        block_tokens: tokens of a block.
        fates: who knows what became of blocks.
        bus: where the runs go as events.
        namer: who finds out what a change was; None for nobody.
        policy: the order that chooses which blocks leave.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        block_tokens: int,
        fates: Fates,
        bus: events.Bus,
        *,
        namer: Namer | None = None,
        policy: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.pasts = Pasts(block_tokens)
        self.gone = Gone()
        self.pace = Pace()
        self.sums = Sums()
        self.recent: deque[Explained] = deque(maxlen=RECENT)
        self._block_tokens = block_tokens
        self._fates = fates
        self._bus = bus
        self._namer = namer
        self._policy = policy
        self._clock = clock
        # Requests that are over, and whose break is yet to be named.
        self._unnamed: OrderedDict[str, tuple[Broken, Run]] = OrderedDict()

    # -- the scheduler's ---------------------------------------------------------------------

    def known(self, lookup: Lookup, keys: Sequence[bytes]) -> Case:
        """A case for what is missing beyond `lookup`; `keys` are those that kvmem has it under."""
        if not keys:
            return Case(lookup, ())
        first = max(lookup.stop, lookup.here) // self._block_tokens
        last = lookup.reach // self._block_tokens
        found = known_of(
            keys, first, last, self._fates, self.gone, no_boundary=lookup.no_boundary
        )  # fmt: skip
        return Case(lookup, found)

    def evicted(self, keys: bytes, tier: str, request_id: str, salt: bytes) -> None:
        """Blocks made room for a request."""
        self.gone.add(keys, Departure(self._clock(), tier, self._policy, request_id, salt))

    # -- a request is looked up --------------------------------------------------------------

    def look(self, case: Case, prompt: Prompt, before: Case | None = None) -> None:
        """Why what is missing of a prompt is missing; asked again, `before` is the case before."""
        past, shared = self.pasts.find(prompt)
        runs = runs_of(
            prompt,
            case.lookup,
            case.known,
            past,
            shared,
            block_tokens=self._block_tokens,
            other_salt=past is None and self.pasts.other_salt(prompt),
        )
        case.prompt, case.past, case.shared = prompt, past, shared
        if past is not None:
            runs = self._break(case, prompt, past, runs, before)
        case.runs = runs

    def _break(
        self, case: Case, prompt: Prompt, past: Past, runs: list[Run], before: Case | None
    ) -> list[Run]:
        """Says where and how a prompt differs from the one that it was meant to extend."""
        at = next((i for i, run in enumerate(runs) if run.reason == "input_changed"), None)
        if at is None:
            return runs
        run, token, packed = runs[at], None, b""
        if prompt.tokens is not None and past.tokens:
            packed = pack_tokens(prompt.tokens)
            token = first_difference(past.tokens, packed, case.shared * self._block_tokens)
        runs[at] = run = msgspec.structs.replace(run, token=token)
        verdict = None
        if past.outline and prompt.outline:
            where = run.first if token is None else token
            verdict = compare(Outline(past.outline), Outline(prompt.outline), where)
        if verdict is not None:
            runs[at] = msgspec.structs.replace(
                run, reason=verdict.reason, role=verdict.role, message=verdict.message,
                epoch=verdict.epoch,
            )  # fmt: skip
        elif before is not None and before.broken is not None and before.past is past:
            case.broken = before.broken
        elif self._namer is not None and token is not None:
            meant = bool(prompt.session) or goes_on(past, packed)
            case.broken = Broken(bytes(past.tokens), packed, token, past.n_prompt, meant=meant)
            self._namer.submit(case.broken)
        return runs

    # -- a request is over -------------------------------------------------------------------

    def end(
        self, case: Case, *, reply: list[int], n_computed: int, store_off: str | None
    ) -> list[Run]:
        """The runs of a request that is over, with what they cost: told, summed up, and kept.

        Args:
            case: that `look` had; its prompt's keys have grown with the reply.
            reply: the ids that were sampled.
            n_computed: tokens that have KV.
            store_off: by whom stores were off.
        """
        prompt, now = case.prompt, self._clock()
        assert prompt is not None
        ms = self.pace.s_per_token * 1e3
        runs = [msgspec.structs.replace(run, ms=round(run.tokens * ms, 3)) for run in case.named()]
        self.pasts.keep(prompt, case.past, case.shared, reply, n_computed, store_off)
        for run in runs:
            self.sums.add(run, now)
            self._tell(prompt.request_id, run)
        self.recent.append(
            Explained(prompt.request_id[:ID_CHARS], prompt.session[:ID_CHARS], prompt.n_tokens,
                      now, tuple(runs))
        )  # fmt: skip
        unnamed = [run for run in runs if run.reason == "input_changed"]
        if unnamed and case.broken is not None and case.broken.verdict is None:
            self._unnamed[prompt.request_id] = (case.broken, unnamed[0])
            if len(self._unnamed) > RECENT:
                self._unnamed.popitem(last=False)
        self.settle()
        return runs

    def _tell(self, request_id: str, run: Run) -> None:
        self._bus.emit(
            events.Missed(
                request_id=request_id,
                reason=run.reason,
                tokens=run.tokens,
                first=run.first,
                ms=run.ms,
                role=run.role,
                message=run.message,
                tier=run.tier,
            )
        )

    def settle(self) -> None:
        """Takes in what the namer has found since, of requests that are over."""
        if not self._unnamed:
            return
        for request_id in [i for i, (broken, _) in self._unnamed.items() if broken.done]:
            broken, run = self._unnamed.pop(request_id)
            named, now = _named(run, broken), self._clock()
            if named == run:
                continue
            self.sums.add(run, now, times=-1)
            self.sums.add(named, now)
            self._tell(request_id, named)
            for i, one in enumerate(self.recent):
                if one.request_id == request_id[:ID_CHARS] and run in one.runs:
                    runs = tuple(named if other == run else other for other in one.runs)
                    self.recent[i] = msgspec.structs.replace(one, runs=runs)

    def top(self) -> list[Cause]:
        """The ten dearest causes of the last hour."""
        return self.sums.top(self._clock())

    def close(self) -> None:
        """Ends the namer's thread."""
        if self._namer is not None:
            self._namer.close()


def _named(run: Run, broken: Broken | None) -> Run:
    if run.reason != "input_changed" or broken is None or broken.verdict is None:
        return run
    verdict = broken.verdict
    return msgspec.structs.replace(
        run, reason=verdict.reason, role=verdict.role, message=verdict.message, rule=verdict.rule
    )
