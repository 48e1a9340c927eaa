"""Records of a file one by one, whatever the file is: lines, a JSON array, gzip, damaged, huge.

A record is one line, or where the file is a JSON array or a value over several lines, one value.
Memory is bounded by the longest record allowed, not by the file.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from kvmem.errors import ConfigError
from kvmem.explain.lint.values import Fault

__all__ = ["MOST_RECORD_BYTES", "Record", "decode", "records"]

MOST_RECORD_BYTES = 64 << 20
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
_STRUCTURE = re.compile(rb'["{}\[\]\n]')
_STRING_END = re.compile(rb'[\\"]')
_T = TypeVar("_T")


class Record(msgspec.Struct, frozen=True):
    """The bytes of one JSON value, and the line that it begins at, from 1."""

    line: int
    data: bytes


def records(path: Path, most_bytes: int = MOST_RECORD_BYTES) -> Iterator[Record | Fault]:
    """Each record of a file in order, and a fault where there is none.

    Raises:
        ConfigError: the file is not there, or may not be read.
    """
    try:
        with _open(path) as stream:
            head = _head(stream)
            if head.startswith(b"["):
                yield from _values(path, stream, most_bytes, depth=1)
            elif head.split(b"\n", 1)[0].strip() == b"{":
                yield from _values(path, stream, most_bytes, depth=0)
            else:
                yield from _lines(path, stream, most_bytes)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            yield _damaged(path, str(error))
            return
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}",
            next_step="Name a file that exists and that you may read.",
        ) from None


def decode(path: Path, record: Record, kind: type[_T]) -> _T | Fault:
    """The record's value, or what is wrong with it."""
    try:
        # A line's end would stand inside a string that is cut, and read as a wrong character.
        return msgspec.json.decode(record.data.rstrip(b"\r\n"), type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        return Fault(str(path), record.line, _why(record.data, error), _next_step(record.data))


def _why(data: bytes, error: Exception) -> str:
    if b"\0" in data or isinstance(error, UnicodeDecodeError) or _is_not_text(data):
        return "not UTF-8 text"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if "truncated" in str(error):
        return "a cut line: the JSON ends too early"
    return f"not the JSON expected: {error}"


def _next_step(data: bytes) -> str:
    if b"\0" in data or _is_not_text(data):
        return "Give a log of JSON lines, or that log compressed with gzip."
    return "Write the record again, or take the line out; the rest was read."


def _is_not_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as raw:
        packed = raw.read(2) == _GZIP
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def _head(stream: IO[bytes]) -> bytes:
    """The first bytes that are not blank; the stream stands at its start again."""
    try:
        head = stream.read(4_096)
    except (EOFError, zlib.error):
        head = b""
    stream.seek(0)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def _damaged(path: Path, why: str, line: int = 1) -> Fault:
    return Fault(str(path), line, f"damaged gzip: {why}", "Compress the log again.")


def _too_long(path: Path, line: int, most_bytes: int) -> Fault:
    reason = f"one record of more than {most_bytes >> 20} MiB"
    return Fault(str(path), line, reason, "Write one request a line; the rest was read.")


def _lines(path: Path, stream: IO[bytes], most_bytes: int) -> Iterator[Record | Fault]:
    line = 0
    while True:
        line += 1
        try:
            data = stream.readline(most_bytes + 1)
            if len(data) > most_bytes:
                data = b""  # freed before the rest of the line is skipped
                _skip_line(stream)
                yield _too_long(path, line, most_bytes)
                continue
        except (EOFError, zlib.error) as error:
            yield _damaged(path, str(error), line)
            return
        if not data:
            return
        if line == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if not data.isspace():
            yield Record(line, data)


def _skip_line(stream: IO[bytes]) -> None:
    while (data := stream.readline(_CHUNK)) and not data.endswith(b"\n"):
        pass


def _values(path: Path, stream: IO[bytes], most_bytes: int, depth: int) -> Iterator[Record | Fault]:
    """JSON objects at `depth` brackets down: the elements of an array, or values in a row."""
    cutter = _Cutter(path, most_bytes, depth)
    while True:
        try:
            chunk = stream.read(_CHUNK)
        except (EOFError, zlib.error) as error:
            yield _damaged(path, str(error), cutter.line)
            return
        if not chunk:
            break
        yield from cutter.feed(chunk)
    if cutter.open:
        why = "a cut value: the file ends inside it"
        yield Fault(str(path), cutter.begun, why, "Write the record again; the rest was read.")


class _Cutter:
    """Cuts a stream of bytes into values without decoding them: brackets are counted."""

    def __init__(self, path: Path, most_bytes: int, depth: int) -> None:
        self.line = self.begun = 1
        self.open = False
        self._path, self._most, self._at = path, most_bytes, depth
        self._depth, self._in_string, self._escaped = 0, False, False
        self._kept: list[bytes] = []
        self._n_kept = 0

    def feed(self, chunk: bytes) -> Iterator[Record | Fault]:
        """The values that end in this chunk."""
        start = at = 0
        while True:
            if self._in_string:
                at = self._string_end(chunk, at)
                if self._in_string:
                    break
            found = _STRUCTURE.search(chunk, at)
            if found is None:
                break
            at = found.end()
            sign = found[0]
            if sign == b'"':
                self._in_string = True
            elif sign == b"\n":
                self.line += 1
            elif sign in b"{[":
                if self._depth == self._at and sign == b"{":
                    self.open, self.begun, start = True, self.line, found.start()
                self._depth += 1
            else:
                self._depth = max(0, self._depth - 1)
                if self.open and self._depth == self._at:
                    self.open = False
                    yield self._taken(chunk[start:at])
        if self.open:
            self._keep(chunk[start:])

    def _string_end(self, chunk: bytes, at: int) -> int:
        if self._escaped:
            self._escaped, at = False, at + 1
        while (found := _STRING_END.search(chunk, at)) is not None:
            if found[0] == b'"':
                self._in_string = False
                return found.end()
            at = found.end() + 1
            self._escaped = at > len(chunk)
        return len(chunk)

    def _keep(self, data: bytes) -> None:
        self._n_kept += len(data)
        if self._n_kept <= self._most:
            self._kept.append(data)
        else:
            self._kept.clear()

    def _taken(self, data: bytes) -> Record | Fault:
        self._keep(data)
        n, kept = self._n_kept, self._kept
        self._n_kept, self._kept = 0, []
        if n > self._most:
            return _too_long(self._path, self.begun, self._most)
        return Record(self.begun, b"".join(kept))
