"""`kvmem top`: the running engines in a terminal, live: tiers and flows, sessions, dear misses."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvmem.cli import live, switching
from kvmem.store.live import snapshots
from kvmem.telemetry.live import Snapshot, Tier

__all__ = ["render", "show"]

N_CAUSES = 5
CHARS = 28  # of a session's name


def show(
    arena: str | None, *, once: bool, as_json: bool, interval_s: float, sessions: int
) -> bool | None:
    """Prints how engines stand, once or until Ctrl-C; None when there is no engine, False when
    none of them answers.

    Raises:
        ConfigError: engines run, but none has that arena.
    """
    wanted = {one.path.name for one in switching.engines(arena)}
    if not wanted:
        return None

    def look() -> list[Snapshot]:
        return [one for one in snapshots(sessions=sessions) if one.arena in wanted]

    if once or as_json:
        return _lines(look, once=once, as_json=as_json, interval_s=interval_s)
    before: dict[str, Snapshot] = {}
    with (
        live.until_interrupted() as interrupted,
        Live(console=Console(), auto_refresh=False, screen=True) as drawn,
    ):
        while True:
            found = look()
            if not found:
                return False
            drawn.update(render(found, before), refresh=True)
            before = {one.arena: one for one in found}
            if interrupted.wait(interval_s):
                return True


def _lines(
    look: Callable[[], list[Snapshot]], *, once: bool, as_json: bool, interval_s: float
) -> bool:
    with live.until_interrupted() as interrupted:
        while True:
            found = look()
            if not found:
                return False
            if as_json:
                print(msgspec.json.encode(found).decode(), flush=True)
            else:
                Console().print(render(found, {}))
            if once or interrupted.wait(interval_s):
                return True


def render(found: list[Snapshot], before: dict[str, Snapshot]) -> Group:
    """All engines, one below the other; flows are since `before`, by arena, or else since the
    start."""
    return Group(*(part for one in found for part in _engine(one, before.get(one.arena))))


def _engine(now: Snapshot, before: Snapshot | None) -> list[RenderableType]:
    parts: list[RenderableType] = [_head(now, before), _tiers(now, before)]
    if now.sessions:
        parts.append(_sessions(now))
    if now.causes:
        parts.append(_causes(now))
    if now.failures:
        parts.append(Text(f"{now.failures:,} failures, the last: {now.last_failure}", "bold red"))
    return parts


def _head(now: Snapshot, before: Snapshot | None) -> Text:
    sources = ("device", "host", "disk", "far", "computed")
    tokens = {
        name: now.total("kvmem_prompt_tokens_total", name)
        - (before.total("kvmem_prompt_tokens_total", name) if before else 0)
        for name in sources
    }
    total = sum(tokens.values())
    text = Text(f"{now.model}  ", "bold")
    text.append(
        f"pid {now.pid}  arena {switching.plain(now.arena)}  {now.running:,} running\n", "dim"
    )
    seconds = now.at_s - before.at_s if before is not None else 0.0
    rate = f", {total / seconds:,.0f} tokens/s" if seconds else " tokens"
    share = (total - tokens["computed"]) / total if total else 0.0
    text.append(f"reused {share:.0%} of {total:,.0f}{rate}: ")
    text.append(", ".join(f"{name} {tokens[name]:,.0f}" for name in sources))
    for what, by in now.off.items():
        text.append(f"  {what} OFF by {by}", "bold yellow")
    return text


def _tiers(now: Snapshot, before: Snapshot | None) -> Table:
    drawn = Table(box=None, pad_edge=False)
    for name in ("tier", "fill", "", "blocks", "in", "out", "evicted", "waiting"):
        drawn.add_column(name, justify="left" if name in ("tier", "fill") else "right")
    for tier in now.tiers:
        was = before.tier(tier.name) if before is not None else None
        seconds = now.at_s - before.at_s if before is not None else 0.0
        share = tier.bytes / tier.capacity_bytes if tier.capacity_bytes else 0.0
        style = "" if tier.on else "bold red"
        drawn.add_row(
            Text(tier.name if tier.on else f"{tier.name} OFF", style),
            Bar(1.0, 0.0, share, width=20, color="red" if share > 0.95 else "cyan"),
            f"{share:.0%} of {live.size(tier.capacity_bytes)}",
            f"{tier.blocks:,}",
            _flow(tier, was, "in_bytes", seconds),
            _flow(tier, was, "out_bytes", seconds),
            f"{tier.evicted_blocks - (was.evicted_blocks if was else 0):,}",
            f"{tier.under_way:,}",
        )
    return drawn


def _flow(tier: Tier, was: Tier | None, name: str, seconds: float) -> str:
    n_bytes = getattr(tier, name) - (getattr(was, name) if was is not None else 0)
    return f"{live.size(n_bytes / seconds)}/s" if seconds else live.size(n_bytes)


def _sessions(now: Snapshot) -> Table:
    drawn = Table(box=None, pad_edge=False)
    for name in ("session", "requests", "prompt", "reused", "waited", "missed most", "last"):
        left = name in ("session", "missed most")
        drawn.add_column(name, justify="left" if left else "right", no_wrap=True)
    for one in now.sessions:
        reused = (one.prompt - one.computed) / one.prompt if one.prompt else 0.0
        worst = max(one.missed.items(), key=lambda row: row[1], default=("", 0))
        drawn.add_row(
            one.session[:CHARS] or "(no name)", f"{one.requests:,}", f"{one.prompt:,}",
            f"{reused:.0%}", f"{one.waited_s:.2f} s",
            f"{worst[0]} {worst[1]:,}" if worst[0] else "",
            f"{max(0.0, now.at_s - one.last_s):.0f} s ago",
        )  # fmt: skip
    if now.n_sessions > len(now.sessions):
        drawn.caption = f"the last of {now.n_sessions:,} sessions"
    return drawn


def _causes(now: Snapshot) -> Table:
    drawn = Table(box=None, pad_edge=False)
    for name in ("misses of the last hour", "requests", "tokens", "about ms", "what to do"):
        drawn.add_column(
            name, justify="right" if name in ("requests", "tokens", "about ms") else "left"
        )
    for cause in now.causes[:N_CAUSES]:
        where = ", ".join(filter(None, (cause.role, cause.rule, cause.by, cause.tier)))
        drawn.add_row(
            f"{cause.reason} ({where})" if where else cause.reason, f"{cause.requests:,}",
            f"{cause.tokens:,}", f"{cause.ms:,.0f}", cause.fix,
        )  # fmt: skip
    return drawn
