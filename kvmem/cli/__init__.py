"""The kvmem command: `demo`, `serve`, `node`, `gateway`, `top`, `dashboard`, `stats`, `explain`,
`quote`, `where`, `inspect`, `switch`, `quarantine`, `verify`, `lint`, `replay`, `blame`.

Thin: it reads arguments and hands them to the room that does the work, imported when it is asked
for. A `KVMemError` ends as one line on stderr and exit code 2.
"""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec
import typer

from kvmem import config
from kvmem.cli import looking, node, trials
from kvmem.errors import KVMemError

__all__ = ["app", "main"]

NO_ENGINE = 1
NOT_SOUND = 1
NOT_KNOWN = 1
DISK_PATH = Path(config.Config().disk_path)
OUTPUTS_DIFFER = 1
BAD_INPUT = 2
OUR_PREFIX = "--kvmem-"
PANEL = "kvmem's settings"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""kvmem keeps what an LLM engine has computed, so that agents pay for each token once.

Agents send prompts that are almost entirely repeats. vLLM forgets a prompt's state (its KV \
blocks) when the device is full; kvmem keeps it in the host's memory and puts it back, bit for \
bit, when a prompt begins the same way.

\b
  kvmem demo              see what it does, on a real model and this CPU
  kvmem serve ./my-model  start vLLM's OpenAI server with kvmem in it
  kvmem node              one cache for all engines of this host
  kvmem gateway           text histories of any client become exact tokens, before an engine
  kvmem top               the running engines, live
  kvmem dashboard         the same as a page, with the tree of prompts
  kvmem stats             what the running engines reuse
  kvmem explain           why prompts had to be computed, in a running engine
  kvmem quote body.json   what a prompt would find and cost, before it is sent
  kvmem where ids.json    which running engine has how much of a prompt, in which tier
  kvmem inspect           a store, a namespace, a session or a block, from near
  kvmem switch            its loads and stores off and on, in a running engine
  kvmem quarantine        blocks that failed a check in a running engine, and what is left of them
  kvmem verify            look through what is on the disk, every byte
  kvmem lint log.jsonl    what broke a prompt's prefix, in logs and transcripts
  kvmem replay log.jsonl  what other sizes and eviction orders would have kept of those prompts
  kvmem blame run.json    was it the cache, the context or the model that failed
""",
)


def main() -> None:
    """Runs the command line; never returns."""
    try:
        app(prog_name="kvmem")
    except KVMemError as error:
        typer.echo(f"kvmem: {error}", err=True)
        sys.exit(BAD_INPUT)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the picture and the figures go.")
    ] = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smaller team; two minutes instead of five.")
    ] = False,
) -> None:
    """Play a team of agents on a real vLLM, first alone, then with kvmem.

    A lead and four workers share instructions, tools and documents, on SmolLM2-135M and the CPU,
    with too little device memory to hold them all. You get one table (waiting times, tokens
    computed and reused, whether the outputs are equal) and a picture of who waited for what.

    The model is made once from an installed package: 273 MB in ~/.cache/kvmem. Exit code 1 when
    a reply with kvmem differs from the one without it.
    """
    from kvmem.demo.run import run

    if not run(output, quick=quick):
        typer.echo("kvmem: the outputs differ; the table above says which first.", err=True)
        raise typer.Exit(OUTPUTS_DIFFER)


def _serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL [vLLM's flags]",
            help="A folder with a checkpoint, or a name on the Hugging Face hub.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the command line, stop.")
    ] = False,
    **settings: str | None,
) -> None:
    """Start vLLM's OpenAI-compatible server with kvmem in it.

    Every other flag is vLLM's own and is handed on as it is, for example
    [bold]--port 8001 --max-model-len 8192[/bold]. The server listens on 127.0.0.1 unless you
    give --host, and then it wants --api-key too.

    Settings are checked before anything starts. Exit code 2 and a last line that says why when
    there is nothing to serve. With a vLLM that kvmem can't work with, one line says so, and vLLM
    runs without it. `kvmem stats` shows what the server reuses.
    """
    from kvmem.engines.vllm import interface, launch

    given = {name: _value(name, text) for name, text in settings.items() if text is not None}
    flags, more = _split_ours(context.args)
    given |= {name: _value(name, text) for name, text in more.items()}
    command = launch.command(model, given, flags)
    off = interface.why_off()
    if off is not None:
        typer.echo(f"kvmem: {off}", err=True)
    if dry_run:
        typer.echo(shlex.join(command))
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, dict(os.environ))  # the same process: signals reach vLLM


def _split_ours(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--kvmem-...` flags that no option matched, misspelled ones, out of vLLM's."""
    flags: list[str] = []
    ours: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith(OUR_PREFIX):
            name, equals, text = argument.removeprefix(OUR_PREFIX).partition("=")
            ours[name.replace("-", "_")] = text if equals else next(rest, "")
        else:
            flags.append(argument)
    return flags, ours


def _value(name: str, text: str) -> Any:
    """`text` as the setting's type, or as it is: `Config.parse` then says what is wrong."""
    types = {f.name: f.type for f in msgspec.structs.fields(config.Config)}
    try:
        return msgspec.convert(text, types.get(name, str), strict=False)
    except msgspec.ValidationError:
        return text


def _with_settings() -> Any:
    """`_serve` with one option for each of kvmem's settings, from their own description."""
    fixed = list(inspect.signature(_serve, eval_str=True).parameters.values())
    options = [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    OUR_PREFIX + setting.name.replace("_", "-"),
                    help=f"{setting.reason} {setting.cost} Unit: {setting.unit}. "
                    f"Default: {_shown(setting.default)}.",
                    metavar=_kind(setting.name),
                    rich_help_panel=PANEL,
                ),
            ],
        )
        for setting in config.describe()
    ]

    def serve(context: typer.Context, **values: Any) -> None:
        _serve(context, **values)

    serve.__doc__ = _serve.__doc__
    parameters = [*fixed[:-1], *options]
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {p.name: p.annotation for p in parameters}
    return serve


def _shown(default: Any) -> str:
    return "unset" if default is None else str(default).lower()


def _kind(name: str) -> str:
    default = getattr(config.Config(), name)
    return {bool: "TRUE|FALSE", float: "NUMBER", int: "COUNT"}.get(type(default), "TEXT")


app.command(
    "serve",
    options_metavar="",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(_with_settings())


@app.command()
def gateway(
    upstream: Annotated[
        list[str] | None,
        typer.Option(help="The engine's address, http://127.0.0.1:8000; again for another one."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen; 0 takes a free one.")] = 8900,
    sessions: Annotated[
        Path | None, typer.Option(help="A folder for the ledgers; without it memory only.")
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=FOLDER", help="Where the engine's own folder is not here."),
    ] = None,
    token: Annotated[
        str, typer.Option(envvar="KVMEM_GATEWAY_TOKEN", help="What clients must give.")
    ] = "",
    upstream_key: Annotated[
        str, typer.Option(envvar="KVMEM_UPSTREAM_KEY", help="The engine's API key.")
    ] = "",
    max_sessions: Annotated[int, typer.Option(help="Ledgers that are kept.")] = 10_000,
    max_streams: Annotated[int, typer.Option(help="Requests at once; as many more wait.")] = 256,
    max_body_mb: Annotated[float, typer.Option(help="Of a request.")] = 32.0,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte of the engine.")] = 600.0,
) -> None:
    """Stand before an engine, so that every turn of a session extends the last one token by token.

    OpenAI's chat completions and responses and Anthropic's messages on one address. Clients change
    nothing but their base URL. Sessions are found by X-Session-ID, session_id or prompt_cache_key,
    else by what they begin with; usage says what was cached and why not all was.

    It listens on 127.0.0.1 unless you give --host, and then it wants a token too.
    """
    from kvmem.agents.gateway.serve import run
    from kvmem.agents.gateway.settings import Settings, pairs

    run(
        Settings(
            upstreams=tuple(upstream or ()), host=host, port=port, token=token,
            upstream_key=upstream_key, sessions=sessions, tokenizers=pairs(tokenizer or ()),
            max_sessions=max_sessions, max_streams=max_streams, max_body_mb=max_body_mb,
            timeout_s=timeout,
        )
    )  # fmt: skip


@app.command()
def stats(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON list, for machines; with --watch one a line.")
    ] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.1, help="Seconds between refreshes.")
    ] = 1.0,
) -> None:
    """Show what each running engine of yours reuses, computes and stores.

    Reads the page that every engine with kvmem keeps in shared memory; the engine does not
    notice. Exit code 1 when no engine is running.
    """
    from kvmem.cli.live import show

    if not show(watch=watch, as_json=as_json, interval_s=interval_s):
        _no_engine()


@app.command()
def switch(
    loads: Annotated[
        Literal["on", "off"] | None, typer.Option("--loads", help="Answer prompts from kvmem.")
    ] = None,
    stores: Annotated[
        Literal["on", "off"] | None, typer.Option("--stores", help="Keep what is computed.")
    ] = None,
    arena: Annotated[
        str | None, typer.Option(help="Which engine, where several run: the name of its arena.")
    ] = None,
) -> None:
    """Switch kvmem's loads and stores off or on in a running engine, from its next request on.

    Without --loads and --stores it shows what stands. An engine starts with both on; what its
    settings or a request forbid stays forbidden. Exit code 1 when no engine is running.
    """
    from kvmem.cli import switching
    from kvmem.store import set_switch

    found = switching.engines(arena)
    if not found:
        _no_engine()
    if loads is not None or stores is not None:
        set_switch(switching.only(found), loads=_is_on(loads), stores=_is_on(stores))
    for line in switching.lines(found):
        typer.echo(line)


@app.command()
def explain(
    who: Annotated[
        str | None,
        typer.Argument(
            metavar="[REQUEST_ID|SESSION]", help="One of the last requests, or its session."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for machines.")] = False,
    arena: Annotated[
        str | None, typer.Option(help="Which engine, where several run: the name of its arena.")
    ] = None,
) -> None:
    """Say why prompts had to be computed: of one request, of a session, or the dearest causes.

    Without an argument, the ten causes that cost most in the last hour, and what to do. An engine
    tells of its last requests, 32 at most. No text of a prompt is shown. Exit code 1 when no engine
    is running, or none knows of that request or session.
    """
    from kvmem.cli.explaining import show

    found = show(arena, who, as_json=as_json)
    if found is None:
        _no_engine()
    if not found:
        typer.echo(
            f"kvmem: no engine tells of {who!r}; they know of their last requests.", err=True
        )
        raise typer.Exit(NOT_KNOWN)


@app.command()
def quarantine(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for machines.")] = False,
    arena: Annotated[
        str | None, typer.Option(help="Which engine, where several run: the name of its arena.")
    ] = None,
) -> None:
    """List the blocks of the host tier that failed a check in a running engine, the last sixteen.

    Such a block answers no prompt any more, nor do those below it. Its bytes stay in their slot
    while there is room; where they do, they are looked at now. Exit code 1 when no engine is
    running.
    """
    from kvmem.cli.quarantine import show

    if not show(arena, as_json=as_json):
        _no_engine()


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="The setting disk_path, or one store's own folder.")
    ] = DISK_PATH,
    repair: Annotated[
        bool, typer.Option("--repair", help="Empty the records of what is bad.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for machines.")] = False,
) -> None:
    """Look through disk stores that no engine has open: every record, every byte, every parent.

    An engine checks each block as it reads it, so this is never needed; it tells beforehand. Exit
    code 1 unless every store was looked at and is sound, or was repaired.
    """
    from kvmem.cli.verifying import run

    if not run(path, repair=repair, as_json=as_json):
        raise typer.Exit(NOT_SOUND)


@app.command()
def lint(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Logs, gzip or not.")],
    show: Annotated[
        Literal["terminal", "json", "sarif", "html"],
        typer.Option("--show", help="For people, machines, code hosts, or as one page."),
    ] = "terminal",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --show json.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new file for it; with --fix the log's.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="The log's, where its first lines don't tell.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json or its folder; without it characters are counted."),
    ] = None,
    block_tokens: Annotated[
        int, typer.Option("--block-tokens", min=1, max=4096, help="Of the engine's blocks.")
    ] = 16,
    requests: Annotated[
        bool, typer.Option("--requests", help="In JSON every request's cached tokens too.")
    ] = False,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Write a repaired copy, NAME.fixed.EXT; what is safe only."),
    ] = False,
) -> None:
    """Find what broke the prefix of prompts: each turn against the one before it.

    Reads logs of OpenAI and Anthropic requests, transcripts of Claude Code and Codex, ShareGPT and
    kvtrace/1. Says turn, message, the first token that differs, why, and the tokens lost; the
    rules are in docs/lint.md. Exit code 0 when nothing broke, 1 when something did, 2 when a
    place could not be read: what follows it was.
    """
    from kvmem.cli.linting import Options, run

    options = Options(
        "json" if as_json else show, output, form, tokenizer, block_tokens, requests, fix
    )
    code = run(files, options)
    if code:
        raise typer.Exit(code)


@app.command()
def replay(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Logs, gzip or not.")],
    capacity: Annotated[
        str, typer.Option(help="Blocks, or shares of the distinct ones, with commas between.")
    ] = "1%,2%,5%,10%,25%",
    orders: Annotated[
        str, typer.Option(help="Which to compare, with commas between; all without it.")
    ] = "",
    arrange: Annotated[
        str | None,
        typer.Option(help="recorded, poisson:N or round-robin:N; what the log's times allow."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines, one line a file.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Hit rate over capacity into this png, svg or pdf.")
    ] = None,
) -> None:
    """What would another size, or another eviction order, have kept of these prompts?

    Reads every form of log that `kvmem lint` reads. The orders: lru, ttl, s3fifo, arc, kvmem
    (from what a cache sees), kvmem_hints (told what agents wait for as well) and belady, which
    knows the future: no order that keeps prefixes whole gets more. docs/policy.md has more.
    """
    from kvmem.cli.replaying import Options, run

    options = Options(capacity, orders, arrange, as_json, plot)
    code = run(traces, options)
    if code:
        raise typer.Exit(code)


looking.add(app)
app.add_typer(node.app, name="node")
trials.add(app)


def _is_on(given: Literal["on", "off"] | None) -> bool | None:
    return None if given is None else given == "on"


def _no_engine() -> NoReturn:
    typer.echo("kvmem: no engine with kvmem is running. Start one: kvmem serve MODEL", err=True)
    raise typer.Exit(NO_ENGINE)
