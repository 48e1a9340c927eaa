"""The table of reasons in docs/explain.md, made from `kvmem.explain.misses.reasons.REASONS`.

`python -m tests.docs.reasons_table` writes it into the page.
"""

from __future__ import annotations

from pathlib import Path

from kvmem.explain.misses.reasons import REASONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explain.md"
BEGIN, END = "<!-- reasons: begin -->\n", "<!-- reasons: end -->"


def table() -> str:
    """One row a reason, in the catalogue's order."""
    rows = ["| reason | what happened | what to do |", "| --- | --- | --- |"]
    rows += [f"| `{r.name}` | {r.what} | {r.fix} |" for r in REASONS]
    return "\n".join(rows) + "\n"


def in_page(text: str) -> str:
    """The table as the page has it."""
    return text.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + in_page(page), BEGIN + table()))
