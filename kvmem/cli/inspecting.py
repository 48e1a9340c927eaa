"""`kvmem inspect`: what lies where, in running engines and on the disk, for people and machines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from kvmem.cli import explaining, switching
from kvmem.cli.live import size
from kvmem.errors import ArenaError, NotAnswered
from kvmem.explain.misses.explainer import Explained
from kvmem.store import Arena, survey
from kvmem.store.desk import ask
from kvmem.store.inspect import inspect
from kvmem.store.live import session as session_of
from kvmem.store.survey import ArenaSurvey, Place, StoreSurvey
from kvmem.telemetry.live import SessionDetail

__all__ = ["Block", "Namespace", "block", "namespace", "session", "stores"]

DIGITS = 16
MOST_PLACES = 50
FOUND = {
    "gone": "given back since", "identity": "the slot names another block",
    "bytes": "the bytes differ from those stored", "sound": "whole",
}  # fmt: skip


class Namespace(msgspec.Struct, frozen=True):
    """Blocks that answer one another's prompts: engines of one model, and their stores."""

    namespace: str
    engines: tuple[ArenaSurvey, ...]
    stores: tuple[StoreSurvey, ...]


class Block(msgspec.Struct, frozen=True):
    """A place of a block; `fate` is the engine's word on it, `state` what its bytes say."""

    place: Place
    fate: str = ""
    state: str = ""


def stores(path: Path, *, as_json: bool) -> bool:
    """Prints the stores at a path; False when there are none."""
    found = survey.stores(path)
    if as_json:
        _json(found)
    elif found:
        Console().print(_stores(found))
    return bool(found)


def namespace(digits: str, path: Path, *, as_json: bool) -> bool:
    """Prints who shares a namespace, or all where no digits are given; False when none is known."""
    engines, there = survey.arenas(), survey.stores(path)
    names = sorted({one.namespace for one in (*engines, *there)})
    found = [
        Namespace(
            name,
            tuple(one for one in engines if one.namespace == name),
            tuple(one for one in there if one.namespace == name),
        )
        for name in names
        if name.startswith(digits.lower())
    ]
    if as_json:
        _json(found)
        return bool(found)
    for one in found:
        console = Console()
        console.print(f"namespace {one.namespace}", style="bold")
        if one.engines:
            console.print(_engines(one.engines))
        if one.stores:
            console.print(_stores(one.stores))
    return bool(found)


def session(name: str, arena: str | None, *, as_json: bool) -> bool | None:
    """Prints what engines know of a session; None when no engine runs, False when none knows it."""
    engines = switching.engines(arena)
    if not engines:
        return None
    found = []
    for one in engines:
        try:
            told = session_of(one.path, name)
        except (ArenaError, FileNotFoundError, NotAnswered):
            continue  # it ended since it was listed, or is of another version
        if told.session is not None or told.branches:
            found.append(told)
    if as_json:
        _json(found)
    else:
        for one_told in found:
            print("\n".join(_session(one_told)))
    return bool(found)


def block(prefix: str, path: Path, *, as_json: bool) -> bool:
    """Prints every place of the blocks whose keys begin so; False when there is none.

    Raises:
        ConfigError: that is no beginning of a key.
    """
    places = survey.places(prefix, path)
    found = [_looked_at(place) for place in places[:MOST_PLACES]]
    found += [Block(place) for place in places[MOST_PLACES:]]
    if as_json:
        _json(found)
        return bool(found)
    drawn = Table(title_justify="left")
    for name in ("key", "tier", "slot or record", "generation", "group", "bytes", "depth", "state",
                 "where"):  # fmt: skip
        drawn.add_column(name)
    for one in found[:MOST_PLACES]:
        at = one.place
        drawn.add_row(
            at.key[:DIGITS], at.tier, str(at.number), str(at.generation), str(at.group),
            size(at.bytes), "" if at.depth is None else str(at.depth),
            ", ".join(filter(None, (one.fate, one.state))),
            switching.plain(at.where) if at.tier == "host" else at.where,
        )  # fmt: skip
    if found:
        Console().print(drawn)
    if len(found) > MOST_PLACES:
        print(f"and {len(found) - MOST_PLACES:,} more: give more digits, or --json")
    return bool(found)


def _looked_at(place: Place) -> Block:
    if place.tier != "host":
        return Block(place, state="`kvmem verify` reads its bytes")
    path, key = Arena.path_of(switching.plain(place.where)), bytes.fromhex(place.key)
    try:
        state = FOUND[inspect(path, place.number, place.generation, key).found]
        raw = ask(path, "block", key=key, group=place.group)
        fate = msgspec.msgpack.decode(raw, type=dict[str, str])["fate"]
    except (ArenaError, FileNotFoundError, NotAnswered):  # it ended since it was listed
        return Block(place, state="its engine has ended, or does not answer")
    return Block(place, fate=fate, state=state)


def _session(told: SessionDetail) -> list[str]:
    lines = []
    one = told.session
    if one is not None:
        reused = one.prompt - one.computed
        share = f" ({reused / one.prompt:.0%})" if one.prompt else ""
        lines.append(
            f"{one.session}: {one.requests:,} requests, {one.prompt:,} prompt tokens, "
            f"{reused:,} reused{share}, waited {one.waited_s:.2f} s  "
            f"(arena {switching.plain(told.arena)})"
        )
        for reason, tokens in sorted(one.missed.items(), key=lambda row: -row[1]):
            if tokens:
                lines.append(f"  {tokens:,} tokens missed: {reason}")
    for branch in told.branches:
        now = "" if branch.device is None else (
            f": now {branch.device:,} tokens on the device, {branch.host:,} on the host, "
            f"{branch.disk:,} on the disk"
        )  # fmt: skip
        lines.append(f"  {branch.request_id}: {branch.blocks:,} blocks computed{now}")
    for turn in told.turns[-5:]:
        at = time.strftime("%H:%M:%S", time.localtime(turn.began_s))
        lines.append(
            f"  {at} {turn.request_id}: {turn.prompt:,} tokens, device {turn.device:,}, "
            f"host {turn.host:,}, disk {turn.disk:,}, far {turn.far:,}, computed {turn.computed:,}"
        )
    for raw in told.explained[-1:]:
        lines += [f"  {line}" for line in explaining.lines(msgspec.convert(raw, Explained))]
    return lines


def _engines(found: tuple[ArenaSurvey, ...]) -> Table:
    drawn = Table(title="running engines", title_justify="left")
    for name in ("arena", "model", "pid", "blocks", "being written", "slots", "by group"):
        drawn.add_column(name)
    for one in found:
        drawn.add_row(
            switching.plain(one.arena), one.model, str(one.pid), f"{one.blocks:,}",
            f"{one.writing:,}", f"{one.slots:,}", _by(one.groups),
        )  # fmt: skip
    return drawn


def _stores(found: list[StoreSurvey] | tuple[StoreSurvey, ...]) -> Table:
    drawn = Table(title="stores on the disk", title_justify="left")
    for name in ("folder", "blocks", "bytes", "of", "deepest", "by group", "codecs", "opened"):
        drawn.add_column(name)
    for one in found:
        opened = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used_s))
        state = "open now" if one.in_use else opened
        if one.error:
            drawn.add_row(one.folder, "", "", "", "", "", one.error, state)
            continue
        drawn.add_row(
            one.folder, f"{one.blocks:,}", size(one.bytes), size(one.capacity_bytes),
            f"{one.deepest:,}", _by(one.groups), _by(one.codecs), state,
        )  # fmt: skip
    return drawn


def _by(counts: dict[int, int]) -> str:
    return ", ".join(f"{which}: {n:,}" for which, n in sorted(counts.items()))


def _json(found: Any) -> None:
    print(msgspec.json.encode(found).decode())
