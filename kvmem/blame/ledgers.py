"""Turns of a session's ledgers, token by token as they were served.

The full history is the oldest ledger's spans, then what later epochs added at their tail: an
epoch's summary stands before spans that it kept, or is the first message that it put in.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvmem.blame.values import Epoch, Turn
from kvmem.context import BlobStore, Ledger, Renderer
from kvmem.context.spans import HEAD, Span
from kvmem.errors import ConfigError

__all__ = ["EXPECT", "is_ledgers", "turns_of_ledgers"]

SUFFIX = ".ledger"
BLOBS = "blobs"
EXPECT = "expect.json"
_STUB = re.compile(
    r"\[[\d,]+ bytes are kept as (kvmem:blob/[0-9a-f]{64}); ask for that to read them\. "
    r"They begin:\]\n.*",
    re.DOTALL,
)


class _Expected(msgspec.Struct, forbid_unknown_fields=True):
    expected: str = ""
    candidates: tuple[str, ...] = ()
    kv: str = "exact"


def is_ledgers(path: Path) -> bool:
    """Whether it is a folder with ledgers in it."""
    return path.is_dir() and any(path.glob(f"*{SUFFIX}"))


def turns_of_ledgers(path: Path, renderer: Renderer) -> list[Turn]:
    """The turns that the newest epoch's ledger has answers of.

    Args:
        path: the ledgers; `expect.json` beside them maps a turn's number to what is known of it
            (`expected`, `candidates`, `kv`), and `blobs` is the folder of offloaded results.
        renderer: the one that they were made with.

    Raises:
        ConfigError: a ledger or `expect.json` can't be read, or an epoch's ledger is missing.
        CorruptBlock: an offloaded result is not what was kept.
    """
    epochs = _in_order(path, [Ledger.load(p, renderer) for p in sorted(path.glob(f"*{SUFFIX}"))])
    blobs = BlobStore(path / BLOBS) if (path / BLOBS).is_dir() else None
    known = _expected(path / EXPECT)
    newest = epochs[-1]
    spans = newest.spans
    ids = newest.tokens()
    answers = [i for i, span in enumerate(spans) if span.source == "sampled"]
    history, made = _undone(epochs)
    turns = []
    for number, at in enumerate(answers):
        asked = next((i for i in range(at - 1, 0, -1) if spans[i].role == "user"), None)
        if asked is None:
            continue
        # What follows the question (calls and results) is part of what it could know.
        before = [s for i, s in enumerate(spans[1:at], 1) if i != asked]
        full = _known_at(history, spans[asked], spans[asked + 1 : at], spans[at:])
        told = known.get(str(number), _Expected())
        one = spans[at]
        turns.append(
            _turn(
                f"{newest.session_id or path.name}/{number}", renderer, newest,
                question=_message(spans[asked]), served=[_message(s) for s in before],
                full=[_restored(m, blobs) for m in full],
                served_ids=tuple(ids[: one.stop - one.sampled]) if asked == at - 1 else (),
                answered=renderer.decode(ids[one.stop - one.sampled : one.stop]),
                epochs=made, told=told,
            )
        )  # fmt: skip
    return turns


def _known_at(
    history: Sequence[tuple[Span, Any]], asked: Span, since: Sequence[Span], later: Sequence[Span]
) -> list[Any]:
    """The history without the question, its answer and what came later."""
    n_later = sum(_same(asked, span) for span in later)  # the same question may come again
    places = [i for i, (span, _) in enumerate(history) if _same(span, asked)]
    at = places[-1 - n_later] if len(places) > n_later else len(history)
    kept = [message for _, message in history[:at]]
    return kept + [m for s, m in history[at + 1 :] if any(_same(s, one) for one in since)]


def _turn(name: str, renderer: Renderer, ledger: Ledger, *, told: _Expected, **fields: Any) -> Turn:
    from kvmem.blame.runs import turn_of

    full = fields.pop("full")
    epochs = tuple(e for e in fields.pop("epochs") if all(i < len(full) for i in e.removed))
    return turn_of(
        name, fields.pop("question"), full, fields.pop("served"), system=ledger.system,
        tools=ledger.tools, salt=ledger.cache_salt, epochs=epochs, expected=told.expected,
        candidates=told.candidates, kv=told.kv, **fields,
    )  # fmt: skip


def _in_order(path: Path, ledgers: Sequence[Ledger]) -> list[Ledger]:
    """The epochs of one session, the first first.

    Raises:
        ConfigError: one of them supersedes a ledger that is not here.
    """
    newest = max(ledgers, key=lambda one: one.epoch)
    by_digest = {one.digest: one for one in ledgers}
    order = [newest]
    while order[-1].supersedes:
        before = by_digest.get(order[-1].supersedes)
        if before is None:
            raise ConfigError(
                f"{path} lacks the ledger that epoch {order[-1].epoch} supersedes",
                next_step=f"Put the one of epoch {order[-1].epoch - 1} there.",
                path=path,
            )
        order.append(before)
    return order[::-1]


def _undone(epochs: Sequence[Ledger]) -> tuple[list[tuple[Span, Any]], tuple[Epoch, ...]]:
    """The full history, and of each epoch what it took out."""
    history = [(s, _message(s)) for s in epochs[0].spans if s.role != HEAD]
    made = []
    for number, (before, after) in enumerate(itertools.pairwise(epochs), 1):
        kept = [s for s in after.spans if any(_same(s, b) for b in before.spans)]
        removed = [s for s in before.spans if not any(_same(s, a) for a in after.spans)]
        gone = tuple(
            i for i, (s, _) in enumerate(history) if any(_same(s, r) for r in removed)
        )  # fmt: skip
        last = after.spans.index(kept[-1]) if kept else 0
        tail = list(after.spans[last + 1 :])
        if tail and removed and tail[0].source == "rendered" and tail[0].role != "tool":
            first_gone = before.spans.index(removed[0])
            if first_gone > max((before.spans.index(b) for b in before.spans
                                 if any(_same(k, b) for k in kept)), default=0):  # fmt: skip
                tail = tail[1:]  # the message that stands for what was taken out
        history += [(s, _message(s)) for s in tail]
        made.append(Epoch(number=number, removed=gone, what=f"{len(removed)} messages taken out"))
    return history, tuple(made)


def _same(a: Span, b: Span) -> bool:
    return a.role == b.role and a.message == b.message and bool(a.message) == bool(b.message)


def _message(span: Span) -> dict[str, Any]:
    return dict(msgspec.json.decode(span.message)) if span.message else {"role": span.role}


def _restored(message: Mapping[str, Any], blobs: BlobStore | None) -> Mapping[str, Any]:
    """The message with the very bytes that its stub stands for."""
    content = message.get("content")
    found = _STUB.fullmatch(content) if isinstance(content, str) else None
    if found is None or blobs is None:
        return message
    return {**message, "content": blobs.get(found[1]).decode(errors="replace")}


def _expected(path: Path) -> dict[str, _Expected]:
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, _Expected])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} can't be used: {error}",
            next_step='Give {"0": {"expected": ..., "candidates": [...]}}.',
            path=path,
        ) from error
