"""One conversation as token ids that are only ever added to (I8).

What an agent sends next is what it sent before, what the model sampled, and the new messages'
tokens: exactly those ids, so that the engine finds all of it that it has. Text goes in once; no
text comes back out to be rendered again.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvmem import hints
from kvmem.context import epochs, file
from kvmem.context.offload import BlobStore
from kvmem.context.probe import RULES, probe
from kvmem.context.renderer import Message, Probed, Renderer, canonical
from kvmem.context.seal import digest_of, find_volatile
from kvmem.context.spans import HEAD, ID, Link, Span, chain, link, spans_of
from kvmem.errors import ConfigError, PrefixBroken

__all__ = ["Change", "Ledger", "Span"]

ROLES = ("system", "user", "assistant", "tool")
Kind = Literal["chat", "completions"]


class Change(msgspec.Struct, frozen=True):
    """How a list of messages differs from the committed one, at message `index`.

    `kind`: "changed" in `fields`, "missing" from the list, or "new": not committed yet.
    """

    index: int
    kind: str
    role: str
    fields: tuple[str, ...] = ()


class Ledger:
    """See the module. `open` makes one; one thread uses it. Forks share all that came before."""

    def __init__(
        self,
        renderer: Renderer,
        last: Link,
        *,
        system: str | None,
        tools: Sequence[Any],
        session_id: str,
        cache_salt: str,
        epoch: int = 0,
        supersedes: str = "",
    ) -> None:
        self._renderer = renderer
        self._last = last
        self._system, self._tools = system, tuple(tools)
        self.session_id, self.cache_salt = session_id, cache_salt
        self.epoch, self.supersedes = epoch, supersedes
        # Whether the engine has to be told that what this session sent before is not sent again.
        self._tells = False
        # All ids in one piece, as far as link number _flat_to.
        self._flat: array[int] = array(ID)
        self._flat_to = -1
        # What the request that is out adds to the ledger: what ends the last turn, and asks.
        self._asked: tuple[int, list[int], str] | None = None

    # -- making ------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        renderer: Renderer,
        *,
        system: str | None = None,
        tools: Sequence[Any] = (),
        session_id: str = "",
        cache_salt: str = "",
        accept: Sequence[str] = (),
        seal: bool = True,
    ) -> Ledger:
        """A ledger that holds the head.

        Args:
            renderer: of the model that the ledger is for.
            system: the system prompt.
            tools: their JSON schemas; they never change.
            session_id: sent with every request.
            cache_salt: the engine's: other salts share nothing with it.
            accept: rules of `kvmem.context.probe` that the template may break: what was sent stays
                as it was sent, though the template would rewrite it.
            seal: refuse a head with volatile content.

        Raises:
            PrefixBroken: the template breaks a rule that is not accepted, or the head is volatile.
            ConfigError: `accept` names no rule.
        """
        unknown = sorted(set(accept) - set(RULES))
        if unknown:
            raise ConfigError(
                f"accept has no rule {', '.join(unknown)}",
                next_step=f"Known: {', '.join(RULES)}.",
                setting="accept",
            )
        if isinstance(renderer, Probed):
            found = probe(renderer, system=system is not None, tools=bool(tools))
            broken = [b for b in found if b.rule not in accept]
            if broken:
                rules = tuple(dict.fromkeys(b.rule for b in broken))
                raise PrefixBroken(
                    f"This chat template breaks {', '.join(rules)}: in {broken[0].conversation!r}, "
                    f"token {broken[0].at}, {broken[0].whole!r} is {broken[0].pieces!r} in pieces",
                    next_step=f"Accept it by accept={list(rules)!r}, or use another template.",
                    rules=rules,
                )
        volatile = find_volatile(system, tools) if seal else ()
        if volatile:
            first = volatile[0]
            raise PrefixBroken(
                f"The head is another one every time: {first.rule} {first.text!r} in "
                f"{first.where}, characters {first.start} to {first.stop}"
                + (f", and {len(volatile) - 1} more" if len(volatile) > 1 else ""),
                next_step=first.repair,
                findings=volatile,
            )
        ids = renderer.head(system, tools)
        head = link(None, ids, role=HEAD, source="rendered", message=digest_of(system, tools))
        return cls(
            renderer, head, system=system, tools=tools, session_id=session_id,
            cache_salt=cache_salt,
        )  # fmt: skip

    def fork(self, session_id: str, *, at: int | None = None) -> Ledger:
        """Another ledger with all of this one's past, or with its first `at` spans.

        It costs nothing, however long that is, but for going back to `at`.

        Raises:
            PrefixBroken: a request is out, or there is no such span.
        """
        self._settled("forked")
        last = self._last
        if at is not None:
            if not 1 <= at <= last.index + 1:
                raise PrefixBroken(
                    f"There are {last.index + 1} spans, not {at}",
                    next_step="The head is the first; give 1 to that number.",
                )
            while last.index >= at and last.before is not None:
                last = last.before
        other = self._with(last, session_id=session_id)
        other._tells = self._tells and session_id == self.session_id
        return other

    def _with(self, last: Link, **changes: Any) -> Ledger:
        kept: dict[str, Any] = {
            "system": self._system, "tools": self._tools, "session_id": self.session_id,
            "cache_salt": self.cache_salt, "epoch": self.epoch, "supersedes": self.supersedes,
        }  # fmt: skip
        return Ledger(self._renderer, last, **{**kept, **changes})

    # -- reading -----------------------------------------------------------------------------

    @property
    def system(self) -> str | None:
        """The head's system prompt."""
        return self._system

    @property
    def tools(self) -> tuple[Any, ...]:
        """The head's tools."""
        return self._tools

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans, the head first."""
        return tuple(spans_of(self._last))

    @property
    def n_tokens(self) -> int:
        """Committed tokens."""
        return self._last.span.stop

    @property
    def digest(self) -> str:
        """64 hex digits over all that is committed: equal ledgers have equal ones."""
        return self._last.digest.hex()

    def tokens(self) -> list[int]:
        """A copy of all committed ids."""
        return self._array().tolist()

    def _array(self) -> array[int]:
        for one in chain(self._last, after=self._flat_to):
            self._flat.extend(one.ids)
        self._flat_to = self._last.index
        return self._flat

    def __repr__(self) -> str:
        n = self._last.index
        return f"<Ledger {self.session_id or 'unnamed'}: {self.n_tokens:,} tokens, {n} messages>"

    # -- adding ------------------------------------------------------------------------------

    def append(self, *messages: Message, pin: bool = False) -> None:
        """Adds messages of the user, of tools or of the system at the tail; only they are rendered.

        Args:
            messages: as an OpenAI client sends them.
            pin: edits of history leave them in. Tools' errors are pinned without it (`is_error`,
                or a `status` of "error"): what went wrong is not to be tried again.

        Raises:
            PrefixBroken: a request is out, or the template refuses or rewrites.
        """
        self._settled("appended to")
        last = self._last
        for message in messages:  # all of them or none
            if message.get("role") not in ROLES:
                raise PrefixBroken(
                    f"A message of role {message.get('role')!r} is not known",
                    next_step=f"Use one of {', '.join(ROLES)}.",
                    role=message.get("role"),
                )
            lead = self._lead(last)
            ids = [*lead, *self._renderer.suffix(_role(last), message)]
            last = link(
                last, ids, role=str(message["role"]), source="rendered",
                message=canonical(message), lead=len(lead), pinned=pin or _is_error(message),
            )  # fmt: skip
        self._last = last

    def append_ids(
        self, ids: Sequence[int], *, role: str, message: Message | None = None, pin: bool = False
    ) -> None:
        """Adds ids that are a message's already: nothing is rendered or encoded.

        Raises:
            PrefixBroken: a request is out.
        """
        self._settled("appended to")
        lead = self._lead(self._last)
        told = canonical(message) if message is not None else b""
        self._last = link(
            self._last, [*lead, *ids] if lead else ids, role=role, source="given",
            message=told, lead=len(lead), pinned=pin,
        )  # fmt: skip

    def restore(self, store: BlobStore, uri: str, **fields: Any) -> None:
        """Appends what a stub stands for, byte for byte, as a tool's message (or `fields`' role).

        Raises:
            ConfigError, CorruptBlock: see `BlobStore.get`.
            PrefixBroken: a request is out, or the bytes are no text.
        """
        data = store.get(uri)
        try:
            content = data.decode()
        except UnicodeDecodeError as error:
            raise PrefixBroken(
                f"{uri} is no UTF-8 text", next_step="Append a description of it.", uri=uri
            ) from error
        self.append({"role": "tool", **fields, "content": content})

    def _lead(self, last: Link) -> list[int]:
        """What ends the model's turn, less what the model has sampled of it."""
        if last.span.source != "sampled":
            return []  # a rendered turn has its end
        close = self._renderer.close()
        said = last.ids[len(last.ids) - last.span.sampled :].tolist()
        for n in range(min(len(close), len(said)), 0, -1):
            if said[-n:] == close[:n]:
                return close[n:]
        return close

    def request(
        self, kind: Kind = "completions", *, prefill: str = "", **fields: Any
    ) -> dict[str, Any]:
        """The body for vLLM's endpoint, the prompt as ids; then `commit` the answer, or `retract`.

        Args:
            kind: "completions" (/v1/completions, every version) or "chat" (/v1/chat/completions,
                which takes `kv_transfer_params.prompt_token_ids` from vLLM 0.32 on and parses
                tools and reasoning).
            prefill: text that the model's turn is made to begin with (`kvmem.context.mask`).
            fields: the rest of the body: model, max_tokens, temperature, ...
        """
        lead = self._lead(self._last)
        role = _role(self._last)
        asked = [*lead, *self._renderer.generation(role), *self._renderer.encode(prefill)]
        self._asked = (len(lead), asked, prefill)
        ids = [*self.tokens(), *asked]
        body: dict[str, Any] = {**fields, "return_token_ids": True}
        if self.session_id:
            body["session_id"] = self.session_id
        if self.cache_salt:
            body["cache_salt"] = self.cache_salt
        parameters = self._parameters(fields)
        if kind == "completions":
            told = {"kv_transfer_params": parameters} if parameters else {}
            return {**body, **told, "prompt": ids, "add_special_tokens": False}
        parameters = {**parameters, "prompt_token_ids": ids}
        if self._tools:
            body["tools"] = list(self._tools)
        return {**body, "messages": self.messages(), "kv_transfer_params": parameters}

    def _parameters(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The body's `kv_transfer_params`. The first request of an epoch says that the prompts of
        its session before it are superseded, so that their blocks go first, unless the caller has
        hints of his own in it."""
        given = dict(fields.get("kv_transfer_params") or {})
        mine = given.get("kvmem") or {}
        if self._tells and self.session_id and isinstance(mine, Mapping) and "hints" not in mine:
            given["kvmem"] = {**mine, "hints": hints.envelope_of([hints.Supersede()])}
        return given

    def retract(self) -> None:
        """The request that is out will not be answered; nothing of it was committed."""
        self._asked = None

    def commit(self, response: Mapping[str, Any], *, choice: int = 0) -> Span:
        """Adds what the model sampled, by its ids; the answer is its span.

        Args:
            response: the endpoint's JSON, with `prompt_token_ids` and `token_ids`.
            choice: which of its choices.

        Raises:
            PrefixBroken: nothing was asked, the ids are not in it, or the engine was asked
                something else than this ledger: `at` is the first differing token. The ledger is
                as it was.
        """
        if self._asked is None:
            raise PrefixBroken("Nothing was asked", next_step="Send what `request` returns first.")
        choices = response.get("choices")
        if not isinstance(choices, Sequence) or not -len(choices) <= choice < len(choices):
            said = str(response.get("error") or choices)[:200]
            raise PrefixBroken(
                f"The response has no choice {choice}: {said}",
                next_step="`retract` the request, or send it again and commit its answer.",
            )
        chosen = choices[choice]
        sampled = chosen.get("token_ids")
        echoed = chosen.get("prompt_token_ids") or response.get("prompt_token_ids")
        if sampled is None or echoed is None:
            raise PrefixBroken(
                "The response has no token ids",
                next_step="Send `return_token_ids: true`, as `request` does, to a vLLM server.",
            )
        if not all(type(one) is int and 0 <= one < 1 << 31 for one in sampled):
            raise PrefixBroken(
                "The response's token ids are none",
                next_step="Commit what the engine answered, unchanged.",
            )
        lead, asked, prefill = self._asked
        sent = [*self.tokens(), *asked]
        if list(echoed) != sent:
            pairs = zip(echoed, sent, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(echoed), len(sent)))
            raise PrefixBroken(
                f"The engine was asked {len(echoed):,} tokens, not the {len(sent):,} of this "
                f"ledger; they differ from token {at:,} on",
                next_step="Send the body of `request` unchanged, one request at a time.",
                at=at,
            )
        message = chosen.get("message") or {"content": prefill + self._renderer.decode(sampled)}
        self._last = link(
            self._last, [*asked, *sampled], role="assistant", source="sampled",
            message=canonical({**message, "role": "assistant"}), lead=lead, sampled=len(sampled),
        )  # fmt: skip
        self._asked = None
        self._tells = False
        return self._last.span

    def _settled(self, what: str) -> None:
        if self._asked is not None:
            raise PrefixBroken(
                f"A ledger whose request is out cannot be {what}",
                next_step="`commit` the response first, or `retract` the request.",
            )

    # -- what others say of it ---------------------------------------------------------------

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as messages, for endpoints and people; what is sent are the ids."""
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        told = (span.message for span in self.spans if span.role != HEAD and span.message)
        return [*first, *(msgspec.json.decode(message) for message in told)]

    def check(self, messages: Sequence[Message]) -> list[Change]:
        """How a framework's own list of messages differs from what is committed, one by one.

        Only "new" at the end is as it should be: those can be appended. Anything else means that
        the framework rewrote history, and that sending its list would lose the prefix from there.
        """
        mine = self.messages()
        found = []
        for index in range(max(len(mine), len(messages))):
            if index >= len(messages):
                found.append(Change(index, "missing", str(mine[index].get("role"))))
            elif index >= len(mine):
                found.append(Change(index, "new", str(messages[index].get("role"))))
            else:
                a, b = mine[index], messages[index]
                # Left out and empty are one: `"tool_calls": []`.
                names = sorted({*a, *b})
                told = [n for n in names if _differ(a.get(n), b.get(n))]
                if told:
                    found.append(Change(index, "changed", str(b.get("role")), tuple(told)))
        return found

    # -- epochs ------------------------------------------------------------------------------

    def quote(
        self,
        *edits: epochs.Edit,
        prefill_tokens_s: float,
        block_tokens: int = 16,
        cached_price: float = 0.1,
    ) -> epochs.Quote:
        """What editing history would cost; nothing is changed. See `Quote`."""
        new = self.rewrite(*edits)
        return epochs.quote(
            self._array(), new._array(), prefill_tokens_s, block_tokens, cached_price
        )

    def rewrite(self, *edits: epochs.Edit) -> Ledger:
        """The next epoch: another ledger with an edited history, the only way to have one.

        Spans before the first edit are shared; what the model sampled stays as it was sampled. This
        ledger is as it was, and is what the new one `supersedes`: the first request of the new one
        says so to the engine (`kv_transfer_params["kvmem"]["hints"]`).

        Raises:
            PrefixBroken: a request is out, or an edit names no message.
        """
        self._settled("rewritten")
        links = chain(self._last)
        pieces = epochs.edited(links, edits)
        shared = 1  # the head; then all before the first difference
        while shared < min(len(links), len(pieces)) and pieces[shared] is links[shared]:
            shared += 1
        last = links[shared - 1]
        for piece in pieces[shared:]:
            last = self._again(last, piece)
        other = self._with(last, epoch=self.epoch + 1, supersedes=self.digest)
        other._tells = True
        return other

    def _again(self, last: Link, piece: Link | Message) -> Link:
        """The span after `last` that says what `piece` said."""
        lead = self._lead(last)
        if not isinstance(piece, Link):
            ids = [*lead, *self._renderer.suffix(_role(last), piece)]
            return link(
                last, ids, role=str(piece["role"]), source="rendered", message=canonical(piece),
                lead=len(lead),
            )  # fmt: skip
        span = piece.span
        if span.source == "sampled":
            # What asked the model was made for the turn before; what it was given to begin with
            # and what it sampled stay.
            before = piece.before if piece.before is not None else last
            asked = len(self._renderer.generation(_role(before)))
            said = piece.ids[span.lead + asked :].tolist()
            body = [*self._renderer.generation(_role(last)), *said]
        elif span.source == "rendered":
            message = msgspec.json.decode(span.message)
            body = self._renderer.suffix(_role(last), message)
        else:
            body = piece.ids[span.lead :].tolist()
        return link(
            last, [*lead, *body], role=span.role, source=span.source, message=span.message,
            lead=len(lead), sampled=span.sampled, pinned=span.pinned,
        )  # fmt: skip

    # -- keeping -----------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes it, private (0600) and in one step; equal ledgers are equal bytes.

        Raises:
            PrefixBroken: a request is out.
        """
        self._settled("saved")
        file.write(
            path,
            file.Saved(
                renderer=self._renderer.digest,
                system=self._system,
                tools=canonical(list(self._tools)),
                session_id=self.session_id,
                cache_salt=self.cache_salt,
                epoch=self.epoch,
                supersedes=self.supersedes,
                spans=list(self.spans),
                ids=self._array().tobytes(),
            ),
        )

    @classmethod
    def load(cls, path: Path, renderer: Renderer) -> Ledger:
        """What `save` wrote.

        Raises:
            ConfigError: it is no ledger, of another version or for another renderer, or damaged.
        """
        saved, last = file.read(path, renderer.digest)
        return cls(
            renderer, last, system=saved.system, tools=msgspec.json.decode(saved.tools),
            session_id=saved.session_id, cache_salt=saved.cache_salt, epoch=saved.epoch,
            supersedes=saved.supersedes,
        )  # fmt: skip


def _is_error(message: Message) -> bool:
    return message.get("is_error") is True or message.get("status") == "error"


def _differ(a: Any, b: Any) -> bool:
    return canonical(a or None) != canonical(b or None)


def _role(last: Link) -> str:
    return "system" if last.span.role == HEAD else last.span.role
