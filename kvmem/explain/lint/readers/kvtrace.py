"""Reads `kvtrace/1`: a header line, then one call a line whose content is
`content_of(base)[:keep] + tail`; messages, text, token ids or the ids of chained blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kvmem.explain.lint.lines import Record, decode, records
from kvmem.explain.lint.readers.parts import WrongMessage, message_part
from kvmem.explain.lint.values import Call, Fault, Part

__all__ = ["NAME", "accepts", "calls"]

NAME = "kvtrace/1"
MOST_KEPT = 64 << 20  # characters and ids of earlier prompts that a later one may build on
_AGAIN = "Record the trace anew; the rest was read."


_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class _Header(msgspec.Struct):
    kvtrace: int
    kind: Literal["messages", "text", "token_ids", "blocks"]
    block_size: _Positive | None = None
    hash_scope: Literal["session", "global"] = "global"
    order: Literal["arrival", "by_session"] = "arrival"


class _Row(msgspec.Struct):
    id: int
    session: str
    agent: str = "main"
    base: int | None = None
    keep: _Count = 0
    messages: list[Any] | None = None
    text: str | None = None
    token_ids: list[_Token] | None = None
    block_hashes: list[int] | None = None
    input_len: _Count | None = None
    t: float | None = None
    tool_gap_s: float | None = None
    gap_kind: str | None = None
    output: Any = None


def accepts(first: dict[str, Any]) -> bool:
    """Whether a log that begins with this record is a kvtrace."""
    return first.get("kvtrace") == 1


def calls(path: Path) -> Iterator[Call | Fault]:
    """Each call of the trace, its whole prompt put together."""
    found = records(path)
    header: _Header | None = None
    for record in found:
        read = record if isinstance(record, Fault) else decode(path, record, _Header)
        if not isinstance(read, Fault):
            header = read
            break
        yield read
    if header is None:
        return
    contents = _Contents()
    session = None
    rows = msgspec.json.Decoder(_Row)
    for record in found:
        if isinstance(record, Fault):
            yield record
            continue
        row = _row(path, record, rows)
        if isinstance(row, Fault):
            yield row
            continue
        if header.order == "by_session" and row.session != session:
            contents.clear()
            session = row.session
        yield _call(path, record.line, header, row, contents)


def _row(path: Path, record: Record, rows: msgspec.json.Decoder[_Row]) -> _Row | Fault:
    try:
        return rows.decode(record.data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return decode(path, record, _Row)  # the same again, for the reason in words


def _call(path: Path, line: int, header: _Header, row: _Row, contents: _Contents) -> Call | Fault:
    def fault(reason: str) -> Fault:
        return Fault(str(path), line, reason, _AGAIN)

    base: Any = None
    if row.base is not None:
        base = contents.get(row.base)
        if base is None:
            return fault(f"call {row.id} builds on call {row.base}, which is not here")
        if not 0 <= row.keep <= len(base):
            return fault(f"call {row.id} keeps {row.keep} of {len(base)} that call {row.base} has")
    keep = row.keep if row.base is not None else 0
    try:
        tail = _tail(header, row, keep)
        reply = _reply(row.output) if header.kind == "messages" else None
    except WrongMessage as error:
        return fault(str(error))
    if tail is None:
        return fault(f"call {row.id} has no {header.kind}")
    content = base[:keep] + tail if base is not None else tail
    contents.put(row.id, content)
    call = Call(line, row.session, row.agent, reply=reply, input_tokens=row.input_len)
    call.at_s, call.waited_s, call.waited_for = row.t, row.tool_gap_s, row.gap_kind
    if header.kind == "messages":
        call.parts = content
    elif header.kind == "text":
        call.parts = [Part("text", "text", content, content=content)]
    else:
        call.ids, call.known_ids = content, keep
        call.tokens_per_id = (header.block_size or 1) if header.kind == "blocks" else 1
        call.scope = header.hash_scope if header.kind == "blocks" else "global"
    return call


def _tail(header: _Header, row: _Row, first: int) -> Any:
    if header.kind == "messages":
        if row.messages is None:
            return None
        return [message_part(message, first + i) for i, message in enumerate(row.messages)]
    return {"text": row.text, "token_ids": row.token_ids, "blocks": row.block_hashes}[header.kind]


def _reply(output: Any) -> Part | None:
    if not isinstance(output, dict):
        return None
    return message_part(output, None)


class _Contents:
    """The newest prompts by their call's id, as many as `MOST_KEPT` allows."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._sizes: dict[int, int] = {}
        self._size = 0

    def get(self, call: int) -> Any:
        return self._kept.get(call)

    def put(self, call: int, content: Any) -> None:
        self._size -= self._sizes.pop(call, 0)
        self._kept[call] = content
        self._sizes[call] = len(content)
        self._size += len(content)
        while self._size > MOST_KEPT and len(self._kept) > 1:
            oldest, _ = self._kept.popitem(last=False)
            self._size -= self._sizes.pop(oldest)

    def clear(self) -> None:
        self._kept.clear()
        self._sizes.clear()
        self._size = 0
