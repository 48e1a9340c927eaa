"""Reads a file call by call and says of each prompt what it kept of the one before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from kvmem.explain.lint.cached import MOST_BLOCKS, IdCache, PrefixCache
from kvmem.explain.lint.chains import Chain, Chains
from kvmem.explain.lint.classify import classify, first_difference, says_the_same
from kvmem.explain.lint.measure import CHARACTERS_PER_TOKEN, Characters, Measure
from kvmem.explain.lint.readers import FORMATS, reader_of
from kvmem.explain.lint.rules import rule
from kvmem.explain.lint.tally import Tally
from kvmem.explain.lint.values import Break, Call, Fault, FileReport, Part, Request
from kvmem.explain.lint.volatile import common_length

__all__ = ["Linter", "lint_file"]

_EXCERPT = 60
_FEW = 0.2  # of the ids are kept: less is a compaction
Repair = Callable[[Call, Chain], None]


def lint_file(
    path: Path,
    *,
    form: str | None = None,
    measure: Measure | None = None,
    block_tokens: int = 16,
    with_requests: bool = False,
    repair: Repair | None = None,
) -> FileReport:
    """What is in a file, in one pass and bounded memory.

    Args:
        path: of the log; gzip is seen by its first bytes.
        form: one of `readers.FORMATS`; None lets the file's first records say.
        measure: what prompts are counted in; None counts characters.
        block_tokens: of the engine that the cached tokens are predicted for. A trace of hashed
            blocks has its own.
        with_requests: list every request with its predicted cached tokens.
        repair: is given each call and the chain that it should extend, and may change the call's
            parts before they are looked at.

    Raises:
        ConfigError: the file can't be read, or `form` is unknown.
        ValueError: block_tokens out of range.
    """
    reader = reader_of(path, form)
    linter = Linter(str(path), measure or Characters(), block_tokens, with_requests, repair)
    if reader is None:
        reason = f"no record of a known form ({', '.join(FORMATS)})"
        linter.tally.fault(Fault(str(path), 1, reason, "Give its form with --format."))
        return linter.tally.report(form or "unknown")
    for found in reader.calls(path):
        if isinstance(found, Fault):
            linter.tally.fault(found)
        else:
            linter.call(found)
    return linter.tally.report(reader.name)


class Linter:
    """Takes calls in order; `tally` has what was found.

    Raises:
        ValueError: block_tokens out of range.
    """

    def __init__(
        self,
        path: str,
        measure: Measure,
        block_tokens: int = 16,
        with_requests: bool = False,
        repair: Repair | None = None,
    ) -> None:
        self.tally = Tally(path, measure.unit, block_tokens, with_requests)
        self._path, self._measure, self._block = path, measure, block_tokens
        self._repair = repair
        self._chains = Chains()
        self._tokens = PrefixCache(block_tokens)
        self._ids = IdCache()
        self._prefixes: dict[bytes, None] = {}

    def call(self, call: Call) -> Request:
        """Takes the next call of the log.

        Returns:
            How much of its prompt was to be found.
        """
        chain = self._chains.of(call)
        held = chain.held
        chain.turn += 1
        if self._repair is not None:
            self._repair(call, chain)
        of = self._call_of_parts if call.ids is None else self._call_of_ids
        request = of(call, chain)
        chain.line = call.line
        self._chains.measured(held, chain)
        self.tally.request(request)
        return request

    # -- prompts of which only ids are known ------------------------------------------------------

    def _call_of_ids(self, call: Call, chain: Chain) -> Request:
        ids, per_id = call.ids or [], call.tokens_per_id
        self.tally.unit = "token"
        if per_id == 1:
            size, block = len(ids), self._block
            cached = self._tokens.find(ids, call.output)
        else:
            self.tally.block_tokens = block = per_id
            size = call.input_tokens if call.input_tokens is not None else len(ids) * per_id
            scope = chain.session if call.scope == "session" else None
            cached = self._ids.find(
                ids, known=call.known_ids, scope=scope, tokens=size, per_id=per_id
            )
        request = Request(call.line, chain.session, chain.agent, chain.turn, size, cached)
        kept = common_length(chain.ids[: chain.n_whole], ids)
        again = 0
        if chain.turn and kept < chain.n_whole:
            reach = min(chain.n_whole * per_id, max(0, size - 1)) // block * block
            again = max(0, reach - cached)
            name = _rule_of_ids(kept, chain.n_whole, len(ids))
            self._broken(call, chain, None, at=kept * per_id, offset=0, name=name, lost=again)
        new = max(0, size - cached)
        self.tally.prefill(chain, "prompt", new - min(new, again), min(new, again))
        # In the last block of hashes is the prompt's end, which a template may write otherwise once
        # a reply follows; of token ids none is in doubt.
        whole = min(len(ids), size // per_id)
        chain.ids, chain.n_whole = ids, whole if per_id == 1 else max(0, whole - 1)
        return request

    # -- prompts with their text ------------------------------------------------------------------

    def _call_of_parts(self, call: Call, chain: Chain) -> Request:
        before = [*chain.parts, *self._reply(call, chain)]
        n_same = first_difference(chain.parts, call.parts)
        n_same = len(chain.parts) if n_same is None else n_same
        units = [*chain.units[:n_same], *map(self._measure.units, call.parts[n_same:])]
        place = f"{call.model or chain.model or ''}\0{call.cache_salt}"
        stays = place == chain.place
        keys = self._keys(chain, call.parts, n_same if stays else 0, place)
        chain.place = place
        size = sum(map(len, units))
        at = self._first_broken(call, chain, before)
        moved = chain.turn > 0 and _differ(chain.model, call.model)
        cached = self._cached(chain, units, keys, n_same if stays else -1, moved)
        if self._measure.unit == "token":
            size += len(self._measure.tail())
        again = 0
        if at is not None:
            again = self._break_parts(call, chain, before, at, units, size, cached)
        self.tally.parts(chain, call.parts, units, cached, again)
        chain.parts, chain.reply, chain.model = call.parts, call.reply, call.model or chain.model
        chain.units, chain.keys, chain.size = units, keys, size
        return Request(call.line, chain.session, chain.agent, chain.turn, size, cached)

    def _reply(self, call: Call, chain: Chain) -> list[Part]:
        """The reply to the prompt before, where it is known and was taken into this one."""
        n = len(chain.parts)
        taken = chain.reply is not None and len(call.parts) > n
        return [chain.reply] if taken and call.parts[n].role == "assistant" else []  # type: ignore[list-item]

    def _first_broken(self, call: Call, chain: Chain, before: list[Part]) -> int | None:
        if chain.turn == 0 or not chain.parts:
            return None
        if _differ(chain.model, call.model):
            return 0
        if before and before[0].kind == "text" and call.parts:
            return None if call.parts[0].text.startswith(before[0].text) else 0
        return first_difference(before, call.parts)

    def _keys(self, chain: Chain, parts: list[Part], n_same: int, place: str) -> list[bytes]:
        keys = chain.keys[:n_same]
        begin = hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        last = keys[-1] if keys else begin
        for part in parts[n_same:]:
            text = "\0".join((part.kind, part.role, part.text))
            last = hashlib.blake2b(
                text.encode("utf-8", "surrogatepass"), key=last, digest_size=16
            ).digest()
            keys.append(last)
        return keys

    def _cached(
        self,
        chain: Chain,
        units: list[str | list[int]],
        keys: list[bytes],
        n_same: int,
        moved: bool,
    ) -> int:
        if self._measure.unit == "token":
            prompt = [token for part in units for token in part]
            whole_prompt = [*prompt, *self._measure.tail()]
            found = self._tokens.find(whole_prompt, place=chain.place)  # type: ignore[arg-type]
            return 0 if moved else found
        whole = 0
        while whole < len(keys) and keys[whole] in self._prefixes:
            whole += 1
        cached = sum(map(len, units[:whole]))
        if whole == n_same and n_same < min(len(chain.units), len(units)):
            cached += common_length(chain.units[n_same], units[n_same])  # type: ignore[arg-type]
        for key in keys[whole:]:
            self._prefixes[key] = None
        while len(self._prefixes) > MOST_BLOCKS:
            del self._prefixes[next(iter(self._prefixes))]
        return 0 if moved else cached

    def _break_parts(
        self,
        call: Call,
        chain: Chain,
        before: list[Part],
        at: int,
        units: list[str | list[int]],
        size: int,
        cached: int,
    ) -> int:
        """Records a break; units that must be computed again."""
        old = [*chain.units, *map(self._measure.units, before[len(chain.parts) :])]
        if _differ(chain.model, call.model):
            name, offset = "model-changed", 0
        else:
            name = classify(before, call.parts, at, n_sent=len(chain.parts))
            offset = common_length(old[at], units[at]) if at < len(units) else 0  # type: ignore[arg-type]
        position = sum(map(len, units[:at])) + offset
        sent = sum(map(len, old))
        if self._measure.unit == "token":
            reach = min(sent, size - 1) // self._block * self._block
        else:
            reach = min(sent, size)
        lost = max(0, reach - cached)
        part = before[at]
        found = (part, call.parts[at] if at < len(call.parts) else None)
        self._broken(call, chain, found, at=position, offset=offset, name=name, lost=lost)
        return lost

    def _broken(
        self,
        call: Call,
        chain: Chain,
        parts: tuple[Part, Part | None] | None,
        *,
        at: int,
        offset: int,
        name: str,
        lost: int,
    ) -> None:
        broken = rule(name)
        unit = self.tally.unit
        old, new = parts if parts else (None, None)
        shown = new or old
        char = common_length(old.text, new.text) if old and new else 0
        found = Break(
            self._path,
            call.line,
            chain.session,
            chain.agent,
            chain.turn,
            shown.role if shown else "prompt",
            shown.message if shown else None,
            at,
            offset,
            unit,
            broken.id,
            name,
            lost if unit == "token" else -(-lost // CHARACTERS_PER_TOKEN),
            broken.fix,
            call.body is not None
            and old is not None
            and new is not None
            and says_the_same(name, old, new),
            _excerpt(old, char),
            _excerpt(new, char),
        )
        self.tally.broken(found)


def _differ(before: str | None, now: str | None) -> bool:
    return before is not None and now is not None and before != now


def _rule_of_ids(kept: int, n_before: int, n_now: int) -> str:
    if kept == n_now:
        return "ids-rewound"
    return "ids-compacted" if kept < _FEW * n_before else "ids-edited"


def _excerpt(part: Part | None, at: int) -> str:
    if part is None:
        return ""
    start = max(0, at - _EXCERPT // 3)
    return part.text[start : start + _EXCERPT]
