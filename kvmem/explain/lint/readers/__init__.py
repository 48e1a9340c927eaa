"""One module for each form of log. Which one a file is, its first records say.

A reader is a module with `NAME`, `accepts(record) -> bool` and `calls(path)`, which yields
a `Call` for each call of a model and a `Fault` for each place that it could not read. A form whose
files are not JSON gets its own test of a file's first bytes in `reader_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvmem.errors import ConfigError
from kvmem.explain.lint.lines import Record, decode, records
from kvmem.explain.lint.readers import (
    claude_code,
    codex,
    kvtrace,
    ledger,
    mooncake,
    requests,
    sharegpt,
)
from kvmem.explain.lint.values import Call, Fault

__all__ = ["FORMATS", "Reader", "reader_of"]


class Reader(msgspec.Struct, frozen=True):
    """A form of log: its name, whether a record is of it, and each call in such a file."""

    name: str
    accepts: Callable[[dict[str, Any]], bool]
    calls: Callable[[Path], Iterator[Call | Fault]]


# The first that accepts is taken: the ones with the surest marks stand first.
_READERS: tuple[Reader, ...] = tuple(
    Reader(module.NAME, module.accepts, module.calls)
    for module in (ledger, kvtrace, mooncake, sharegpt, codex, claude_code, requests)
)
_LOOKED_AT = 1_000  # records, for one that tells the form
FORMATS: tuple[str, ...] = tuple(reader.name for reader in _READERS)


def reader_of(path: Path, form: str | None = None) -> Reader | None:
    """The reader of a file; None where its first records are of no known form.

    Args:
        path: of the file.
        form: one of `FORMATS`, where the caller knows.

    Raises:
        ConfigError: `form` is none of `FORMATS`, or the file can't be read.
    """
    if form is not None:
        for reader in _READERS:
            if form == reader.name:
                return reader
        raise ConfigError(f"no format {form!r}", next_step=f"Give one of {', '.join(FORMATS)}.")
    if ledger.begins(path):
        return _READERS[0]
    for n, record in enumerate(records(path)):
        value = decode(path, record, dict[str, Any]) if isinstance(record, Record) else None
        if isinstance(value, dict):
            for reader in _READERS:
                if reader.accepts(value):
                    return reader
        if n == _LOOKED_AT:
            break
    return None
