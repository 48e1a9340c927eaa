"""`kvmem lint`: logs read with a bar for people, results as a table, JSON, SARIF or one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import kvmem
from kvmem.cli.files import write_new
from kvmem.errors import ConfigError
from kvmem.explain.lint import FileReport, lint_file, load_tokenizer
from kvmem.explain.lint.fix import fix_file
from kvmem.explain.lint.flame import page
from kvmem.explain.lint.measure import Characters, Measure
from kvmem.explain.lint.sarif import sarif

__all__ = ["Options", "run"]

MOST_SHOWN = 20
CLEAN, BROKEN, BAD = 0, 1, 2
Shown = Literal["terminal", "json", "sarif", "html"]


class Options(msgspec.Struct, frozen=True):
    """What the command line asks for. `form` None: the file's first records say."""

    shown: Shown = "terminal"
    output: Path | None = None
    form: str | None = None
    tokenizer: Path | None = None
    block_tokens: int = 16
    with_requests: bool = False
    fix: bool = False


def run(files: list[Path], options: Options) -> int:
    """Reads the files, shows what was found; the command's exit code.

    Raises:
        ConfigError: a file can't be read or written, a tokenizer or a format is not there.
    """
    measure: Measure = Characters()
    if options.tokenizer is not None:
        measure = load_tokenizer(options.tokenizer)
    if options.fix and options.output is not None and len(files) > 1:
        raise ConfigError(
            "--fix with --output takes one file", next_step="Leave --output out, or give one file."
        )
    reports = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        for path in files:
            bars.add_task(path.name, total=None)
            reports.append(
                lint_file(
                    path,
                    form=options.form,
                    measure=measure,
                    block_tokens=options.block_tokens,
                    with_requests=options.with_requests,
                )
            )
    _show(reports, options)
    for report in reports:
        for fault in report.faults[:MOST_SHOWN]:
            print(f"kvmem: {fault}", file=sys.stderr)
        if report.n_faults > MOST_SHOWN:
            more = f"{report.n_faults - MOST_SHOWN:,} more in {report.path}"
            print(f"kvmem: {more}: --show json lists them", file=sys.stderr)
    if options.fix:
        for path in files:
            _fix(path, measure, options)
    if any(report.n_faults for report in reports):
        return BAD
    return BROKEN if any(report.n_breaks for report in reports) else CLEAN


def _fix(path: Path, measure: Measure, options: Options) -> None:
    fixed = fix_file(
        path,
        to=options.output,
        form=options.form,
        measure=measure,
        block_tokens=options.block_tokens,
    )
    if fixed is None:
        said = f"{path}: --fix writes logs of requests only; nothing was written"
    else:
        left = fixed.report.n_breaks
        said = f"{fixed.path}: {fixed.n_changed:,} requests changed, {left:,} breaks left in it"
    print(said, file=sys.stderr)


def _show(reports: list[FileReport], options: Options) -> None:
    if options.shown == "terminal":
        console = Console()
        for report in reports:
            _print(console, report)
        return
    if options.shown == "json":
        text = msgspec.json.encode(reports).decode() + "\n"
    elif options.shown == "sarif":
        text = msgspec.json.encode(sarif(reports, kvmem.__version__)).decode() + "\n"
    else:
        text = page(reports)
    if options.output is None or options.fix:
        sys.stdout.write(text)
        return
    write_new(options.output, text)


def _print(console: Console, report: FileReport) -> None:
    share = report.cached / report.prompt if report.prompt else 0.0
    counted = "" if report.unit == "token" else " (no tokenizer: tokens are a quarter of them)"
    console.print(
        Text(
            f"{report.path}: {report.format}, {report.n_calls:,} calls in {report.n_sessions:,} "
            f"sessions, {share:.1%} of {report.prompt:,} {report.unit}s to be found{counted}"
        )
    )
    if not report.n_breaks:
        console.print(Text("  no break: every prompt extends the one before it"))
        return
    table = Table(
        title=f"{report.n_breaks:,} breaks, {report.lost_tokens:,} tokens to compute again",
        title_justify="left",
    )
    for heading in ("line", "session/agent", "turn", "where", "rule", "lost"):
        table.add_column(heading, overflow="fold")
    largest = sorted(report.breaks, key=lambda found: (-found.lost_tokens, found.line))
    for found in largest[:MOST_SHOWN]:
        where = found.part if found.message is None else f"{found.part} {found.message}"
        table.add_row(
            str(found.line),
            Text(f"{found.session}/{found.agent}"),
            str(found.turn),
            Text(f"{where}, {found.unit} {found.at:,}"),
            f"{found.rule} {found.name}",
            f"{found.lost_tokens:,}",
        )
    console.print(table)
    if report.n_breaks > MOST_SHOWN:
        more = f"  the {MOST_SHOWN} that lose most; --show json lists {len(report.breaks):,}"
        console.print(Text(more))
    for name, fix in sorted({(found.name, found.fix) for found in report.breaks}):
        console.print(Text(f"  {name}: {fix}"))
