"""Tells whoever runs the demo what is going on, at every moment.

On a terminal a bar and the last line of the server's log stay at the bottom; elsewhere (a log, a
pipe) each stage and each turn is one line.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Narrator"]

WIDTH = 60


class Narrator:
    """A context manager around the whole demo; its methods may be called in any order."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, now="", visible=False)

    def __enter__(self) -> Narrator:
        """Shows the bar, where there is a terminal."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes the bar away."""
        self._progress.stop()

    def line(self, text: str) -> None:
        """One line that stays, after the seconds since the start."""
        spent_s = time.monotonic() - self._began
        # soft_wrap: a line of a log is one line, however narrow the console says it is.
        self._console.print(f"[dim]{spent_s:6.1f} s[/dim]  {escape(text)}", soft_wrap=True)

    def stage(self, text: str, steps: int | None = None) -> None:
        """A new stage; with `steps` its bar fills up, else it moves."""
        self.line(text)
        self._progress.reset(
            self._task, total=steps, description=escape(text[:WIDTH]), now="", visible=True
        )

    def now(self, text: str) -> None:
        """What goes on within the stage: shown at the bar, and nowhere else."""
        self._progress.update(self._task, now=escape(text[:WIDTH]))

    def step(self, text: str) -> None:
        """One step of the stage is done."""
        self._progress.update(self._task, advance=1, now=escape(text[:WIDTH]))
        if not self._console.is_terminal:
            self.line(text)
