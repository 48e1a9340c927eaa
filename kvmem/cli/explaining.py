"""`kvmem explain`: why prompts had to be computed, as running engines tell it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
from rich.console import Console
from rich.table import Table

from kvmem.cli import live, switching
from kvmem.explain.misses.explainer import Explained
from kvmem.explain.misses.reasons import REASONS, fix_of
from kvmem.explain.misses.runs import Run
from kvmem.explain.misses.sums import Cause

__all__ = ["details", "lines", "show"]

_WHAT = {reason.name: reason.what for reason in REASONS}


def show(arena: str | None, who: str | None, *, as_json: bool) -> bool | None:
    """Prints it; None when there is no engine, False when none knows of `who`.

    Args:
        arena: which engine's, None for all.
        who: a request, the beginning of its id, or a session; None for the dearest causes.
        as_json: for machines.

    Raises:
        ConfigError: engines run, but none has that arena.
    """
    wanted = {one.path.name for one in switching.engines(arena)}
    if not wanted:
        return None
    pages = [page for page in live.pages() if page.arena in wanted]
    if who is None:
        causes = [cause for page in pages for cause in page.causes]
        _print_causes(causes, as_json=as_json)
        return True
    found = [one for page in pages for one in page.explained if _is(one, who)]
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        for one in found:
            print("\n".join(lines(one)))
    return bool(found)


def _is(one: Explained, who: str) -> bool:
    return who in (one.request_id, one.session) or one.request_id.startswith(who)


def lines(one: Explained) -> Iterator[str]:
    """A request's runs, for people."""
    session = f", session {one.session}" if one.session else ""
    computed = sum(run.tokens for run in one.runs)
    yield f"{one.request_id}{session}: {computed:,} of {one.prompt:,} tokens computed"
    for run in one.runs:
        cost = f" about {run.ms:,.0f} ms" if run.ms else ""
        yield f"  from {run.first:,}  {run.tokens:,} tokens{cost}  {run.reason}{details(run)}"
        yield f"      {_WHAT.get(run.reason, '')}"
        fix = fix_of(run.reason) if run.reason in _WHAT else ""
        if fix:
            yield f"      {fix}"


def details(run: Run) -> str:
    """What is known of a run beside its reason, in brackets."""
    told = []
    if run.message is not None:
        told.append(f"message {run.message}")
    if run.role:
        told.append(run.role)
    if run.token is not None:
        told.append(f"first differing token {run.token:,}")
    if run.epoch is not None:
        told.append(f"epoch {run.epoch}")
    for name in ("rule", "by", "policy"):
        if getattr(run, name):
            told.append(f"{name} {getattr(run, name)}")
    if run.tier:
        told.append(f"tier {run.tier}")
    if run.at_s:
        told.append(time.strftime("at %H:%M:%S", time.localtime(run.at_s)))
    if run.for_request:
        told.append(f"for {run.for_request}")
    return f" ({', '.join(told)})" if told else ""


def _print_causes(causes: list[Cause], *, as_json: bool) -> None:
    causes = sorted(causes, key=lambda cause: (-cause.ms, -cause.tokens))[:10]
    if as_json:
        print(msgspec.json.encode(causes).decode())
        return
    if not causes:
        print("No prompt had to be computed in the last hour.")
        return
    drawn = Table(title="What cost most in the last hour", title_justify="left")
    for name, justify in (("cause", "left"), ("requests", "right"), ("tokens", "right"),
                          ("about ms", "right"), ("what to do", "left")):  # fmt: skip
        drawn.add_column(name, justify=justify)  # type: ignore[arg-type]
    for cause in causes:
        where = ", ".join(filter(None, (cause.role, cause.rule, cause.by, cause.tier)))
        drawn.add_row(
            f"{cause.reason} ({where})" if where else cause.reason,
            f"{cause.requests:,}", f"{cause.tokens:,}", f"{cause.ms:,.0f}", cause.fix,
        )  # fmt: skip
    Console().print(drawn)
