"""`kvmem node`: one cache for a host's engines, and `kvmem node status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvmem.errors import NotAnswered

__all__ = ["app"]

NO_NODE = 1
PATH = Path("~/.cache/kvmem/node")

WherePath = Annotated[
    Path, typer.Option("--path", help="A private folder: the node's socket, and its disk.")
]

app = typer.Typer(
    invoke_without_command=True,
    help="""One cache for the engines of this host, in a process of its own.

Engines attach with the setting [bold]node[/bold], the same folder. Blocks stay when engines come \
and go, and two engines have one copy.
""",
)


@app.callback()
def node(
    context: typer.Context,
    path: WherePath = PATH,
    host_gb: Annotated[float, typer.Option(help="GiB of shared memory for blocks.")] = 4.0,
    disk_gb: Annotated[float, typer.Option(help="GiB of disk below it; 0 for none.")] = 0.0,
    far: Annotated[str | None, typer.Option(help="A store that hosts share (docs/far.md).")] = None,
    eviction: Annotated[str, typer.Option(help="s3fifo or lru.")] = "s3fifo",
    scrub_mb_s: Annotated[float, typer.Option(help="Blocks looked at unasked; 0 for none.")] = 64.0,
    tenant_share: Annotated[
        float, typer.Option(help="Of the memory, that one salt's requests may have.")
    ] = 1.0,
    health_port: Annotated[
        int | None, typer.Option(help="/health and /ready on 127.0.0.1; 0 takes a free port.")
    ] = None,
) -> None:
    """Serve until told to end."""
    if context.invoked_subcommand is not None:
        return
    from kvmem.node.serve import run
    from kvmem.node.server import Settings

    run(
        Settings(
            path=path.expanduser().absolute(),
            host_gb=host_gb,
            disk_gb=disk_gb,
            far=far,
            eviction=eviction,
            scrub_mb_s=scrub_mb_s,
            tenant_share=tenant_share,
        ),
        health_port=health_port,
    )


@app.command()
def status(
    path: WherePath = PATH,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What a running node holds, for whom. Exit code 1 when there is none."""
    from kvmem.node.status import ask

    try:
        told = ask(path.expanduser().absolute())
    except NotAnswered as error:
        typer.echo(f"kvmem: {error}", err=True)
        raise typer.Exit(NO_NODE) from None
    if as_json:
        print(json.dumps(told))
        return
    show(told)


def show(told: dict[str, Any]) -> None:
    """Prints a node's status as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]kvmem node[/bold] {told['kvmem']}, process {told['pid']}, {told['path']}: "
        f"{told['host_gb']:g} GiB of memory, {told['disk_gb']:g} GiB of disk, "
        f"up {told['up_s'] / 60:,.0f} min",
        highlight=False,
    )
    if told["last_failure"]:
        console.print(f"  {told['failures']} failures, the last: {told['last_failure']}")
    if "cache" not in told:
        console.print("  no engine has attached yet")
        return
    cache, block_bytes = told["cache"], told["slot_bytes"]
    used = cache["published"] * block_bytes / 2**30
    console.print(
        f"  {told['label']}: {cache['published']:,} of {told['slots']:,} blocks, {used:.2f} GiB; "
        f"{cache['leases']:,} leases, {cache['pending'] + cache['orphaned']:,} being written; "
        f"{told['flights']['waited']:,} requests waited for another engine",
        highlight=False,
    )
    engines = Table("engine", "process", "attached", "workers", "requests", "reserved")
    for one in told["engines"]:
        cells = (one["number"], one["pid"], one["attached"], one["workers"], one["requests"],
                 one["reserved"])  # fmt: skip
        engines.add_row(*map(str, cells))
    tenants = Table("tenant", "blocks", "GiB", "GiB hours", "refused")
    for name, one in sorted(told["tenants"].items(), key=lambda pair: -pair[1]["blocks"]):
        tenants.add_row(
            name[:16] or "(no salt)",
            f"{one['blocks']:,}",
            f"{one['bytes'] / 2**30:.2f}",
            f"{one['byte_s'] / 2**30 / 3600:,.2f}",
            f"{one['refused_blocks']:,}",
        )
    console.print(engines)
    console.print(tenants)
