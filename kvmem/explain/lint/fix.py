"""Puts right in a log of requests what can be without changing what a model is told.

Tools go back into their earlier order, JSON and blanks into their earlier form. All else needs a
decision, and stays. The log itself is never written to.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from kvmem.errors import ConfigError
from kvmem.explain.lint.chains import Chain
from kvmem.explain.lint.classify import classify, says_the_same
from kvmem.explain.lint.lines import Record, records
from kvmem.explain.lint.lint import lint_file
from kvmem.explain.lint.measure import Measure
from kvmem.explain.lint.readers import reader_of, requests
from kvmem.explain.lint.values import Call, FileReport, Part

__all__ = ["Fixed", "fix_file", "fixed_name"]


class Fixed(msgspec.Struct, frozen=True):
    """The new file, requests changed in it, and what is found in it."""

    path: str
    n_changed: int
    report: FileReport


def fixed_name(path: Path) -> Path:
    """Where the repaired log goes: beside the log, `.fixed` before its endings."""
    endings = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    stem = path.name.removesuffix(endings)
    return path.with_name(f"{stem}.fixed{endings}")


def fix_file(
    path: Path,
    *,
    to: Path | None = None,
    form: str | None = None,
    measure: Measure | None = None,
    block_tokens: int = 16,
) -> Fixed | None:
    """Writes a repaired copy of a log of requests; None where the file is of another form.

    The copy has every readable record; those that needed nothing are as they were, byte by byte.

    Args:
        path: of the log.
        to: the new file; None takes `fixed_name(path)`.
        form: one of `readers.FORMATS`, or None.
        measure: what prompts are counted in; None counts characters.
        block_tokens: as for `lint_file`.

    Raises:
        ConfigError: the new file is there already, or can't be made; the log can't be read.
    """
    reader = reader_of(path, form)
    if reader is None or reader.name != requests.NAME:
        return None
    target = to or fixed_name(path)
    with _created(target) as out:
        copier = _Copier(path, out)
        report = lint_file(
            path, form=form, measure=measure, block_tokens=block_tokens, repair=copier.repair
        )
        copier.finish()
    named = msgspec.structs.replace(report, path=str(target))
    return Fixed(str(target), copier.n_changed, named)


@contextmanager
def _created(target: Path) -> Iterator[IO[bytes]]:
    """A new file that only this user may read, and none where writing it fails."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{target} is there already", next_step="Remove it, or name another with --output."
        ) from None
    except OSError as error:
        raise _unwritten(target, error) from None
    raw = os.fdopen(descriptor, "wb")
    out: IO[bytes] = _Packed(raw) if target.suffix == ".gz" else raw  # type: ignore[assignment]
    try:
        with out:
            yield out
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritten(target, error) from None
        raise


def _unwritten(target: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{target} cannot be written: {error.strerror or error}",
        next_step="Name a file in a folder of yours with --output.",
    )


class _Packed(gzip.GzipFile):
    """gzip without the time and the name in it; closes the file below too."""

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__(filename="", mode="wb", fileobj=raw, mtime=0)
        self._raw = raw

    def close(self) -> None:
        super().close()
        self._raw.close()


class _Copier:
    """Copies records in step with the linter, and repairs its calls as they pass."""

    def __init__(self, path: Path, out: IO[bytes]) -> None:
        self.n_changed = 0
        self._out = out
        self._records: Iterator[Record] = (
            record for record in records(path) if isinstance(record, Record)
        )

    def repair(self, call: Call, chain: Chain) -> None:
        """Repairs a call by the prompt before it, and writes its record."""
        changed = bool(chain.turn) and repair(call, chain.parts)
        for record in self._records:
            if record.line >= call.line:
                data = msgspec.json.encode(call.record) if changed else record.data
                self.n_changed += changed
                self._write(data)
                return
            self._write(record.data)

    def finish(self) -> None:
        """Copies what no call came from."""
        for record in self._records:
            self._write(record.data)

    def _write(self, data: bytes) -> None:
        self._out.write(data if data.endswith(b"\n") else data + b"\n")


def repair(call: Call, before: list[Part]) -> bool:
    """Puts earlier forms back into a call's parts and its body; whether there were any."""
    changed = False
    call.parts = list(call.parts)
    for i, old in enumerate(before[: len(call.parts)]):
        new = call.parts[i]
        if old.same(new):
            continue
        safe = says_the_same(classify(before, call.parts, i), old, new)
        if not safe or not _put(call.body, old, new):
            break
        call.parts[i] = msgspec.structs.replace(old, message=new.message)
        changed = True
    return changed


def _put(body: dict[str, Any], old: Part, new: Part) -> bool:
    """Writes the earlier form into the request's body; False where it has no safe place."""
    if _call_ids(old.origin) != _call_ids(new.origin):
        return False  # a result further on answers to the new id
    if new.kind == "tools":
        body["tools" if body.get("tools") else "functions"] = old.origin
        return True
    if new.message is None:
        name = "system" if body.get("system") else "instructions"
        body[name] = _marked(old.origin, new.origin)["content"]
        return True
    listed = body.get("messages", body.get("input"))
    if not isinstance(listed, list):
        return False
    listed[new.message] = _marked(old.origin, new.origin)
    return True


def _call_ids(origin: Any) -> list[str]:
    """The ids of tool calls and results in a message, in order."""
    if not isinstance(origin, dict):
        return []
    content = origin.get("content")
    blocks = [*(content if isinstance(content, list) else []), *(origin.get("tool_calls") or [])]
    names = ("id", "tool_use_id", "tool_call_id", "call_id")
    return [str(b[n]) for b in [origin, *blocks] if isinstance(b, dict) for n in names if n in b]


def _marked(old: Any, new: Any) -> Any:
    """The earlier message with the new one's cache breakpoint: Anthropic allows four at most."""
    content = old.get("content")
    if not isinstance(content, list):
        return old
    blocks = [
        {k: v for k, v in block.items() if k != "cache_control"}
        if isinstance(block, dict)
        else block
        for block in content
    ]
    now = new.get("content")
    marks = (
        [b["cache_control"] for b in now if isinstance(b, dict) and "cache_control" in b]
        if (isinstance(now, list))
        else []
    )
    if marks and blocks and isinstance(blocks[-1], dict):
        blocks[-1]["cache_control"] = marks[-1]
    return {**old, "content": blocks}
