"""`kvmem replay`: a log of prompts under other sizes and orders, as a table, JSON or a picture."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmem.errors import ConfigError
from kvmem.explain.replay import ORDERS, Forest, Played, Prompt, play
from kvmem.explain.replay.arrange import arrange
from kvmem.explain.replay.traces import Trace, read_trace

__all__ = ["Options", "run"]

TURNS = "round-robin:8"


class Options(msgspec.Struct, frozen=True):
    """What the command line asks for. `how` None: on the log's clock if it has one."""

    capacities: str = "1%,2%,5%,10%,25%"
    orders: str = ",".join(ORDERS)
    how: str | None = None
    as_json: bool = False
    plot: Path | None = None


def run(files: list[Path], options: Options) -> int:
    """Replays each file, shows what was found; the command's exit code.

    Raises:
        ConfigError: a file, an order, a capacity or an arrangement can't be used.
    """
    orders = _orders(options.orders)
    console = Console(stderr=True)
    for path in files:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
            reading = bars.add_task(f"read {path.name}", total=None)
            trace = read_trace(path, lambda n, task=reading: bars.update(task, completed=n))
            how = options.how or _own(trace)
            prompts = arrange(trace.calls, how)
            forest = Forest([prompt.keys for prompt in prompts])
            capacities = _capacities(options.capacities, forest.n_distinct)
            found = _play_all(bars, trace, prompts, forest, orders, capacities)
        _show(path, how, trace, forest, found, options)
        if options.plot is not None:
            _plot(options.plot, path.name, forest, found)
            console.print(f"the picture: {options.plot}")
    return 0


def _play_all(
    bars: Progress,
    trace: Trace,
    prompts: list[Prompt],
    forest: Forest,
    orders: list[str],
    capacities: list[int],
) -> list[Played]:
    found = []
    task = bars.add_task("replay", total=len(orders) * len(capacities) * len(prompts))
    for capacity in capacities:
        for order in orders:
            done = len(found) * len(prompts)
            bars.update(task, description=f"{order}, {capacity:,} blocks")
            found.append(
                play(
                    prompts, forest, order, capacity, block_tokens=trace.block_tokens,
                    progress=lambda n, done=done: bars.update(task, completed=done + n),
                )
            )  # fmt: skip
    return found


def _orders(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in ORDERS:
            raise ConfigError(f"no order {name!r}", next_step=f"Give some of {', '.join(ORDERS)}.")
    return names or list(ORDERS)


def _capacities(text: str, n_distinct: int) -> list[int]:
    found = []
    for word in text.split(","):
        try:
            share = word.strip().endswith("%")
            number = float(word.strip().rstrip("%"))
            blocks = max(int(number > 0), int(number / 100 * n_distinct)) if share else int(number)
        except (ValueError, OverflowError):
            blocks = 0
        if blocks < 1:
            raise ConfigError(
                f"no capacity {word!r} of {n_distinct:,} distinct blocks",
                next_step="Give blocks, or a share of the distinct blocks such as 5%.",
            )
        found.append(blocks)
    return found


def _own(trace: Trace) -> str:
    """On the log's clock where it is one clock for all sessions, else sessions in turns."""
    times = [call.at_s for call in trace.calls]
    timed = [at for at in times if at is not None]
    return "recorded" if len(timed) == len(times) and timed == sorted(timed) else TURNS


def _show(
    path: Path, how: str, trace: Trace, forest: Forest, found: list[Played], options: Options
) -> None:
    if options.as_json:
        told = {
            "file": str(path), "arrangement": how, "prompts": len(forest.paths),
            "blocks": forest.n_asked, "distinct": forest.n_distinct,
            "block_tokens": trace.block_tokens, "faults": trace.faults,
            "played": [
                {**msgspec.structs.asdict(one), "hit_rate": one.hit_rate,
                 "saved_rate": one.saved_rate} for one in found
            ],
        }  # fmt: skip
        print(json.dumps(told))
        return
    orders = list(dict.fromkeys(one.order for one in found))
    title = (
        f"{path.name}, {how}: {len(forest.paths):,} prompts, {forest.n_asked:,} blocks of "
        f"{trace.block_tokens} tokens, {forest.n_distinct:,} of them distinct; % of blocks hit"
    )
    table = Table(title=title)
    table.add_column("blocks", justify="right")
    for order in orders:
        table.add_column(order, justify="right")
    by = {(one.capacity, one.order): one for one in found}
    for capacity in dict.fromkeys(one.capacity for one in found):
        rates = [f"{100 * by[capacity, order].hit_rate:.2f}" for order in orders]
        table.add_row(f"{capacity:,}", *rates)
    Console().print(table)
    if trace.faults:
        Console(stderr=True).print(
            f"{trace.faults:,} places could not be read: `kvmem lint {path}` names them"
        )


def _plot(to: Path, title: str, forest: Forest, found: list[Played]) -> None:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib", next_step="Install kvmem[demo], or leave --plot out."
        ) from None
    mpl.use("Agg")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for order in dict.fromkeys(one.order for one in found):
        points = sorted((one.capacity, 100 * one.hit_rate) for one in found if one.order == order)
        axes.plot(*zip(*points, strict=True), marker="o", label=order)
    axes.set(xscale="log", xlabel="capacity, blocks", ylabel="% of blocks hit", title=title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(to)
