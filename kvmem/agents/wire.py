"""HTTP to one engine: a body of token ids out, ids back; what failed on the way is sent again.

A retry sends the same ids, so what the engine had computed is found again. A stream that broke off
goes on from the ids that had come: they are part of the prompt then, and nothing is sampled twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from kvmem.agents.values import Where
from kvmem.errors import (
    ConfigError,
    EngineError,
    EngineUnavailable,
    RequestRefused,
    TurnTimeout,
)

if TYPE_CHECKING:
    import httpx

__all__ = ["Answer", "Retries", "Wire"]

log = logging.getLogger("kvmem.agents")

COMPLETIONS = "/v1/completions"
MODELS = "/v1/models"
CONNECT_S = 10.0
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that pass
NOBODY = Where("The runtime", 0)


class Retries(msgspec.Struct, frozen=True):
    """How often a request is sent again, and how long it waits before: twice as long each time.

    A server's Retry-After is waited for instead, where it says one.
    """

    times: int = 2
    first_wait_s: float = 0.25
    longest_wait_s: float = 8.0

    def wait_s(self, attempt: int, asked_s: float | None) -> float:
        """Before attempt number `attempt`; the first retry is 1."""
        doubled = self.first_wait_s * 2.0 ** (attempt - 1)
        return min(self.longest_wait_s, doubled if asked_s is None else asked_s)


class Answer(msgspec.Struct):
    """What has come of an answer so far.

    Args:
        response: in the form of vLLM's endpoint, the ids in `choices[0]`.
        attempts: how often the request was sent.
        first_s: seconds to the first token, of streams.
    """

    response: dict[str, Any]
    attempts: int = 1
    first_s: float | None = None


class _Passing(Exception):
    """A fault that a retry may get over."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class Wire:
    """See the module. One event loop uses it.

    Args:
        base_url: the server, with or without `/v1`.
        api_key: the server's, if it wants one.
        retries: see `Retries`.
        transport: instead of the network, for tests.

    Raises:
        ConfigError: httpx is not installed, or the address is none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "",
        retries: Retries = Retries(),  # noqa: B008 - it never changes
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise ConfigError(
                "Agents talk to their engine through httpx, which is not installed",
                next_step="Run `pip install 'kvmem[agents]'`.",
            ) from error
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"base_url {base_url!r} is no address of a server",
                next_step="Give one like http://127.0.0.1:8000.",
                setting="base_url",
            )
        self._retries = retries
        self._client = httpx.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_S),  # a turn's own limit bounds the rest
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            transport=transport,
        )

    async def close(self) -> None:
        """Ends the connections."""
        await self._client.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """The models that the server has.

        Raises:
            EngineUnavailable, RequestRefused: see `complete`.
        """
        told, _ = await self._with_retries("GET", MODELS, None, NOBODY)
        if not isinstance(told.get("data"), list):
            raise self._no_engine(MODELS, NOBODY)
        return list(told["data"])

    async def metrics(self) -> str:
        """The server's own figures as Prometheus text; empty where it gives none."""
        import httpx

        try:
            response = await self._client.get("/metrics")
        except httpx.RequestError:
            return ""  # whoever asks has a default
        return response.text if response.status_code == 200 else ""

    async def post(self, path: str, body: Mapping[str, Any]) -> int:
        """Sends a body once; the answer's status, 0 where there is none."""
        import httpx

        try:
            return (await self._client.post(path, json=body)).status_code
        except httpx.RequestError as error:
            log.info("%s%s: %s", self.base_url, path, type(error).__name__)
            return 0

    async def complete(
        self, body: Mapping[str, Any], where: Where, *, timeout_s: float | None = None
    ) -> Answer:
        """The whole answer to a body of `Ledger.request`.

        Raises:
            TurnTimeout: it took longer than `timeout_s`, retries included.
            EngineUnavailable: the server was not reached, broke off or is overloaded.
            RequestRefused: it answered that it will not.
        """
        async with _Bound(where, timeout_s).left():
            told, attempts = await self._with_retries("POST", COMPLETIONS, body, where)
        if not told.get("choices"):
            raise self._no_engine(COMPLETIONS, where)
        return Answer(told, attempts)

    async def stream(
        self,
        body: Mapping[str, Any],
        where: Where,
        *,
        timeout_s: float | None = None,
        restart: bool = False,
    ) -> AsyncGenerator[tuple[str, Answer], None]:
        """Pieces of text as they come, each with all that came so far; the last holds the whole.

        Args:
            body: of `Ledger.request`.
            where: whose turn.
            timeout_s: for the whole answer, retries included.
            restart: begin anew where a stream that is held to a grammar breaks off: such a one
                cannot go on in the middle. The pieces that came are void then.

        Raises:
            TurnTimeout, EngineUnavailable, RequestRefused: see `complete`.
        """
        began = time.monotonic()
        answer = Answer({"choices": [_empty_choice()], "usage": {}}, attempts=0)
        bound = _Bound(where, timeout_s)
        while True:
            answer.attempts += 1
            pieces = self._read(body, answer, where)
            try:
                async with contextlib.aclosing(pieces):
                    while True:
                        async with bound.left():
                            text = await anext(pieces, None)
                        if text is None:
                            return
                        if answer.first_s is None:
                            answer.first_s = time.monotonic() - began
                        yield text, answer
            except _Passing as fault:
                held = "structured_outputs" in body and answer.response["choices"][0]["token_ids"]
                if held and not restart:
                    raise self._given_up(answer.attempts, fault, where) from fault
                if held:
                    answer.response["choices"] = [_empty_choice()]
                async with bound.left():
                    await self._wait(answer.attempts, fault, where)

    async def _read(
        self, body: Mapping[str, Any], answer: Answer, where: Where
    ) -> AsyncGenerator[str, None]:
        """One attempt at a stream: fills the answer up, yields text."""
        import httpx

        rest = _rest(body, answer.response["choices"][0])
        if rest["max_tokens"] <= 0:  # all had come but the end
            answer.response["choices"][0]["finish_reason"] = "length"
            return
        try:
            async with self._client.stream("POST", COMPLETIONS, json=rest) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._raise_for(response, where)
                whole = False
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        whole = True
                        break
                    text = _take(msgspec.json.decode(line[6:]), answer.response)
                    if text is not None:
                        yield text
                if not whole:
                    raise _Passing("the stream ended before its end")
        except httpx.RequestError as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        except msgspec.DecodeError as error:
            raise _Passing(f"a line of the stream is no JSON: {error}") from error

    async def _with_retries(
        self, method: str, path: str, body: Mapping[str, Any] | None, where: Where
    ) -> tuple[dict[str, Any], int]:
        import httpx

        attempt = 0
        while True:
            attempt += 1
            try:
                try:
                    response = await self._client.request(method, path, json=body)
                except httpx.RequestError as error:
                    raise _Passing(f"{type(error).__name__}: {error}") from error
                if response.status_code != 200:
                    self._raise_for(response, where)
                try:
                    return dict(response.json()), attempt
                except (ValueError, TypeError) as error:
                    raise self._no_engine(path, where) from error
            except _Passing as fault:
                await self._wait(attempt, fault, where)

    async def _wait(self, attempt: int, fault: _Passing, where: Where) -> None:
        """Before the next attempt; the last fault is raised."""
        if attempt > self._retries.times:
            raise self._given_up(attempt, fault, where) from fault
        await asyncio.sleep(self._retries.wait_s(attempt, fault.wait_s))

    def _given_up(self, attempts: int, fault: _Passing, where: Where) -> EngineUnavailable:
        return EngineUnavailable(
            f"{where}: {self.base_url} failed {attempts} times, at last by {fault}",
            next_step="Look whether the server runs; then do the turn again: its session is as it "
            "was before.",
            attempts=attempts, **where.details,
        )  # fmt: skip

    def _no_engine(self, path: str, where: Where) -> EngineError:
        return EngineError(
            f"{where}: what {self.base_url}{path} answers is not vLLM's",
            next_step="Give the address of a vLLM server, or look at the proxy before it.",
            **where.details,
        )

    def _raise_for(self, response: httpx.Response, where: Where) -> NoReturn:
        """Raises what a status other than 200 means."""
        status = response.status_code
        if status in AGAIN:
            asked = response.headers.get("retry-after", "")
            raise _Passing(f"status {status}", float(asked) if asked.isdecimal() else None)
        try:
            said = msgspec.json.decode(response.content)["error"]["message"]
        except (msgspec.DecodeError, KeyError, TypeError):
            said = response.text[:400]
        step = {
            401: "Give the server's key: Runtime(..., api_key=...).",
            404: "Give the address of a vLLM server and a model that it has.",
        }.get(status, "Change the request by what it says; a prompt that is too long is made "
              "shorter by a new epoch (docs/context.md).")  # fmt: skip
        raise RequestRefused(
            f"{where}: {self.base_url} answered {status}: {said}",
            next_step=step, status=status, **where.details,
        )  # fmt: skip


class _Bound:
    """A turn's time: it ends what is awaited within it, and never the code in between."""

    def __init__(self, where: Where, timeout_s: float | None) -> None:
        self._where, self._timeout_s = where, timeout_s
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s

    @contextlib.asynccontextmanager
    async def left(self) -> AsyncIterator[None]:
        left = None if self._ends is None else max(0.0, self._ends - time.monotonic())
        try:
            async with asyncio.timeout(left):
                yield
        except TimeoutError as error:
            raise TurnTimeout(
                f"{self._where}: no whole answer within {self._timeout_s:g} s",
                next_step="Give it more time by timeout_s, or ask for fewer tokens: its session "
                "is as it was before.",
                timeout_s=self._timeout_s, **self._where.details,
            ) from error  # fmt: skip


def _empty_choice() -> dict[str, Any]:
    return {
        "index": 0, "text": "", "token_ids": [], "prompt_token_ids": None, "finish_reason": None,
    }  # fmt: skip


def _rest(body: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The body that asks for what has not come yet."""
    come = chosen["token_ids"]
    rest = {**body, "stream": True, "stream_options": {"include_usage": True}}
    if come:
        rest["prompt"] = [*body["prompt"], *come]
        rest["max_tokens"] = body["max_tokens"] - len(come)
    return rest


def _take(chunk: Mapping[str, Any], response: dict[str, Any]) -> str | None:
    """Puts a chunk to what came before; its text, where it has some."""
    if "error" in chunk:
        raise _Passing(f"the engine broke off: {chunk['error']}")
    for key in ("usage", "kv_transfer_params"):
        if chunk.get(key):
            response[key] = chunk[key]
    if not chunk["choices"]:
        return None
    new, whole = chunk["choices"][0], response["choices"][0]
    echoed = new.get("prompt_token_ids")
    if echoed is not None and whole["prompt_token_ids"] is None:
        whole["prompt_token_ids"] = echoed
    elif echoed is not None and echoed != [*whole["prompt_token_ids"], *whole["token_ids"]]:
        raise EngineError(
            "A stream that was to go on was asked something else than what had come",
            next_step="Look for a proxy that changes bodies between kvmem and the engine.",
        )
    whole["token_ids"] += new.get("token_ids") or []
    whole["text"] += new["text"]
    whole["finish_reason"] = new.get("finish_reason") or whole["finish_reason"]
    return str(new["text"])
