"""Which model is where, and whether its conversations can be made into the server's own ids here.

Before a renderer is used the server is asked for the ids of a few conversations (`/tokenize`), with
the request's own template arguments; they must be the renderer's. Where they are not, or there is
no tokenizer to be had, requests are handed on as they are and usage says why.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvmem.agents.gateway.messages import NotLedgered, formed, read
from kvmem.agents.gateway.settings import Settings
from kvmem.agents.gateway.tokenizer import FolderTokenizer, Pieces
from kvmem.agents.gateway.wire import Upstream
from kvmem.context.probe import probe
from kvmem.errors import ConfigError, EngineError, KVMemError, PrefixBroken

__all__ = ["Model", "Models", "NoModel"]

log = logging.getLogger("kvmem.gateway")
MOST_RENDERERS = 16
Headers = Mapping[str, str]

_TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
_CALLED = {"name": "find", "arguments": '{"q":"b"}'}
_CALL = {"id": "call00000", "type": "function", "function": _CALLED}
_PLAIN: list[dict[str, Any]] = [
    {"role": "user", "content": "Good day. "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": [{"type": "text", "text": "größe"}, {"type": "text", "text": "b"}]},
]
_USED: list[dict[str, Any]] = [
    {"role": "user", "content": "Find b."},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call00000", "content": "here"},
]
_SYSTEM = {"role": "system", "content": "Be brief."}
# Conversations whose ids are compared, and their tools; all must be equal, the first few at least.
_COMPARED: list[tuple[list[dict[str, Any]], list[Any]]] = [
    ([_SYSTEM, *_PLAIN[:1]], []),
    (_PLAIN[:1], []),
    ([_SYSTEM, *_PLAIN], []),
    ([_SYSTEM, *_USED], [_TOOL]),
]


class NoModel(KVMemError):
    """No upstream has the model."""


class _Cards(msgspec.Struct):
    data: list[dict[str, Any]]


class _Checked(msgspec.Struct, frozen=True):
    pieces: Pieces | None
    with_tools: bool
    reason: str


class Model:
    """One model at one upstream. `block_tokens` is 0 where the server does not tell."""

    def __init__(self, name: str, upstream: Upstream, block_tokens: int,
                 tokenizer: FolderTokenizer | None, why: str) -> None:  # fmt: skip
        self.name, self.upstream, self.block_tokens = name, upstream, block_tokens
        self._tokenizer, self._why = tokenizer, why
        self._checked: dict[bytes, _Checked] = {}
        self._lock = asyncio.Lock()
        self.ignores_ids = False  # an engine older than 0.32

    async def renderer(self, body: Mapping[str, Any], headers: Headers) -> Pieces:
        """What makes this request's ids.

        Raises:
            NotLedgered: nothing does; it says why.
        """
        if self._tokenizer is None:
            raise NotLedgered(self._why, reason="no_tokenizer")
        if self.ignores_ids:
            raise NotLedgered("the engine renders for itself", reason="engine_ignores_ids")
        template = dict(body.get("chat_template_kwargs") or {})
        effort = body.get("reasoning_effort")
        if effort is not None and "reasoning_effort" in self._tokenizer.chat_template:
            template.setdefault("reasoning_effort", effort)
        key = msgspec.json.encode(template, order="sorted")
        found = self._checked.get(key)
        if found is None:
            async with self._lock:
                found = self._checked.get(key) or await self._check(template, headers)
                if len(self._checked) >= MOST_RENDERERS:
                    self._checked.clear()
                self._checked[key] = found
        if found.pieces is None or (body.get("tools") and not found.with_tools):
            raise NotLedgered(found.reason, reason="template_differs")
        return found.pieces

    async def _check(self, template: dict[str, Any], headers: Headers) -> _Checked:
        assert self._tokenizer is not None
        try:
            pieces = Pieces(self._tokenizer, **template)
            equal = [
                await self._equal(pieces, messages, tools, template, headers)
                for messages, tools in _COMPARED
            ]
        except PrefixBroken as error:
            return self._refused(str(error))
        broken = sorted({one.rule for one in probe(pieces.chat)})
        if broken:
            log.warning(
                "%s: its template breaks %s; history stays as it was sent", self.name,
                ", ".join(broken),
            )  # fmt: skip
        if all(equal[:2]):
            with_tools = equal[-1]
            if not with_tools:
                log.warning("%s: tools are rendered otherwise by the server", self.name)
            return _Checked(pieces, with_tools, "tools are rendered otherwise by the server")
        return self._refused("the server renders otherwise than the template in the folder")

    def _refused(self, why: str) -> _Checked:
        log.warning("%s: requests are handed on as they are: %s", self.name, why)
        return _Checked(None, False, why)

    async def _equal(
        self, pieces: Pieces, messages: Sequence[dict[str, Any]], tools: Sequence[Any],
        template: dict[str, Any], headers: Headers,
    ) -> bool:  # fmt: skip
        body: dict[str, Any] = {"model": self.name, "messages": messages}
        if tools:
            body["tools"] = tools
        if template:
            body["chat_template_kwargs"] = template
        status, told = await self.upstream.post("/tokenize", body, headers)
        if status != 200:
            return False
        theirs = msgspec.json.decode(told).get("tokens")
        mine = pieces.chat.encode(
            pieces.chat.text(
                [formed(one) for one in messages],
                tools=read({"messages": messages, "tools": tools}).tools,
                generation=True,
            )
        )
        return bool(theirs == mine)


class Models:
    """Every model of every upstream; asked for again when one is not known."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.upstreams = [Upstream(url, timeout_s=settings.timeout_s) for url in settings.upstreams]
        self._known: dict[str, Model] = {}
        self._tokenizers: dict[Path, FolderTokenizer] = {}
        self._lock = asyncio.Lock()

    async def get(self, name: str, headers: Headers) -> Model:
        """The model of that name.

        Raises:
            NoModel: no upstream lists it.
            EngineError: none of them answers.
        """
        found = self._known.get(name)
        if found is None:
            async with self._lock:
                if name not in self._known:
                    await self.listed(headers)
                found = self._known.get(name)
        if found is None:
            raise NoModel(
                f"The model `{name}` does not exist",
                next_step=f"There are: {', '.join(sorted(self._known)) or 'none'}.",
                model=name,
            )
        return found

    async def listed(self, headers: Headers) -> list[dict[str, Any]]:
        """What `/v1/models` says at all of them; one that does not answer is left out.

        Raises:
            EngineError: none answers.
        """
        found: list[dict[str, Any]] = []
        failure: EngineError | None = None
        for upstream in self.upstreams:
            try:
                status, told = await upstream.get("/v1/models", headers)
            except EngineError as error:
                failure = error
                continue
            if status != 200:
                failure = EngineError(
                    f"{upstream.url}/v1/models answers {status}",
                    next_step="Give the server's API key in KVMEM_UPSTREAM_KEY.",
                    status=status,
                )
                continue
            try:
                cards = msgspec.json.decode(told, type=_Cards).data
            except msgspec.DecodeError:
                failure = EngineError(
                    f"{upstream.url}/v1/models is no list of models",
                    next_step="Give --upstream the address of an OpenAI-compatible server.",
                )
                continue
            found += cards
            fresh = [card for card in cards if card["id"] not in self._known]
            if fresh:
                blocks = await _block_tokens(upstream, headers)
                for card in fresh:
                    self._known[card["id"]] = self._model(card, upstream, blocks)
        if not found and failure is not None:
            raise failure
        return found

    def _model(self, card: Mapping[str, Any], upstream: Upstream, blocks: int) -> Model:
        name = str(card["id"])
        given = self._settings.tokenizers.get(name)
        # An adapter's own folder may have none: then it is its base model's.
        places = [given] if given else [Path(str(card.get(k))) for k in ("root", "parent")]
        why = f"no folder with the tokenizer of {name} is known; give --tokenizer {name}=FOLDER"
        for place in places:
            if not place.is_absolute() and given is None:
                base = self._known.get(str(place))
                if base is not None and base._tokenizer is not None:
                    return Model(name, upstream, blocks, base._tokenizer, "")
                continue
            try:
                if place not in self._tokenizers:
                    self._tokenizers[place] = FolderTokenizer(place)
                return Model(name, upstream, blocks, self._tokenizers[place], "")
            except ConfigError as error:
                why = str(error)
        log.warning("%s: requests are handed on as they are: %s", name, why)
        return Model(name, upstream, blocks, None, why)

    def forget(self, upstream: Upstream) -> None:
        """The server went away: what comes back may be another one, and is looked at again."""
        self._known = {n: m for n, m in self._known.items() if m.upstream is not upstream}

    def close(self) -> None:
        """Ends idle connections."""
        for upstream in self.upstreams:
            upstream.close()


async def _block_tokens(upstream: Upstream, headers: Headers) -> int:
    status, told = await upstream.get("/metrics", headers)
    found = re.search(rb'vllm:cache_config_info\{[^}]*block_size="(\d+)"', told)
    return int(found[1]) if status == 200 and found else 0
