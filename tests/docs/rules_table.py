"""The table of rules in docs/lint.md, made from `kvmem.explain.lint.RULES`.

`python -m tests.docs.rules_table` writes it into the page.
"""

from __future__ import annotations

from pathlib import Path

from kvmem.explain.lint import RULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lint.md"
BEGIN, END = "<!-- rules: begin -->\n", "<!-- rules: end -->"


def table() -> str:
    """One row a rule, in the order of their ids."""
    rows = [
        "| id | rule | what changed | what to do | `--fix` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in RULES:
        rows.append(f"| {r.id} | `{r.name}` | {r.what} | {r.fix} | {'yes' if r.fixable else ''} |")
    return "\n".join(rows) + "\n"


def in_page(text: str) -> str:
    """The table as the page has it."""
    return text.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + in_page(page), BEGIN + table()))
