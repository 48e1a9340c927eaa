"""The table of metrics in docs/telemetry.md, made from `kvmem.telemetry.metrics.METRICS`.

`python -m tests.docs.metrics_table` writes it into the page.
"""

from __future__ import annotations

from pathlib import Path

from kvmem.telemetry.metrics import METRICS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "telemetry.md"
BEGIN, END = "<!-- metrics: begin -->\n", "<!-- metrics: end -->"


def table() -> str:
    """One row a metric, in the catalogue's order."""
    rows = ["| metric | kind | labels | what |", "| --- | --- | --- | --- |"]
    for m in METRICS:
        labels = ", ".join(f"`{label}`" for label in m.labels)
        rows.append(f"| `{m.name}` | {m.kind} | {labels} | {m.help} |")
    return "\n".join(rows) + "\n"


def in_page(text: str) -> str:
    """The table as the page has it."""
    return text.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + in_page(page), BEGIN + table()))
