"""A proxy between a framework and the gateway: it forces the calls and keeps the engine's figures.

The model under test is too small to call tools when it should. So the tap sets `tool_choice` (and
temperature 1, a seed, a bound, `strict`) on the way in: the tool `look` for so many turns, then
none. It touches nothing that this model's template renders; what a call holds is sampled by the
engine. On the way out it reads `usage`, so that what is asserted does not depend on what a
framework shows of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx

TOOL = "look"
TIMEOUT_S = 300.0


class Tap:
    """A context manager; `url` is what the framework is given.

    `usages`: prompt tokens, cached tokens, sampled tokens and what the gateway says, turn by turn.
    """

    def __init__(self, upstream: str, turns: int) -> None:
        self.upstream, self.turns = upstream, turns
        self.usages: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.failures: list[tuple[int, bytes]] = []
        tap = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                tap.pass_on(self, "GET", b"")

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                tap.pass_on(self, "POST", data)

            def log_message(self, *args: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def pass_on(self, handler: BaseHTTPRequestHandler, method: str, data: bytes) -> None:
        turn = data and not handler.path.partition("?")[0].endswith("count_tokens")
        if turn:
            body = json.loads(data)
            data = json.dumps(self._forced(body)).encode()
        headers = {
            name: value for name, value in handler.headers.items()
            if name.lower() not in {"host", "content-length", "accept-encoding", "connection"}
        }  # fmt: skip
        url = self.upstream + handler.path
        with httpx.stream(method, url, content=data, headers=headers, timeout=TIMEOUT_S) as told:
            kind = told.headers.get("content-type", "application/json")
            handler.send_response(told.status_code)
            handler.send_header("content-type", kind)
            handler.send_header("connection", "close")
            handler.end_headers()
            got = b""
            for piece in told.iter_bytes():
                got += piece
                handler.wfile.write(piece)
                handler.wfile.flush()
        if turn and told.status_code == 200:
            self.usages.append(_usage(got, kind))
        elif turn:
            self.failures.append((told.status_code, got))

    def _forced(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        tools = body.get("tools") or []
        names = [one.get("name") or one.get("function", {}).get("name", "") for one in tools]
        name = next((one for one in names if one.endswith(TOOL)), "")
        for one in tools:  # else the engine holds a call to no schema
            one.get("function", one)["strict"] = True
        anthropic = any("input_schema" in one for one in tools)
        openai = any("function" in one for one in tools)
        calls = bool(name) and len(self.usages) < self.turns - 1
        if anthropic:
            choice: Any = {"type": "tool", "name": name} if calls else {"type": "none"}
        elif calls:
            function = {"name": name}
            choice = {"type": "function", **({"function": function} if openai else function)}
        else:
            choice = "none"
        if tools:
            body["tool_choice"] = choice
        else:
            body.pop("tool_choice", None)
        bound = "max_output_tokens" if "input" in body else "max_tokens"
        body.pop("max_completion_tokens", None)
        body.pop("top_p", None)
        return {**body, bound: 60, "temperature": 1.0, "seed": len(self.usages)}


def _usage(got: bytes, kind: str) -> dict[str, Any]:
    """The last figures of each kind, whichever API they are of."""
    told: dict[str, Any] = {}
    for one in _documents(got, kind):
        for holder in (one, one.get("message") or {}, one.get("response") or {}):
            told.update(holder.get("usage") or {} if isinstance(holder, dict) else {})
    if "cache_read_input_tokens" in told:
        cached = told["cache_read_input_tokens"]
        prompt = told["input_tokens"] + cached + (told.get("cache_creation_input_tokens") or 0)
    else:
        details = told.get("prompt_tokens_details") or told.get("input_tokens_details") or {}
        cached = details.get("cached_tokens") or 0
        prompt = told["prompt_tokens"] if "prompt_tokens" in told else told["input_tokens"]
    sampled = told["completion_tokens"] if "completion_tokens" in told else told["output_tokens"]
    return {"prompt": prompt, "cached": cached, "sampled": sampled, **(told.get("kvmem") or {})}


def _documents(got: bytes, kind: str) -> Iterator[dict[str, Any]]:
    if not kind.startswith("text/event-stream"):
        yield json.loads(got)
        return
    for line in got.decode().splitlines():
        if line.startswith("data:") and line[5:].strip() != "[DONE]":
            yield json.loads(line[5:])
