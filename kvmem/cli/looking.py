"""The commands that look at running engines and stores: `top`, `dashboard`, `quote`,
`where`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kvmem import config

__all__ = ["add"]

NOT_FOUND = 1
DISK_PATH = Path(config.Config().disk_path)

Json = Annotated[bool, typer.Option("--json", help="For machines.")]
WhichArena = Annotated[
    str | None, typer.Option(help="Which engine, where several run: the name of its arena.")
]
DiskPath = Annotated[Path, typer.Option("--disk-path", help="The setting disk_path.")]

inspect = typer.Typer(
    no_args_is_help=True,
    help="""Look at what lies where: a store, a namespace, a session, a block.

Nothing is changed, nobody is locked out, and no engine notices. Exit code 1 when nothing is found.
""",
)


def add(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(top)
    app.command()(dashboard)
    app.command()(quote)
    app.command()(where)
    app.add_typer(inspect, name="inspect")


def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON list a line; with --once a single one.")
    ] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.1, help="Seconds between refreshes.")
    ] = 1.0,
    sessions: Annotated[
        int, typer.Option(min=0, max=10_000, help="Of those used last, so many.")
    ] = 15,
    arena: WhichArena = None,
) -> None:
    """Watch the running engines: tiers and flows, sessions, the misses that cost most.

    Flows are since the last refresh; with --once they are sums since the engine's start. Ctrl-C
    ends it. Exit code 1 when no engine is running, or none answers.
    """
    from kvmem.cli.top import show

    told = show(arena, once=once, as_json=as_json, interval_s=interval_s, sessions=sessions)
    if told is None:
        _no_engine()
    if not told:
        _not_found("the engines that run do not answer; they may be of another version")


def dashboard(
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen; 0 takes a free one.")] = 8901,
    token: Annotated[
        str, typer.Option(envvar="KVMEM_DASHBOARD_TOKEN", help="What a browser must give.")
    ] = "",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that a proxy of this machine serves the page under."),
    ] = None,
    arena: WhichArena = None,
) -> None:
    """Serve one live page: the prefix tree, sessions, tiers, misses, decisions.

    It finds this user's running engines, and engines that start later. An engine works for it only
    while somebody looks. No text of a prompt is shown. It listens on 127.0.0.1 unless you give
    --host, and then it wants a token too. `kvmem serve` has the same page at /kvmem/.
    """
    from kvmem.cli import switching
    from kvmem.dashboard.serve import run
    from kvmem.store import Arena

    name = None if arena is None else Arena.path_of(switching.plain(arena)).name
    run(arena=name, host=host, port=port, token=token, hosts=tuple(allow_host or ()))


def quote(
    file: Annotated[
        Path,
        typer.Argument(help="The body of a request, messages, or token ids, as JSON; - for stdin."),
    ],
    session: Annotated[str | None, typer.Option(help="In place of the body's session_id.")] = None,
    salt: Annotated[str | None, typer.Option(help="In place of the body's cache_salt.")] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The server that renders messages; http://127.0.0.1:8000 without it."),
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="KVMEM_UPSTREAM_KEY", help="The server's API key.")
    ] = "",
    arena: WhichArena = None,
    as_json: Json = False,
) -> None:
    """Say what a prompt would find if it were sent now, and what the rest would cost.

    How many of its tokens would come from which tier, about how many milliseconds it would take,
    what of it misses, why, and what to do. Token ids are asked on the engine's own host; messages
    and text need its server. Nothing is changed by it. Exit code 1 when no engine is running.
    """
    from kvmem.cli.quoting import run

    if not run(
        file, session=session, salt=salt, url=url, api_key=api_key, arena=arena, as_json=as_json
    ):
        _no_engine()


def where(
    file: Annotated[
        Path | None,
        typer.Argument(help="Token ids, or a body whose prompt they are, as JSON; - for stdin."),
    ] = None,
    session: Annotated[str | None, typer.Option(help="A session, in place of a prompt.")] = None,
    salt: Annotated[str | None, typer.Option(help="In place of the body's cache_salt.")] = None,
    as_json: Json = False,
) -> None:
    """Say which running engine has how much of a prompt, in which tier: for routers.

    The engine that has the most comes first. Engines of one node have its host and disk in common;
    the device is each one's own. Nothing is changed by it. Exit code 1 when no engine is running.
    """
    from kvmem.cli.where import run

    if not run(file, session=session, salt=salt, as_json=as_json):
        _no_engine()


@inspect.command("store")
def inspect_store(
    path: Annotated[
        Path, typer.Argument(help="The setting disk_path, or one store's own folder.")
    ] = DISK_PATH,
    as_json: Json = False,
) -> None:
    """Stores on the disk: blocks, bytes, the longest prompt; whether an engine has them open.

    Reads the records and no block: `kvmem verify` reads every byte.
    """
    from kvmem.cli.inspecting import stores

    if not stores(path, as_json=as_json):
        _not_found(f"there is no store at {path}")


@inspect.command("namespace")
def inspect_namespace(
    digits: Annotated[str, typer.Argument(help="How its digest begins; all without it.")] = "",
    disk_path: DiskPath = DISK_PATH,
    as_json: Json = False,
) -> None:
    """Whose blocks can answer whose prompts: the engines and stores of one namespace.

    A namespace is the digest of all that makes KV valid: weights, configuration, layout.
    """
    from kvmem.cli.inspecting import namespace

    if not namespace(digits, disk_path, as_json=as_json):
        _not_found("no running engine and no store has such a namespace")


@inspect.command("session")
def inspect_session(
    name: Annotated[str, typer.Argument(help="As its requests give it.")],
    arena: WhichArena = None,
    as_json: Json = False,
) -> None:
    """A session: what it reused and missed, its last requests, and where its prompts are now."""
    from kvmem.cli.inspecting import session

    found = session(name, arena, as_json=as_json)
    if found is None:
        _no_engine()
    if not found:
        _not_found(f"no engine knows the session {name!r}; they remember those used last")


@inspect.command("block")
def inspect_block(
    key: Annotated[str, typer.Argument(help="How its key begins, 4 hex digits at least.")],
    disk_path: DiskPath = DISK_PATH,
    as_json: Json = False,
) -> None:
    """A block: in which slots and records it lies, whether its bytes are those stored."""
    from kvmem.cli.inspecting import block

    if not block(key, disk_path, as_json=as_json):
        _not_found(f"no running engine and no store has a block whose key begins with {key}")


def _not_found(what: str) -> NoReturn:
    typer.echo(f"kvmem: {what}.", err=True)
    raise typer.Exit(NOT_FOUND)


def _no_engine() -> NoReturn:
    _not_found("no engine with kvmem is running. Start one: kvmem serve MODEL")
