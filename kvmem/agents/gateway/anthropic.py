"""Anthropic's messages: their requests as chat requests, the engine's answers as theirs.

`cache_control` marks do three things here, since an engine's prefix cache takes no marks of its
own: usage is split at the last mark as Anthropic splits it, the ledger is held for the marks' time
to live while others must make room, and edits of history leave marked messages in. More than four
are refused, as Anthropic does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from kvmem.agents.gateway.exchange import Exchange
from kvmem.agents.gateway.http import Refused, Stream
from kvmem.agents.gateway.turn import Turn, Wish
from kvmem.context.tail import ANTHROPIC_MOST

__all__ = ["Anthropic"]

TTL_S = {"5m": 300.0, "1h": 3600.0}
STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
SAME = ("model", "temperature", "top_p", "top_k", "max_tokens", "stream", "session_id",
        "prompt_cache_key", "cache_salt", "chat_template_kwargs")  # fmt: skip
_encode = msgspec.json.Encoder().encode


class Anthropic:
    """See `Dialect`."""

    def asked(self, body: dict[str, Any]) -> tuple[dict[str, Any], Wish]:
        """As a chat request.

        Raises:
            Refused: it is not of Anthropic's form.
        """
        try:
            told, wish = _chat(body)
        except (AttributeError, KeyError, TypeError) as error:
            raise _refused(f"The request is not in the form of messages: {error!r}") from error
        return told, wish

    async def whole(self, exchange: Exchange) -> Any:
        """A message."""
        told = await exchange.whole()
        choice = told["choices"][0]
        content = _content(choice["message"])
        return {
            **_head(told), "content": content, "stop_reason": _stop(choice),
            "stop_sequence": _sequence(choice),
            "usage": _usage(told.get("usage") or {}, exchange.turn.marked_tokens),
        }  # fmt: skip

    async def stream(self, exchange: Exchange, stream: Stream) -> None:
        """A message's events."""
        events = _Events(exchange.turn)
        async for batch in exchange.chunks():
            out = b"".join(
                b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encode(event))
                for chunk in batch
                for event in events.of(chunk)
            )
            if out:
                await stream.send(out)
        out = b"".join(
            b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encode(event))
            for event in events.end()
        )
        await stream.send(out)

    def failed(self, status: int, kind: str, message: str) -> Any:
        """Anthropic's form."""
        told = {"type": KINDS.get(status, "api_error"), "message": message}
        return {"type": "error", "error": told}

    def broke_off(self, kind: str, message: str) -> bytes:
        """An event with the error."""
        return b"event: error\ndata: %b\n\n" % _encode(self.failed(502, kind, message))


def _refused(message: str) -> Refused:
    return Refused(
        message, next_step="See Anthropic's API reference.", status=400,
        kind="invalid_request_error",
    )  # fmt: skip


# -- asked ---------------------------------------------------------------------------------------


def _marked(blocks: Any) -> list[Mapping[str, Any]]:
    if not isinstance(blocks, list):
        return []
    return [block["cache_control"] for block in blocks if block.get("cache_control")]


def _ttl(mark: Mapping[str, Any]) -> float:
    name = mark.get("ttl", "5m")
    if mark.get("type") != "ephemeral" or name not in TTL_S:
        raise _refused(f"cache_control is of type ephemeral, ttl 5m or 1h, not {dict(mark)}")
    return TTL_S[name]


def _chat(body: Mapping[str, Any]) -> tuple[dict[str, Any], Wish]:
    told = {name: body[name] for name in SAME if body.get(name) is not None}
    system = body.get("system")
    messages: list[dict[str, Any]] = []
    if system:
        text = system if isinstance(system, str) else [_text(block) for block in system]
        messages.append({"role": "system", "content": text})
    head = [*_marked(body.get("tools")), *_marked(system)]
    marks, places = list(head), {-1} if head else set[int]()
    for message in body["messages"]:
        messages += _message(message["role"], message["content"])
        found = _marked(message["content"])
        if found:
            marks += found
            places.add(len(messages) - 1)
    if len(marks) > ANTHROPIC_MOST:
        raise _refused(f"{len(marks)} cache_control marks; at most {ANTHROPIC_MOST}")
    told["messages"] = messages
    if messages and messages[-1]["role"] == "assistant":  # the answer goes on from there
        told |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.get("stop_sequences"):
        told["stop"] = body["stop_sequences"]
    if body.get("tools"):
        told |= _tools(body["tools"], body.get("tool_choice") or {"type": "auto"})
    if told.get("stream"):
        told["stream_options"] = {"include_usage": True}
    hold_s = max((_ttl(mark) for mark in marks), default=0.0)
    return told, Wish(hold_s, frozenset(places))


def _text(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": block["text"]}


def _tools(tools: Sequence[Mapping[str, Any]], choice: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"tools": [_tool(tool) for tool in tools]}
    told["tool_choice"] = (
        {"type": "function", "function": {"name": choice["name"]}}
        if choice["type"] == "tool"
        else {"auto": "auto", "any": "required", "none": "none"}[choice["type"]]
    )
    if choice.get("disable_parallel_tool_use"):
        told["parallel_tool_calls"] = False
    return told


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _message(role: str, content: Any) -> list[dict[str, Any]]:
    """A message in chat's form; results of tools are messages of their own there."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    found: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in content:
        kind = block["type"]
        if kind == "text":
            parts.append(_text(block))
        elif kind == "tool_use":
            function = {"name": block["name"], "arguments": json.dumps(block["input"])}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "tool_result":
            found.append({"role": "tool", "tool_call_id": block["tool_use_id"],
                          "content": _result(block.get("content"))})  # fmt: skip
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _url(block["source"])}})
        elif kind not in {"thinking", "redacted_thinking"}:
            raise _refused(f"A block of type {kind} is not known")
    if calls:
        text = "".join(part["text"] for part in parts)
        return [{"role": role, "content": text or None, "tool_calls": calls}]
    if role == "assistant":
        return [{"role": role, "content": "".join(part["text"] for part in parts)}]
    return [*found, {"role": role, "content": parts}] if parts else found


def _result(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block["text"] for block in content)


def _url(source: Mapping[str, Any]) -> str:
    if source["type"] == "url":
        return str(source["url"])
    return f"data:{source['media_type']};base64,{source['data']}"


# -- answered ------------------------------------------------------------------------------------


def _head(told: Mapping[str, Any]) -> dict[str, Any]:
    name = "msg_" + str(told.get("id", "")).removeprefix("chatcmpl-")
    return {"id": name, "type": "message", "role": "assistant", "model": told.get("model")}


def _content(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if message.get("content"):
        found.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls") or ():
        function = call["function"]
        found.append({"type": "tool_use", "id": call["id"], "name": function["name"],
                      "input": _input(function["arguments"])})  # fmt: skip
    return found


def _input(arguments: str) -> Any:
    try:
        found = json.loads(arguments or "{}")
    except json.JSONDecodeError:
        return {}  # what a model wrote wrongly: vLLM's template reads it so too
    return found if isinstance(found, dict) else {}


def _stop(choice: Mapping[str, Any]) -> str:
    if _sequence(choice) is not None:
        return "stop_sequence"
    return STOPS.get(str(choice.get("finish_reason")), "end_turn")


def _sequence(choice: Mapping[str, Any]) -> str | None:
    found = choice.get("stop_reason")
    return found if isinstance(found, str) else None


def _usage(usage: Mapping[str, Any], marked_tokens: int) -> dict[str, Any]:
    """The prompt in Anthropic's parts: read from the cache, computed up to the last mark, the rest.

    What the engine had beyond the mark is read, too: it was not computed.
    """
    prompt = int(usage.get("prompt_tokens") or 0)
    read = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    written = max(0, min(marked_tokens, prompt) - read)
    return {
        "input_tokens": prompt - read - written, "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
        "output_tokens": int(usage.get("completion_tokens") or 0), "kvmem": usage.get("kvmem"),
    }  # fmt: skip


class _Events:
    """Chat's chunks as Anthropic's events."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._index = -1
        self._open: int | str | None = None  # "text", or a call's number
        self._is_object: bool | None = None  # the arguments of the call that is open
        self._begun = False
        self._stop: dict[str, Any] = {"stop_reason": "end_turn", "stop_sequence": None}
        self._usage: dict[str, Any] = {}

    def of(self, chunk: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            # Their client keeps what is not its own from here only.
            receipt = msgspec.to_builtins(self._turn.receipt)
            empty = {"input_tokens": 0, "output_tokens": 0, "kvmem": receipt}
            message = {**_head(chunk), "content": [], "stop_reason": None, "stop_sequence": None}
            yield {"type": "message_start", "message": {**message, "usage": empty}}
        if chunk.get("usage"):
            self._usage = _usage(chunk["usage"], self._turn.marked_tokens)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("content"):
                yield from self._part("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": delta["content"]})
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)
            if choice.get("finish_reason"):
                self._stop = {"stop_reason": _stop(choice), "stop_sequence": _sequence(choice)}

    def _call(self, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        function = call.get("function") or {}
        block = {"type": "tool_use", "id": call.get("id"), "name": function.get("name")}
        yield from self._part(call.get("index", 0), {**block, "input": {}})
        more = function.get("arguments") or ""
        if more.strip() and self._is_object is None:
            # Their client fails at what a model wrote otherwise; see `_input`.
            self._is_object = more.lstrip().startswith("{")
        if more and self._is_object is not False:
            yield self._delta({"type": "input_json_delta", "partial_json": more})

    def _part(self, which: int | str, block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open == which:
            return
        yield from self._shut()
        self._index += 1
        self._open, self._is_object = which, None
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _shut(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def end(self) -> Sequence[dict[str, Any]]:
        usage = self._usage or _usage({}, 0)
        return [
            *self._shut(),
            {"type": "message_delta", "delta": self._stop, "usage": usage},
            {"type": "message_stop"},
        ]
