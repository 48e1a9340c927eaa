"""`kvmem blame`: turns of recorded runs, replayed; a table for people, JSON or one page."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from kvmem.blame import Other, Turn, Verdict, judge_of, read_run, try_turn
from kvmem.blame.page import page
from kvmem.blame.runs import runs_in
from kvmem.blame.values import CLASSES, INVOLVED
from kvmem.cli.files import write_new
from kvmem.errors import ConfigError, KVMemError

__all__ = ["Options", "run"]

CLEAN, AT_FAULT, BAD = 0, 1, 2
Shown = Literal["terminal", "json", "html"]
N_ARMS = 9


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for. `turn` None: every turn of a run."""

    model: str
    url: str = ""
    api_key: str = ""
    served_model: str = ""
    other: str = ""
    turn: int | None = None
    judge: str = ""
    verify_kv: bool = False
    influence: bool = False
    shown: Shown = "terminal"
    output: Path | None = None
    host_gb: float = 0.5


class _Tried(msgspec.Struct, frozen=True):
    run: str
    verdicts: list[Verdict]


def run(paths: list[Path], options: Options) -> int:
    """Replays the runs, shows what was found; the command's exit code.

    Raises:
        ConfigError: a path holds no run, the model can't be read, or a run can't be judged.
        EngineError: the server did not answer.
    """
    runs = [found for path in paths for found in runs_in(path)]
    console = Console(stderr=True)
    done: list[tuple[Path, list[tuple[Turn, Verdict]]]] = []
    faults: list[str] = []
    with (
        _engine(options) as (renderer, scorer, other),
        Progress(console=console, transient=True, disable=not console.is_terminal) as bars,
    ):
        for path in runs:
            try:
                turns = _chosen(path, read_run(path, renderer), options.turn)
            except KVMemError as error:
                if len(runs) == 1:
                    raise
                faults.append(str(error))
                continue
            bar = bars.add_task(path.name, total=len(turns) * N_ARMS)
            tried = []
            for number, turn in enumerate(turns):
                judge = judge_of(options.judge, turn.expected) if options.judge else None
                verdict = try_turn(
                    turn, renderer, scorer, judge=judge, other=other,
                    verify_kv=options.verify_kv, influence=options.influence,
                    tell=lambda arm, bar=bar, turn=turn: bars.update(  # type: ignore[misc]
                        bar, advance=1, description=f"{turn.name} {arm}"),
                )  # fmt: skip
                bars.update(bar, completed=(number + 1) * N_ARMS)
                tried.append((turn, verdict))
            done.append((path, tried))
    _show(done, options)
    for fault in faults:
        print(f"kvmem: {fault}", file=sys.stderr)
    if faults:
        return BAD
    involved = any(v.fault in INVOLVED for _, tried in done for _, v in tried)
    return AT_FAULT if involved else CLEAN


def _chosen(path: Path, turns: list[Turn], number: int | None) -> list[Turn]:
    if number is None:
        return turns
    if not 0 <= number < len(turns):
        raise ConfigError(
            f"{path} has {len(turns)} turns, no turn {number}",
            next_step="The first is 0.",
            setting="turn",
        )
    return [turns[number]]


@contextmanager
def _engine(options: Options) -> Iterator[tuple[Any, Any, Other | None]]:
    """Renderer, scorer and the other model: a server where there is a URL, else transformers."""
    from kvmem.engines.tokenizers import renderer_of

    renderer = renderer_of(options.model)
    if options.url:
        from kvmem.blame.served import ServedScorer

        if options.other:
            raise ConfigError(
                "--other-model is for transformers: a server has one model",
                next_step="Leave --url or --other-model out.",
                setting="other",
            )
        served = ServedScorer(options.url, model=options.served_model, api_key=options.api_key)
        try:
            yield renderer, served, None
        finally:
            served.close()
        return
    from kvmem.engines.transformers.scoring import open_scorer

    with open_scorer(options.model, host_gb=options.host_gb) as scorer:
        if not options.other:
            yield renderer, scorer, None
            return
        with open_scorer(options.other, host_gb=options.host_gb) as theirs:
            yield renderer, scorer, Other(renderer_of(options.other), theirs)


def _show(done: list[tuple[Path, list[tuple[Turn, Verdict]]]], options: Options) -> None:
    if options.shown == "terminal":
        _print(Console(), done)
        return
    if options.shown == "json":
        told = [_Tried(str(path), [v for _, v in tried]) for path, tried in done]
        text = msgspec.json.encode(told).decode() + "\n"
    else:
        text = page([pair for _, tried in done for pair in tried])
    if options.output is None:
        sys.stdout.write(text)
        return
    write_new(options.output, text)


def _print(console: Console, done: list[tuple[Path, list[tuple[Turn, Verdict]]]]) -> None:
    for _, tried in done:
        for _, verdict in tried:
            console.print(Text(verdict.explain()))
    if len(done) < 2:
        return
    table = Table(title=f"{len(done):,} runs", title_justify="left")
    for heading in ("run", "turns", *CLASSES, "tokens", "s"):
        table.add_column(heading, overflow="fold")
    for path, tried in done:
        counts = Counter(v.fault for _, v in tried)
        table.add_row(
            Text(path.name), str(len(tried)), *(str(counts[c] or "") for c in CLASSES),
            f"{sum(v.prompt_tokens for _, v in tried):,}",
            f"{sum(v.seconds for _, v in tried):.1f}",
        )  # fmt: skip
    console.print(table)
