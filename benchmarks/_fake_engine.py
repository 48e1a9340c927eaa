"""A server that streams like vLLM's and computes nothing: for what lies before an engine.

It takes a prompt's ids or renders the messages, counts cached tokens as a prefix cache of whole
blocks would that never forgets, and says what it is told to. `Serving` runs it, or another ASGI
application, in a thread.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec
import uvicorn

__all__ = ["FakeEngine", "Reply", "Serving"]


class Reply(msgspec.Struct):
    """An answer: its text, or the calls that the server parsed out of `text`.

    `hold_after`: after so many tokens it waits for `FakeEngine.go_on`; `break_after`: it goes away.
    """

    text: str
    calls: Sequence[tuple[str, str]] = ()
    hold_after: int | None = None
    break_after: int | None = None
    finish: str = ""


class FakeEngine:
    """An ASGI application.

    Args:
        folder: of the model, as /v1/models tells it.
        render: messages, tools and template arguments to ids.
        encode: text to ids.
        end: the id that ends a turn.
        pace_s: between tokens.
        counts_cache: keep prompts, to tell cached tokens and what was asked.
        say: the n-th reply, counted from 0, to a request's body.
    """

    def __init__(
        self, folder: str, render: Callable[..., list[int]], encode: Callable[[str], list[int]],
        end: int, say: Callable[[int, dict[str, Any]], Reply], *, block_tokens: int = 16,
        models: Sequence[str] = ("fake",), ignores_ids: bool = False, tells_ids: bool = True,
        counts_cache: bool = True, pace_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.folder, self.render, self.encode, self.end, self.say = folder, render, encode, end, say
        self.block_tokens, self.models = block_tokens, models
        self.ignores_ids, self.tells_ids = ignores_ids, tells_ids
        self.counts_cache, self.pace_s = counts_cache, pace_s
        self.bodies: list[dict[str, Any]] = []
        self.prompts: list[list[int]] = []
        self.sent: list[dict[str, str]] = []  # headers
        self.refuse: tuple[int, str] | None = None
        self.aborted = threading.Event()  # a client went away in a stream
        self.holding = threading.Event()
        self._blocks: set[bytes] = set()
        self._go_on = threading.Event()

    def go_on(self) -> None:
        """Lets a reply that holds go on."""
        self._go_on.set()

    def forget(self) -> None:
        """As a restart does."""
        self._blocks.clear()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        parts = []
        while True:
            event = await receive()
            parts.append(event.get("body", b""))
            if not event.get("more_body"):
                break
        path = scope["path"]
        if path == "/v1/models":
            cards = [{"id": name, "object": "model", "root": self.folder} for name in self.models]
            await self._answer(send, {"object": "list", "data": cards})
        elif path == "/metrics":
            line = f'vllm:cache_config_info{{block_size="{self.block_tokens}"}} 1.0\n'
            await self._answer(send, line.encode())
        elif path == "/health":
            await self._answer(send, b"")
        elif path == "/tokenize":
            body = json.loads(b"".join(parts))
            more = body.get("chat_template_kwargs") or {}
            ids = self.render(body["messages"], body.get("tools"), **more)
            await self._answer(send, {"tokens": ids, "count": len(ids)})
        elif path == "/v1/chat/completions":
            self.sent.append({k.decode(): v.decode() for k, v in scope["headers"]})
            await self._chat(json.loads(b"".join(parts)), receive, send)
        elif path == "/v1/completions":
            await self._answer(send, {"echo": json.loads(b"".join(parts))})
        else:
            await self._answer(send, {"error": {"message": "no such path"}}, 404)

    async def _answer(self, send: Any, body: Any, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = (b"content-length", str(len(data)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [length]})
        await send({"type": "http.response.body", "body": data})

    def _cached(self, prompt: list[int], sampled: list[int]) -> int:
        """Of the prompt; then the whole blocks of both are known, but for the last token."""
        size, known = self.block_tokens, 0
        ids = [*prompt, *sampled][:-1]
        for stop in range(size, len(ids) + 1, size):
            key = repr(ids[:stop]).encode() if len(ids) < 4096 else b"%d" % hash(tuple(ids[:stop]))
            if key in self._blocks and known == stop - size and stop < len(prompt):
                known = stop
            self._blocks.add(key)
        return known

    async def _chat(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        if self.refuse is not None:
            status, message = self.refuse
            await self._answer(send, {"error": {"message": message, "type": "BadRequest"}}, status)
            return
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        if given is None or self.ignores_ids:
            more = body.get("chat_template_kwargs") or {}
            given = self.render(body["messages"], body.get("tools"), **more)
        number = len(self.bodies)
        if self.counts_cache:  # else it keeps nothing of what it is asked
            self.bodies.append(body)
            self.prompts.append(given)
        reply = self.say(number, body)
        most = body.get("max_tokens") or 1 << 30
        sampled = [*self.encode(reply.text), self.end][:most]
        cached = self._cached(given, sampled) if self.counts_cache else 0
        details = {"cached_tokens": cached}
        usage = {
            "prompt_tokens": len(given), "completion_tokens": len(sampled),
            "total_tokens": len(given) + len(sampled), "prompt_tokens_details": details,
        }  # fmt: skip
        finish = reply.finish or ("tool_calls" if reply.calls else "stop")
        head = {"id": f"chatcmpl-{number}", "created": 1, "model": body["model"]}
        tells = self.tells_ids and bool(body.get("return_token_ids"))
        if body.get("stream"):
            await self._stream(
                head, reply, given, sampled, usage, finish, tells, body, receive, send
            )
        else:
            message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
            if reply.calls:
                message |= {"content": None, "tool_calls": _calls(number, reply)}
            choices = [{"index": 0, "message": message, "finish_reason": finish}]
            for i, text in enumerate(body.get("fake_choices") or ()):  # what `n` asks for
                more = {"message": {"role": "assistant", "content": text}}
                choices[i:] = [{"index": i, "finish_reason": finish, **more}]
            for choice in choices:
                if tells:
                    text = choice["message"]["content"] if len(choices) > 1 else reply.text
                    choice["token_ids"] = [*self.encode(text), self.end][:most]
            told = {**head, "object": "chat.completion", "choices": choices, "usage": usage}
            if tells:
                told["prompt_token_ids"] = given
            await self._answer(send, told)

    async def _stream(
        self, head: dict[str, Any], reply: Reply, given: list[int], sampled: list[int],
        usage: dict[str, Any], finish: str, tells: bool, body: dict[str, Any],
        receive: Any, send: Any,
    ) -> None:  # fmt: skip
        head = {**head, "object": "chat.completion.chunk"}
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})

        async def event(chunk: Any) -> None:
            data = b"data: %b\n\n" % json.dumps(chunk).encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        first: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}}
        ids = {"prompt_token_ids": given} if tells else {}
        await event({**head, "choices": [first], **ids})
        pieces = _pieces(reply, len(sampled), len(self.bodies) - 1)
        for n, (token, delta) in enumerate(zip(sampled, pieces, strict=True)):
            if n == reply.hold_after:
                self.holding.set()
                if not await self._held(receive):
                    return
            if n == reply.break_after:
                raise ConnectionResetError("told to")
            choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None}
            choice["finish_reason"] = finish if n == len(sampled) - 1 else None
            if tells:
                choice["token_ids"] = [token]
            await event({**head, "choices": [choice]})
            if self.pace_s:
                await asyncio.sleep(self.pace_s)  # an engine's step
        if (body.get("stream_options") or {}).get("include_usage"):
            await event({**head, "choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _held(self, receive: Any) -> bool:
        """Whether it may go on; else the client has gone, as vLLM sees it too."""
        going = asyncio.ensure_future(asyncio.to_thread(self._go_on.wait, 30))
        gone = asyncio.ensure_future(receive())
        await asyncio.wait({going, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not going.done():
            self.aborted.set()
            self._go_on.set()
            await going
            return False
        gone.cancel()
        return True


def _calls(number: int, reply: Reply) -> list[dict[str, Any]]:
    return [
        {"id": f"call-{number}-{i}", "type": "function", "function": {"name": n, "arguments": a}}
        for i, (n, a) in enumerate(reply.calls)
    ]


def _pieces(reply: Reply, n: int, number: int) -> list[dict[str, Any]]:
    """What each token adds to the message."""
    if reply.calls:
        calls = [{**call, "index": i} for i, call in enumerate(_calls(number, reply))]
        return [{"tool_calls": calls}, *({} for _ in range(n - 1))]
    size = max(1, -(-len(reply.text) // max(1, n - 1)))
    return [{"content": reply.text[i * size : (i + 1) * size]} for i in range(n)]


class Serving:
    """An ASGI application served in a thread, from `with` to its end."""

    def __init__(self, app: Any, *, port: int = 0, lifespan: str = "off") -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app, loop="uvloop", http="httptools", log_level="critical", access_log=False,
            lifespan=lifespan, timeout_graceful_shutdown=1, ws="none",
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])

    def __enter__(self) -> Serving:
        """It listens from here on; what comes before it runs waits."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends it."""
        self.stop()

    def stop(self) -> None:
        """Ends it; once more does nothing."""
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
