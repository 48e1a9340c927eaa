"""One vLLM server as its users reach it, over HTTP, and the few levers of its developer mode."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx

from benchmarks.soak.asks import Answer, Ask, body_of
from benchmarks.soak.plan import EVERYTHING

__all__ = ["MODEL", "Client", "RequestFailed"]

MODEL = "soak"
_STUCK_S = 600.0  # a request that takes longer will not end
_SAMPLE = re.compile(r"^(vllm:\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)


class RequestFailed(Exception):
    """A request came back without a whole answer, or not at all."""


class Client:
    """An HTTP client of one server; an async context manager.

    `transport` takes the place of the network, for tests.
    """

    def __init__(self, url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            transport=transport,
            timeout=_STUCK_S,
            # vLLM closes a connection that was idle for 5 s, and httpx keeps one for as long: a
            # request that takes it at that moment would fail.
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=32, keepalive_expiry=2.0
            ),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def ask(self, ask: Ask, on_token: Callable[[], None] = lambda: None) -> Answer | None:
        """The whole answer, or None where this client hung up first.

        Raises:
            RequestFailed: the server answered anything else, or not within ten minutes.
        """
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ask.give_up_s):
                    return await (self._streamed(ask, on_token) if ask.stream else self._whole(ask))
        except httpx.HTTPError as error:
            raise RequestFailed(f"{ask.kind}: {type(error).__name__}: {error}") from error
        return None

    async def reset(self, what: str, *, running: bool = False) -> bool:
        """Whether the engine says that it emptied its prefix cache, and kvmem's if asked.

        Raises:
            RequestFailed: it says neither yes nor no.
        """
        wanted = {"reset_external": what == EVERYTHING, "reset_running_requests": running}
        response = await self._http.post("/reset_prefix_cache", params=wanted)
        if response.status_code != httpx.codes.OK:
            raise RequestFailed(f"reset of {what}: {response.status_code} {response.text[:300]}")
        return bool(response.json()["success"])

    async def switch(self, *, on: bool) -> None:
        """Switches kvmem's loads and stores, both on or both off, from the next request on.

        Raises:
            RequestFailed: they are not, afterwards.
        """
        wanted = {"loads": on, "stores": on}
        response = await self._http.post("/v1/kvmem/switch", json=wanted)
        if response.status_code != httpx.codes.OK or response.json() != wanted:
            raise RequestFailed(f"switch: {response.status_code} {response.text[:300]}")

    async def metrics(self) -> dict[str, float]:
        """The server's own counters and gauges, each summed over its labels."""
        response = (await self._http.get("/metrics")).raise_for_status()
        totals: dict[str, float] = {}
        for name, value in _SAMPLE.findall(response.text):
            totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    async def _whole(self, ask: Ask) -> Answer:
        response = await self._http.post("/v1/completions", json=body_of(ask, MODEL))
        if response.status_code != httpx.codes.OK:
            raise RequestFailed(f"{ask.kind}: {response.status_code} {response.text[:300]}")
        return _whole([response.json()], ask)

    async def _streamed(self, ask: Ask, on_token: Callable[[], None]) -> Answer | None:
        chunks: list[dict[str, Any]] = []
        n_tokens = 0
        request = self._http.stream("POST", "/v1/completions", json=body_of(ask, MODEL))
        async with request as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise RequestFailed(f"{ask.kind}: {response.status_code} {text[:300]}")
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunks.append(json.loads(data))
                n_tokens += sum(len(c["token_ids"] or ()) for c in chunks[-1].get("choices", ()))
                if n_tokens:
                    on_token()
                if ask.give_up_tokens is not None and ask.give_up_tokens <= n_tokens < ask.n_tokens:
                    return None  # leaving the block closes the connection
        return _whole(chunks, ask)


def _whole(chunks: list[dict[str, Any]], ask: Ask) -> Answer:
    """The answer that the chunks make up.

    Raises:
        RequestFailed: it ended early, or for another reason than its length.
    """
    tokens: list[int] = []
    logprobs: list[float] = []
    best: list[dict[int, float]] = []
    ends: list[str] = []
    for chunk in chunks:
        if "error" in chunk:
            raise RequestFailed(f"{ask.kind}: {json.dumps(chunk['error'])[:300]}")
        for choice in chunk["choices"]:
            tokens += choice["token_ids"] or ()
            told = choice["logprobs"] or {"token_logprobs": (), "top_logprobs": ()}
            logprobs += told["token_logprobs"]
            best += [_by_id(place) for place in told["top_logprobs"]]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    if ends != ["length"] or not len(tokens) == len(logprobs) == len(best) == ask.n_tokens:
        raise RequestFailed(
            f"{ask.kind}: {len(tokens)} of {ask.n_tokens} tokens, {len(logprobs)} logprobs, {ends}"
        )
    return Answer(tokens, logprobs, best)


def _by_id(place: dict[str, float]) -> dict[int, float]:
    return {int(token.removeprefix("token_id:")): value for token, value in place.items()}
