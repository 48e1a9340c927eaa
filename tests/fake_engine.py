"""An engine of a few lines in this process, for what a real one does only when it fails.

It answers every prompt by the ids of `says`, echoes the prompt, and does first what `faults` hold:
one for each request, in turn.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from kvmem.agents import Runtime
from kvmem.context import ChatRenderer
from tests.tiny_tokenizers import tokenizer

RENDERER = ChatRenderer.of(tokenizer())
END = RENDERER.encode("<|e|>")
Fault = int | Exception | tuple[int, dict[str, str]] | str


class FakeEngine(httpx.AsyncBaseTransport):
    """A fault is a status, an exception, "hang", or `cut:N`: a stream that breaks after N ids."""

    def __init__(self, says: str | Callable[[str], str] = "Aye.", *, faults: Any = ()) -> None:
        self.says = says if callable(says) else lambda prompt: says
        self.faults: list[Fault] = list(faults)
        self.bodies: list[dict[str, Any]] = []
        self.hints: list[dict[str, Any]] = []
        self.hints_status = 200
        self.running = self.most = 0
        self.arrived = asyncio.Event()
        self.go = asyncio.Event()  # "wait" waits for it
        self.ended = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "root": "nowhere"}]})
        if request.url.path == "/metrics":
            return httpx.Response(200, text='vllm:cache_config_info{block_size="16"} 1.0\n')
        body = json.loads(request.content)
        if request.url.path == "/v1/kvmem/hints":
            self.hints.append(body)
            return httpx.Response(self.hints_status, json={"receipts": []})
        self.bodies.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        self.arrived.set()
        try:
            return await self._answer(body, self.faults.pop(0) if self.faults else None)
        finally:
            self.running -= 1
            self.ended += 1

    async def _answer(self, body: dict[str, Any], fault: Fault | None) -> httpx.Response:
        await asyncio.sleep(0)
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, int):
            return httpx.Response(fault, json={"error": {"message": "no"}})
        if isinstance(fault, tuple):
            return httpx.Response(fault[0], headers=fault[1])
        if fault == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(8):  # hanging up takes a moment
                    await asyncio.sleep(0)
        if fault == "wait":
            await self.go.wait()
        prompt = body["prompt"]
        ids = [*RENDERER.encode(self.says(RENDERER.decode(prompt))), *END]
        ids = ids[: body["max_tokens"]]
        if body.get("stream"):
            return httpx.Response(200, stream=_Chunks(prompt, ids, fault))
        choice = {
            "text": RENDERER.decode(ids), "token_ids": ids, "prompt_token_ids": prompt,
            "finish_reason": "stop",
        }  # fmt: skip
        return httpx.Response(200, json={"choices": [choice], "usage": {}})


class _Chunks(httpx.AsyncByteStream):
    def __init__(self, prompt: list[int], ids: list[int], fault: Fault | None) -> None:
        self._prompt, self._ids, self._fault = prompt, ids, fault

    async def __aiter__(self) -> AsyncIterator[bytes]:
        cut = int(str(self._fault)[4:]) if str(self._fault).startswith("cut:") else None
        for number, one in enumerate(self._ids):
            if number == cut:
                raise httpx.ReadError("the connection is gone")
            choice = {
                "text": RENDERER.decode([one]), "token_ids": [one],
                "prompt_token_ids": None if number else self._prompt,
                "finish_reason": "stop" if number == len(self._ids) - 1 else None,
            }  # fmt: skip
            yield f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
        yield b"data: [DONE]\n\n"


def runtime(engine: FakeEngine, **options: Any) -> Runtime:
    """A runtime on it."""
    return Runtime("http://engine", renderer=RENDERER, transport=engine, **options)
