"""The settings table of docs/operations.md, made from `kvmem.config.describe()`.

`python -m tests.docs.settings_table` writes it into the page.
"""

from __future__ import annotations

from pathlib import Path

from kvmem.config import describe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->"


def table() -> str:
    """One row a setting, in the order of `Config`."""
    rows = ["| setting | unit | default | why | cost |", "| --- | --- | --- | --- | --- |"]
    for s in describe():
        default = "unset" if s.default is None else str(s.default).lower()
        rows.append(f"| `{s.name}` | {s.unit} | {default} | {s.reason} | {s.cost} |")
    return "\n".join(rows) + "\n"


def in_page(text: str) -> str:
    """The table as the page has it."""
    return text.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + in_page(page), BEGIN + table()))
