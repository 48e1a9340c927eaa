"""What running engines say of themselves: read from their arenas' pages, shown as tables."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from kvmem.errors import ArenaError
from kvmem.explain.misses.explainer import Explained
from kvmem.explain.misses.sums import Cause
from kvmem.store import Arena, Switch, list_live, read_switch
from kvmem.types import Quarantine

__all__ = ["Page", "pages", "render", "show", "size", "until_interrupted"]


class Host(msgspec.Struct, frozen=True):
    """The host tier: slots and bytes.

    `leased` are leases, `reserved` slots that a step under way writes into: both are 0 at rest.
    """

    slots: int
    used: int
    leased: int
    bytes: int
    slot_bytes: int
    reserved: int = 0


class Disk(msgspec.Struct, frozen=True):
    """The disk tier: `used` blocks in `bytes` of `budget`; `on` is False while the disk fails."""

    used: int
    bytes: int
    budget: int
    on: bool
    written: int = 0
    read: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    io_s: float = 0.0
    faults: int = 0
    under_way: int = 0


class Far(msgspec.Struct, frozen=True):
    """The far store, as this engine uses it; `on` is False while it fails.

    `gone` blocks were not there any more, `slower` prompts were quicker to compute, `late` ones
    waited as long as computing them takes.
    """

    on: bool
    label: str = ""
    written: int = 0
    read: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    io_s: float = 0.0
    faults: int = 0
    gone: int = 0
    refused: int = 0
    slower: int = 0
    late: int = 0
    under_way: int = 0


class Scrub(msgspec.Struct, frozen=True):
    """What was looked at without being asked for, since the engine started."""

    bytes: int = 0
    blocks: int = 0
    passes: int = 0
    faults: int = 0
    on: bool = True


class Counters(msgspec.Struct, frozen=True):
    """Since the engine started."""

    requests: int = 0
    prompt_tokens: int = 0
    tokens_hit_device: int = 0
    tokens_hit_host: int = 0
    tokens_hit_disk: int = 0
    tokens_hit_far: int = 0
    tokens_computed: int = 0
    blocks_stored: int = 0
    blocks_loaded: int = 0
    bytes_stored: int = 0
    bytes_loaded: int = 0
    load_s: float = 0.0
    store_s: float = 0.0
    evictions: int = 0
    refused: int = 0
    failures: int = 0
    quarantined: int = 0
    shadowed: int = 0


class Page(msgspec.Struct, frozen=True):
    """One engine's page, as its connector writes it; the reader adds `arena` and `switch`.

    `allowed` is what the settings allow, `switch` what the live switch does; None: it is damaged.
    """

    model: str
    pid: int
    updated_s: float
    host: Host
    counters: Counters
    disk: Disk | None = None
    far: Far | None = None
    scrub: Scrub | None = None
    quarantine: tuple[Quarantine, ...] = ()
    explained: tuple[Explained, ...] = ()
    causes: tuple[Cause, ...] = ()
    last_failure: str | None = None
    allowed: Switch = Switch()
    arena: str = ""
    switch: Switch | None = Switch()


def pages() -> list[Page]:
    """The page of every engine of this user that is alive, by pid."""
    found = []
    for live in list_live():
        path = live.path
        try:
            raw = Arena.read_stats(path)
        except (ArenaError, FileNotFoundError):
            continue  # it ended since it was listed
        if raw is None:
            continue  # it has not written yet, or wrote while we read
        try:
            page = msgspec.msgpack.decode(raw, type=Page)
        except msgspec.DecodeError:
            continue  # of another version of kvmem, whose own command reads it
        found.append(msgspec.structs.replace(page, arena=path.name, switch=_switch(path)))
    return sorted(found, key=lambda page: page.pid)


def _switch(path: Path) -> Switch | None:
    try:
        return read_switch(path)
    except (ArenaError, FileNotFoundError):
        return None


def show(*, watch: bool, as_json: bool, interval_s: float) -> bool:
    """Prints every engine's figures, once or until Ctrl-C; False when there is no engine."""
    console = Console()
    if as_json:
        return _each(watch, interval_s, lambda found: print(_json(found), flush=True))
    if not watch:
        return _each(False, interval_s, lambda found: console.print(render(found, time.time())))
    with Live(console=console, auto_refresh=False) as live:
        return _each(
            True, interval_s, lambda found: live.update(render(found, time.time()), refresh=True)
        )


def render(found: list[Page], now_s: float) -> Group:
    """A table an engine."""
    return Group(*(_table(page, now_s) for page in found))


def _each(watch: bool, interval_s: float, put: Callable[[list[Page]], None]) -> bool:
    with until_interrupted() as interrupted:
        while True:
            found = pages()
            if not found:
                return False
            put(found)
            if not watch or interrupted.wait(interval_s):
                return True


@contextmanager
def until_interrupted() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, in place of ending the process mid-line."""
    event = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: event.set()) for number in numbers]
    try:
        yield event
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _json(found: list[Page]) -> str:
    return msgspec.json.encode(found).decode()


def _table(page: Page, now_s: float) -> Table:
    counters, host = page.counters, page.host
    drawn = Table(
        title=f"{page.model}  (pid {page.pid}, arena {page.arena}, "
        f"written {max(0.0, now_s - page.updated_s):.1f} s ago)",
        title_justify="left",
        show_header=False,
    )
    drawn.add_column()
    drawn.add_column(justify="right")
    drawn.add_column()
    for row in _off(page):
        drawn.add_row(*row, style="bold yellow")
    prompt = counters.prompt_tokens
    drawn.add_row("requests", f"{counters.requests:,}", "")
    drawn.add_row("prompt tokens", f"{prompt:,}", "")
    for label, tokens in (
        ("  computed", counters.tokens_computed),
        ("  reused from the device", counters.tokens_hit_device),
        ("  reused from the host", counters.tokens_hit_host),
        ("  reused from the disk", counters.tokens_hit_disk),
        ("  reused from far", counters.tokens_hit_far),
    ):
        drawn.add_row(label, f"{tokens:,}", _share(tokens, prompt))
    drawn.add_section()
    drawn.add_row(
        "host tier",
        f"{size(host.bytes)}",
        f"{host.used:,} of {host.slots:,} blocks ({_share(host.used, host.slots)}), "
        f"{host.leased:,} leased, {host.reserved:,} being stored",
    )
    disk = page.disk
    if disk is not None:
        drawn.add_row(
            "disk tier" if disk.on else "disk tier, OFF: it failed",
            f"{size(disk.bytes)}",
            f"{disk.used:,} blocks, {_share(disk.bytes, disk.budget)} of {size(disk.budget)}, "
            f"{disk.written:,} written, {disk.read:,} read, {disk.faults:,} faults",
        )
    far = page.far
    if far is not None:
        drawn.add_row(
            f"far store {far.label}" if far.on else f"far store {far.label}, OFF: it failed",
            f"{size(far.bytes_read)} read",
            f"{far.written:,} blocks written, {far.read:,} read, {far.faults:,} faults, "
            f"{far.slower + far.late:,} times slower than computing",
        )
    drawn.add_row(
        "stored",
        f"{counters.blocks_stored:,} blocks",
        _rate(counters.bytes_stored, counters.store_s),
    )
    drawn.add_row(
        "loaded",
        f"{counters.blocks_loaded:,} blocks",
        _rate(counters.bytes_loaded, counters.load_s),
    )
    if page.scrub is not None:
        drawn.add_row(
            "scrubbed" if page.scrub.on else "scrubbed, OFF: it failed",
            f"{page.scrub.blocks:,} blocks",
            f"{size(page.scrub.bytes)}, {page.scrub.passes:,} passes, {page.scrub.faults:,} bad",
        )
    drawn.add_row("evicted", f"{counters.evictions:,} blocks", "")
    drawn.add_row("refused", f"{counters.refused:,} blocks", "no room, or no parent here")
    trouble = "bold red" if counters.failures or counters.quarantined else None
    drawn.add_row("failures", f"{counters.failures:,}", page.last_failure or "", style=trouble)
    if counters.shadowed:
        drawn.add_row("shadowed", f"{counters.shadowed:,} blocks", "computed to be compared")
    listed = f"`kvmem quarantine` lists {len(page.quarantine)}" if page.quarantine else ""
    drawn.add_row("quarantined", f"{counters.quarantined:,} blocks", listed, style=trouble)
    return drawn


def _off(page: Page) -> Iterator[tuple[str, str, str]]:
    """What is off, and what would switch it on."""
    if page.switch is None:
        yield "switch", "damaged", "`kvmem switch --loads on --stores on` writes it anew"
    for what, setting in (("loads", "load"), ("stores", "store")):
        if not getattr(page.allowed, what):
            yield what, "off", f"by the setting '{setting}'"
        elif page.switch is not None and not getattr(page.switch, what):
            yield what, "off", f"until `kvmem switch --{what} on`"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def size(n_bytes: float) -> str:
    """Bytes for people."""
    if n_bytes < 1:
        return "0 B"
    power = min(4, int(math.log(n_bytes, 1024)))
    return f"{n_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _rate(n_bytes: int, seconds: float) -> str:
    if seconds <= 0:
        return size(n_bytes)
    return f"{size(n_bytes)} in {seconds:.2f} s, {n_bytes / seconds / 1e9:.1f} GB/s"
