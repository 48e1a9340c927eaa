"""OpenAI's responses: their requests as chat requests, the engine's answers as theirs.

`previous_response_id` is found in the ledgers, where each answer is committed with its id: the
client then sends only what is new. It outlives a restart as they do.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from kvmem.agents.gateway.exchange import Exchange
from kvmem.agents.gateway.http import Refused, Stream
from kvmem.agents.gateway.turn import Wish

__all__ = ["Responses"]

SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "session_id",
        "prompt_cache_key", "cache_salt", "chat_template_kwargs", "seed")  # fmt: skip
_encode = msgspec.json.Encoder().encode


class Responses:
    """See `Dialect`."""

    def asked(self, body: dict[str, Any]) -> tuple[dict[str, Any], Wish]:
        """As a chat request.

        Raises:
            Refused: it is not of the API's form, or wants what is not served here.
        """
        for name in ("background", "conversation", "prompt"):
            if body.get(name):
                raise _refused(f"{name} is not served by this gateway")
        try:
            told = _chat(body)
        except (AttributeError, KeyError, TypeError) as error:
            raise _refused(f"The request is not in the form of responses: {error!r}") from error
        return told, Wish(previous=str(body.get("previous_response_id") or ""))

    async def whole(self, exchange: Exchange) -> Any:
        """A response."""
        made = _Made(exchange)
        told = await exchange.whole()
        choice = told["choices"][0]
        return made.response(choice.get("finish_reason"), _output(choice["message"]),
                             told.get("usage"))  # fmt: skip

    async def stream(self, exchange: Exchange, stream: Stream) -> None:
        """A response's events."""
        events = _Events(_Made(exchange))
        await stream.send(_sse(events.begin()))
        async for batch in exchange.chunks():
            out = _sse([event for chunk in batch for event in events.of(chunk)])
            if out:
                await stream.send(out)
        await stream.send(_sse(events.end()))

    def failed(self, status: int, kind: str, message: str) -> Any:
        """OpenAI's form."""
        return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}

    def broke_off(self, kind: str, message: str) -> bytes:
        """An event with the error."""
        event = {"type": "error", "code": kind, "message": message, "param": None}
        return b"event: error\ndata: %b\n\n" % _encode({**event, "sequence_number": 0})


def _sse(events: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encode(event)) for event in events
    )


def _refused(message: str) -> Refused:
    return Refused(
        message, next_step="See OpenAI's API reference.", status=400, kind="invalid_request_error"
    )


# -- asked ---------------------------------------------------------------------------------------


def _chat(body: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: body[name] for name in SAME if body.get(name) is not None}
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    given = body["input"]
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        for item in given:
            _add(messages, item)
    told["messages"] = messages
    if body.get("max_output_tokens") is not None:
        told["max_tokens"] = body["max_output_tokens"]
    effort = (body.get("reasoning") or {}).get("effort")
    if effort:
        told["reasoning_effort"] = effort
    form = (body.get("text") or {}).get("format") or {}
    if form.get("type") == "json_schema":
        schema = {name: form[name] for name in ("name", "schema", "strict") if name in form}
        told["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form.get("type") == "json_object":
        told["response_format"] = {"type": "json_object"}
    if body.get("tools"):
        told |= _tools(body["tools"], body.get("tool_choice") or "auto")
    if told.get("stream"):
        told["stream_options"] = {"include_usage": True}
    return told


def _tools(tools: Sequence[Mapping[str, Any]], choice: Any) -> dict[str, Any]:
    found = []
    for tool in tools:
        if tool.get("type") != "function":
            raise _refused(f"Tools of type {tool.get('type')} are not served by this gateway")
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        found.append({"type": "function", "function": function})
    if not isinstance(choice, str):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    return {"tools": found, "tool_choice": choice}


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """An item as a message, or as part of the last one: calls belong to what was said before."""
    kind = item.get("type") or "message"
    if kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = item["output"]
        text = output if isinstance(output, str) else [_part(part) for part in output]
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
    elif kind == "message":
        content = item["content"]
        if not isinstance(content, str):
            content = [_part(part) for part in content]
        messages.append({"role": item["role"], "content": content})
    elif kind != "reasoning":  # what was thought stands in the ledger
        raise _refused(f"Items of type {kind} are not served by this gateway")


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "refusal":
        return {"type": "text", "text": part["refusal"]}
    if kind == "input_image":
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    if kind not in {"input_text", "output_text", "text"}:
        raise _refused(f"Content of type {kind} is not served by this gateway")
    return {"type": "text", "text": part["text"]}


# -- answered ------------------------------------------------------------------------------------


def _new(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _said(text: str, name: str, status: str = "completed") -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"type": "message", "id": name, "role": "assistant", "status": status,
            "content": content}  # fmt: skip


def _called(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"type": "function_call", "id": name, "call_id": call["id"], "name": call["name"],
            "arguments": call["arguments"], "status": "completed"}  # fmt: skip


def _output(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [_said(message["content"], _new("msg"))] if message.get("content") else []
    for call in message.get("tool_calls") or ():
        found.append(_called({**call["function"], "id": call["id"]}, _new("fc")))
    return found


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not usage:
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"], "kvmem": usage.get("kvmem"),
    }  # fmt: skip


class _Made:
    """The response that a turn becomes; its id is committed with the answer."""

    def __init__(self, exchange: Exchange) -> None:
        turn = exchange.turn
        self.id = turn.answer_id = _new("resp")
        self._body = turn.body
        self._previous = turn.wish.previous or None

    def response(
        self, finish: str | None, output: list[dict[str, Any]], usage: Mapping[str, Any] | None,
        status: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        body = self._body
        short = finish == "length"
        return {
            "id": self.id, "object": "response", "created_at": int(time.time()),
            "status": status or ("incomplete" if short else "completed"), "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if short else None,
            "instructions": None, "model": body["model"], "output": output,
            "parallel_tool_calls": body.get("parallel_tool_calls", True), "metadata": {},
            "previous_response_id": self._previous, "temperature": body.get("temperature"),
            "top_p": body.get("top_p"), "tool_choice": "auto",
            "tools": [{"type": "function", **t["function"]} for t in body.get("tools") or ()],
            "max_output_tokens": body.get("max_tokens"), "usage": _usage(usage),
        }  # fmt: skip


class _Events:
    """Chat's chunks as the events of a response."""

    def __init__(self, made: _Made) -> None:
        self._made = made
        self._number = 0
        self._output: list[dict[str, Any]] = []  # whole items
        self._open: int | str | None = None  # "text", or a call's number
        self._item: dict[str, Any] = {}
        self._text = ""
        self._finish: str | None = None
        self._usage: Mapping[str, Any] | None = None

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **more}

    def begin(self) -> list[dict[str, Any]]:
        response = self._made.response(None, [], None, "in_progress")
        return [self._event(kind, response=response) for kind in ("created", "in_progress")]

    def of(self, chunk: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("content"):
                yield from self._says(delta["content"])
            for call in delta.get("tool_calls") or ():
                yield from self._calls(call)
            self._finish = choice.get("finish_reason") or self._finish

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self._output)}

    def _says(self, text: str) -> Iterator[dict[str, Any]]:
        if self._open != "text":
            yield from self._shut()
            self._open, self._text = "text", ""
            self._item = {**_said("", _new("msg"), "in_progress"), "content": []}
            yield self._event("output_item.added", output_index=len(self._output), item=self._item)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._event("content_part.added", **self._place(), content_index=0, part=part)
        self._text += text
        yield self._event(
            "output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[]
        )

    def _calls(self, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        function = call.get("function") or {}
        if self._open != call.get("index", 0):
            yield from self._shut()
            self._open, self._text = call.get("index", 0), ""
            told = {"id": call.get("id"), "name": function.get("name"), "arguments": ""}
            self._item = {**_called(told, _new("fc")), "status": "in_progress"}
            yield self._event("output_item.added", output_index=len(self._output), item=self._item)
        more = function.get("arguments")
        if more:
            self._text += more
            yield self._event("function_call_arguments.delta", **self._place(), delta=more)

    def _shut(self) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        place = self._place()
        if self._open == "text":
            item = _said(self._text, self._item["id"])
            part = item["content"][0]
            yield self._event(
                "output_text.done", **place, content_index=0, text=self._text, logprobs=[]
            )
            yield self._event("content_part.done", **place, content_index=0, part=part)
        else:
            item = {**self._item, "arguments": self._text, "status": "completed"}
            yield self._event("function_call_arguments.done", **place, arguments=self._text,
                              name=item["name"])  # fmt: skip
        yield self._event("output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._open = None

    def end(self) -> list[dict[str, Any]]:
        events = list(self._shut())
        response = self._made.response(self._finish, self._output, self._usage)
        kind = "incomplete" if self._finish == "length" else "completed"
        return [*events, self._event(kind, response=response)]
