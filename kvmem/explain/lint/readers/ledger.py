"""Reads kvmem's own ledgers: every turn of the model is a call, its prompt the very ids.

A ledger cannot break its own prefix, so no break is found in one; what is told of it are its
requests and the cached tokens that they can count on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmem.context.file import MAGIC, read
from kvmem.context.spans import ID
from kvmem.errors import ConfigError
from kvmem.explain.lint.values import Call, Fault

__all__ = ["NAME", "accepts", "begins", "calls"]

NAME = "ledger"


def begins(path: Path) -> bool:
    """Whether the file's first bytes are a ledger's."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # whoever reads it next says why


def accepts(first: dict[str, Any]) -> bool:
    """No JSON is a ledger."""
    return False


def calls(path: Path) -> Iterator[Call | Fault]:
    """Each turn of the model; `line` is the number of its span."""
    try:
        saved, _ = read(path, None)
    except ConfigError as error:
        yield Fault(str(path), 1, str(error).removesuffix(error.next_step).strip(" ."),
                    error.next_step)  # fmt: skip
        return
    ids = array(ID)
    ids.frombytes(saved.ids)
    known = 0
    for number, span in enumerate(saved.spans):
        if span.sampled:
            prompt = ids[: span.stop - span.sampled].tolist()
            output = ids[span.stop - span.sampled : span.stop].tolist()
            yield Call(number + 1, saved.session_id or str(path), "main", ids=prompt,
                       known_ids=known, output=output)  # fmt: skip
            known = len(prompt)
