"""`kvmem verify`: looks through disk stores, with a bar for people and JSON for machines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from kvmem.store.verify import Report, stores_of, verify

__all__ = ["run"]

MOST_SHOWN = 10


def run(path: Path, *, repair: bool, as_json: bool) -> bool:
    """Looks through the stores at a path; whether all were looked at and nothing bad is left.

    Raises:
        ConfigError: there are none.
    """
    reports = []
    with Progress(console=Console(stderr=True), transient=True) as bars:
        for folder in stores_of(path.expanduser()):
            bar = bars.add_task(folder.name, total=None)

            def progress(n_done: int, n: int, bar: object = bar) -> None:
                bars.update(bar, completed=n_done, total=n)  # type: ignore[arg-type]

            reports.append(verify(folder, repair=repair, progress=progress))
    if as_json:
        print(msgspec.json.encode(reports).decode())
    else:
        for report in reports:
            print("\n".join(_lines(report)))
    return all(report.status in ("sound", "repaired") for report in reports)


def _lines(report: Report) -> list[str]:
    if report.status == "busy":
        return [f"{report.folder}: not looked at: {report.error}. Stop it first."]
    if report.status == "unreadable":
        return [
            f"{report.folder}: {report.error}",
            "  An engine that finds it so begins anew; remove the folder if none will.",
        ]
    gigabytes = report.bytes / 1e9
    whole = f"{report.blocks:,} of {report.records:,} blocks are whole"
    read = f"{gigabytes:.2f} GB in {report.seconds:.1f} s"
    lines = [f"{report.folder}: {report.status}, {whole} ({read})"]
    for why, n in Counter(bad.why for bad in report.bad).most_common():
        lines.append(f"  {n:,} {why}")
    lines += [f"    record {bad.record}: {bad.why} {bad.key}" for bad in report.bad[:MOST_SHOWN]]
    if len(report.bad) > MOST_SHOWN:
        lines.append(f"    and {len(report.bad) - MOST_SHOWN:,} more: --json lists them")
    if report.status == "damaged":
        lines.append("  They answer no prompt. --repair empties their records.")
    return lines
