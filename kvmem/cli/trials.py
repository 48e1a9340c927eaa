"""The command `blame`: turns that went wrong, tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["add"]


def add(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(blame)


def blame(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run, or a folder of runs.")
    ],
    model: Annotated[
        str, typer.Option(help="The checkpoint's folder, or its name on the Hugging Face hub.")
    ],
    url: Annotated[
        str, typer.Option(help="Replay on this server; without it on transformers, here.")
    ] = "",
    served_model: Annotated[str, typer.Option(help="The model's name on that server.")] = "",
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="What the server wants.")
    ] = "",
    other_model: Annotated[str, typer.Option(help="Another model, for arm M.")] = "",
    turn: Annotated[int | None, typer.Option(min=0, help="Only this one; the first is 0.")] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="exact, contains, tool-call, regex:PATTERN or python:MODULE:FUNCTION; without it "
            "the run's candidates are compared."
        ),
    ] = "",
    verify_kv: Annotated[
        bool, typer.Option("--verify-kv", help="Compute exact KV anew, though it was exact.")
    ] = False,
    influence: Annotated[
        bool, typer.Option("--influence", help="Leave each piece out once, to colour the page.")
    ] = False,
    host_gb: Annotated[
        float, typer.Option(help="Memory for prefixes of a model that runs here.")
    ] = 0.5,
    show: Annotated[
        Literal["terminal", "json", "html"],
        typer.Option("--show", help="For people, machines, or as one page."),
    ] = "terminal",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --show json.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new file for it.")
    ] = None,
) -> None:
    """Was it the cache, the context or the model? Replays turns that went wrong.

    As served, with exact KV, with the full history, with the evidence alone and without it; most of
    it is cached. Says what was at fault, how sure that is, and what would have helped. A folder
    gives a table of its runs. Exit code 0 when neither context nor cache was at fault, 1 when one
    was, 2 when a run could not be read. docs/blame.md says what a run is.
    """
    from kvmem.cli.blaming import Options, run

    options = Options(
        model=model, url=url, api_key=api_key, served_model=served_model, other=other_model,
        turn=turn, judge=judge, verify_kv=verify_kv, influence=influence,
        shown="json" if as_json else show, output=output, host_gb=host_gb,
    )  # fmt: skip
    code = run(runs, options)
    if code:
        raise typer.Exit(code)
