"""The reason for every missed run of blocks, as requests come and go.

    known    what the tiers remember of missing blocks, at the moment of the look-up
    look     the earlier prompt that this one was meant to extend, and the runs
    over     the request is over: its runs, for the receipt and the page
    end      then the events, the sums, and what later prompts are compared with

`look` and `end` are done on a thread behind the scheduler's (`Behind`), since nothing of `look` is
needed before a request ends, and nothing of `end` at once. Hashes are compared, not tokens, and
nothing is decoded: what a change of the prompt's text was is the `Namer`'s to find, where a prompt
broke; an outline, where the request brought one, says it at once. Nothing here is text.

Thread safety: one thread calls all but `look` and `end`, which are called one at a time, by any.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvmem import events
from kvmem._core import pack_tokens
from kvmem.explain.misses.gone import Departure, Gone
from kvmem.explain.misses.naming import Broken, Namer
from kvmem.explain.misses.outline import Outline, compare
from kvmem.explain.misses.past import Past, Pasts, Prompt, first_difference, goes_on
from kvmem.explain.misses.reasons import fix_of
from kvmem.explain.misses.runs import Fates, Known, Lookup, Run, known_of, runs_of
from kvmem.explain.misses.sums import Cause, Pace, Sums

__all__ = ["Case", "Explained", "Explainer", "Record", "named", "told_of"]

RECENT = 32
ID_CHARS = 96
PAGE_BYTES = 12_000  # of the page's room
TOP_EVERY_S = 1.0


class Explained(msgspec.Struct, frozen=True):
    """A request, as it was looked up `at_s`."""

    request_id: str
    session: str
    prompt: int
    at_s: float
    runs: tuple[Run, ...]


class Record:
    """A request as the page has it, and its receipt; made anew where its break is named later."""

    __slots__ = ("explained", "packed", "told")

    def __init__(self, explained: Explained) -> None:
        self.become(explained)

    def become(self, explained: Explained) -> None:
        """It is now this."""
        self.told = [told_of(run) for run in explained.runs]
        self.packed = msgspec.msgpack.encode(explained)
        self.explained = explained


class Case:
    """A request's look-up, and what came of it: `record` once `look` has had it."""

    __slots__ = ("broken", "known", "lookup", "past", "prompt", "record", "shared")

    def __init__(self, lookup: Lookup, known: Sequence[Known]) -> None:
        self.lookup = lookup
        self.known = known
        self.prompt: Prompt | None = None
        self.past: Past | None = None
        self.shared = 0
        self.broken: Broken | None = None
        self.record: Record | None = None


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
        self.recent: deque[Record] = deque()
        self._recent_bytes = 0
        self._top: tuple[float, list[Cause]] = (-TOP_EVERY_S, [])
        self._block_tokens = block_tokens
        self._fates = fates
        self._bus = bus
        self._namer = namer
        self._policy = policy
        self._clock = clock
        # Requests that are over, and whose break is yet to be named.
        self._unnamed: OrderedDict[int, tuple[Broken, Run, Record]] = OrderedDict()

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
        runs = self._runs(case, prompt, before, tells_salt=True)
        case.record = Record(
            Explained(
                prompt.request_id[:ID_CHARS],
                prompt.session[:ID_CHARS],
                prompt.n_tokens,
                self._clock(),
                tuple(runs),
            )
        )

    def wait_for_name(self, case: Case, seconds: float) -> None:
        """Returns when a case's break is named, where it has one, or after so long."""
        if self._namer is not None and case.broken is not None:
            self._namer.wait(case.broken, seconds)

    def preview(self, case: Case, prompt: Prompt) -> list[Run]:
        """The runs of a prompt that nobody has sent; nothing is kept. Called as `look` is.

        That a session came with another salt is not told: this costs who asks nothing (I11).
        """
        return self._runs(case, prompt, None, tells_salt=False)

    def _runs(
        self, case: Case, prompt: Prompt, before: Case | None, *, tells_salt: bool
    ) -> list[Run]:
        past, shared = self.pasts.find(prompt)
        runs = runs_of(
            prompt,
            case.lookup,
            case.known,
            past,
            shared,
            block_tokens=self._block_tokens,
            other_salt=tells_salt and past is None and self.pasts.other_salt(prompt),
        )
        case.prompt, case.past, case.shared = prompt, past, shared
        if past is not None:
            runs = self._break(case, prompt, past, runs, before)
        ms = self.pace.s_per_token * 1e3
        return [msgspec.structs.replace(r, ms=round(r.tokens * ms, 3)) for r in runs]

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

    def over(self, case: Case) -> Record | None:
        """What is told of a request that is over; None where `look` never had its case."""
        record, broken = case.record, case.broken
        if record is None:
            return None
        if broken is not None and broken.verdict is not None:
            one = record.explained
            runs = tuple(named(run, broken) for run in one.runs)
            record.become(msgspec.structs.replace(one, runs=runs))
        self.recent.append(record)
        self._recent_bytes += len(record.packed)
        while self._recent_bytes > PAGE_BYTES or len(self.recent) > RECENT:
            self._recent_bytes -= len(self.recent.popleft().packed)
        return record

    def end(self, case: Case, *, reply: list[int], n_computed: int, store_off: str | None) -> None:
        """What comes of a request that is over: told, summed up, and kept.

        Args:
            case: that `look` had; its prompt's keys have grown with the reply.
            reply: the ids that were sampled.
            n_computed: tokens that have KV.
            store_off: by whom stores were off.
        """
        prompt, record, now = case.prompt, case.record, self._clock()
        assert prompt is not None
        assert record is not None
        runs = record.explained.runs
        self.pasts.keep(prompt, case.past, case.shared, reply, n_computed, store_off)
        for run in runs:
            self.sums.add(run, now)
            self._tell(prompt.request_id, run)
        unnamed = [run for run in runs if run.reason == "input_changed"]
        if unnamed and case.broken is not None and not unnamed[0].rule:
            self._unnamed[id(record)] = (case.broken, unnamed[0], record)
            if len(self._unnamed) > RECENT:
                self._unnamed.popitem(last=False)
        self.settle()

    def _tell(self, request_id: str, run: Run, was: str = "") -> None:
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
                was=was,
            )
        )

    def settle(self) -> None:
        """Takes in what the namer has found since, of requests that are over; `end` does."""
        for which in [i for i, (broken, _, _) in self._unnamed.items() if broken.done]:
            broken, run, record = self._unnamed.pop(which)
            new, now, one = named(run, broken), self._clock(), record.explained
            if new == run:
                continue
            self.sums.add(run, now, times=-1)
            self.sums.add(new, now)
            self._tell(one.request_id, new, run.reason)
            runs = tuple(new if other == run else other for other in one.runs)
            self._recent_bytes -= len(record.packed)
            record.become(msgspec.structs.replace(one, runs=runs))
            self._recent_bytes += len(record.packed)

    def top(self) -> list[Cause]:
        """The ten dearest causes of the last hour, as they were at most a second ago."""
        now = self._clock()
        if not 0 <= now - self._top[0] < TOP_EVERY_S:
            self._top = (now, self.sums.top(now))
        return self._top[1]

    def close(self) -> None:
        """Ends the namer's thread."""
        if self._namer is not None:
            self._namer.close()


def told_of(run: Run) -> dict[str, Any]:
    """A run as a receipt has it, with what to do about it."""
    told: dict[str, Any] = msgspec.to_builtins(run)
    fix = fix_of(run.reason)
    if fix:
        told["fix"] = fix
    return told


def named(run: Run, broken: Broken | None) -> Run:
    """The run under the name that was found for its change, where one was."""
    if run.reason != "input_changed" or broken is None or broken.verdict is None:
        return run
    verdict = broken.verdict
    return msgspec.structs.replace(
        run, reason=verdict.reason, role=verdict.role, message=verdict.message, rule=verdict.rule
    )
