"""`kvmem where`: which running engine has how much of a prompt, or of a session, in which tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvmem.cli import quoting, switching
from kvmem.errors import ArenaError, ConfigError, NotAnswered, NotUnderstood
from kvmem.store import LiveArena
from kvmem.store.live import quote
from kvmem.store.live import session as session_of

__all__ = ["Place", "of_prompt", "of_session", "run"]


class Place(msgspec.Struct, frozen=True):
    """What one engine has of it: tokens by tier, those of the nearest tier first.

    `host` and `disk` are shared by all engines of a node. `ms` is what the prompt would take there,
    None where that was not measured, or a session was asked for; `running` its requests.
    """

    arena: str
    pid: int
    model: str
    prompt: int
    device: int
    host: int
    disk: int
    ms: float | None = None
    running: int = 0

    @property
    def here(self) -> int:
        """Tokens that would not be computed."""
        return self.device + self.host + self.disk


def run(file: Path | None, *, session: str | None, salt: str | None, as_json: bool) -> bool:
    """Prints it, the engine that has the most first; False where no engine runs.

    Raises:
        ConfigError: there is neither a prompt nor a session, or the prompt is no token ids.
    """
    engines = switching.engines(None)
    if not engines:
        return False
    if file is not None:
        body = quoting.read(file)
        tokens = body.get("prompt", (body.get("kv_transfer_params") or {}).get("prompt_token_ids"))
        if not isinstance(tokens, list) or not tokens:
            raise ConfigError(
                f"{file} has no token ids",
                next_step="Give a list of token ids, or a body whose prompt is one; only a "
                "server can render messages (`kvmem quote --url`).",
            )
        named = salt if salt is not None else body.get("cache_salt")
        found = of_prompt(engines, tokens, salt=str(named or ""))
    elif session is not None:
        found = of_session(engines, session)
    else:
        raise ConfigError("Of what?", next_step="Give a file of token ids, or --session.")
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        print("\n".join(lines(found)))
    return True


def of_prompt(engines: list[LiveArena], tokens: list[int], *, salt: str = "") -> list[Place]:
    """What each engine would find of this prompt now. A salt's blocks are found by who names the
    salt, and by nobody else (I11).

    Raises:
        ConfigError: the tokens are none.
    """

    def ask(one: LiveArena) -> Place | None:
        try:
            told = quote(one.path, tokens, salt=salt)
        except NotUnderstood:  # too long for that model
            return None
        return _place(one, told.prompt, told.device, told.host, told.disk, told.ms, told.running)

    try:
        return _best(engines, ask)
    except ValueError as error:
        raise ConfigError(f"That is no prompt: {error}") from error


def of_session(engines: list[LiveArena], name: str) -> list[Place]:
    """What each engine that knows the session has of its newest prompt."""

    def ask(one: LiveArena) -> Place | None:
        told = session_of(one.path, name)
        if not told.branches:
            return None
        last = told.branches[-1]
        return _place(one, last.prompt, last.device or 0, last.host or 0, last.disk or 0)

    return _best(engines, ask)


def _place(
    one: LiveArena, prompt: int, device: int, host: int, disk: int, ms: float | None = None,
    running: int = 0,
) -> Place:  # fmt: skip
    header = one.header
    return Place(
        one.path.name, header.owner_pid, header.label, prompt, device, host, disk, ms, running
    )


def _best(engines: list[LiveArena], ask: Callable[[LiveArena], Place | None]) -> list[Place]:
    found = []
    for one in engines:
        try:
            place = ask(one)
        except (ArenaError, FileNotFoundError, NotAnswered, msgspec.DecodeError):
            continue  # it ended meanwhile, or is of another version
        if place is not None:
            found.append(place)
    return sorted(
        found, key=lambda p: (-p.here, -p.device, -p.host, p.running, p.ms or 0.0, p.arena)
    )


def lines(found: list[Place]) -> Iterator[str]:
    """For people."""
    if not found:
        yield "no engine knows it"
    for one in found:
        cost = f", about {one.ms:,.0f} ms" if one.ms is not None else ""
        tiers: list[tuple[str, Any]] = [
            ("device", one.device), ("host", one.host), ("disk", one.disk),
        ]  # fmt: skip
        where = ", ".join(f"{n:,} {name}" for name, n in tiers if n) or "nothing"
        yield (
            f"{one.arena}: {one.here:,} of {one.prompt:,} tokens ({where}){cost}; "
            f"{one.running:,} requests under way  (pid {one.pid}, {one.model})"
        )
